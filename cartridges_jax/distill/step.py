"""The distillation step: the learner's parameters are trained, the model is frozen."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.data.packing import TrainBatch
from cartridges_jax.distill.learner import Learner
from cartridges_jax.distill.loss import divergence_per_token
from cartridges_jax.models import Decoder, ModelConfig, lm_head
from cartridges_jax.parallel import constrain, num_parts, on_mesh_of, place


@flax.struct.dataclass
class TrainState:
    """The state that a run needs to resume; the same pytree also holds the shardings of its arrays.

    Attributes:
      step: steps taken, refused ones included; it fixes the data position.
      trainable: the learner's parameters, float32; for a cartridge {"keys", "values": [L, K, P, H]}.
      opt_state: state of the optimizer.
      refused: steps refused so far for a loss or gradient that was not finite.
      refused_in_a_row: number of the last steps that were.
    """

    step: Any
    trainable: Any
    opt_state: Any
    refused: Any
    refused_in_a_row: Any


def new_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # Every scalar has a buffer of its own: the step donates the state.
    return TrainState(
        step=jnp.array(0, jnp.int32),
        trainable=jax.tree.map(jnp.array, trainable),
        opt_state=optimizer.init(trainable),
        refused=jnp.array(0, jnp.int32),
        refused_in_a_row=jnp.array(0, jnp.int32),
    )


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainState:
    """`new_state` on its devices.

    Args:
      trainable: the learner's parameters, float32.
      optimizer: whose state it holds.
      shardings: of the state's arrays; the default device if not given.
    """
    state = new_state(trainable, optimizer)
    # Committed to a device as the step's outputs are, or the second step would compile again.
    return jax.device_put(state, jax.local_devices()[0]) if shardings is None else place(state, shardings)


def batch_loss(
    config: ModelConfig, params: Any, prefix: KVPrefix, batch: TrainBatch, *, tail: str, remat: bool = False
) -> Array:
    """Sum [] of the divergences over one micro-batch's targets, in nats.

    Args:
      config: of the model.
      params: its parameters, as the learner combined them.
      prefix: the cartridge, which every row of the batch follows.
      batch: without the leading micro-batch axis.
      tail: see `loss`.
      remat: recompute layers in the backward pass.
    """
    hidden, _, _ = Decoder(config, remat=remat).apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        prefix=prefix,
    )
    with on_mesh_of(params):
        divergence = divergence_per_token(
            _at_targets(hidden, batch.rows),
            lm_head(params, config),
            batch.ids,
            batch.logprobs,
            tail,
            softcap=config.logit_softcap,
        )
    return jnp.sum(divergence * batch.weight)


def _at_targets(hidden: Array, rows: Array) -> Array:
    """The hidden states [M, D] at targets [M] of hidden [B, T, D].

    Each part of a mesh's rows holds its own targets (see `TrainBatch`), so none are sent.
    """
    B, T, D = hidden.shape
    parts = num_parts("rows", B)
    if parts == 1:
        return hidden.reshape(-1, D)[rows]
    first = jnp.arange(parts)[:, None] * (B // parts * T)
    picked = jax.vmap(lambda own, at: own[at])(hidden.reshape(parts, -1, D), rows.reshape(parts, -1) - first)
    return constrain(picked.reshape(-1, D), "rows", None)


def train_step_function(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    learner: Learner,
    params: Any,
    frozen: Any,
    mask: Any,
    state: TrainState,
    batch: TrainBatch,
    *,
    tail: str = "class",
    remat: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step over all micro-batches; `train_step` is this, compiled.

    The loss is the mean over the target tokens of the whole step: one denominator for
    all micro-batches, so that their sizes do not matter.

    Args:
      config: of the model.
      optimizer: its updates are added to the parameters.
      learner: joins `frozen` and the state's `trainable`.
      params: the model's, frozen.
      frozen: as `Learner.init` returned it.
      mask: as `Learner.mask` returns it; 0 keeps an entry's bits.
      state: the state before; donated by `train_step`.
      batch: A micro-batches.
      tail: see `loss`.
      remat: recompute layers in the backward pass.

    Returns:
      The state (unchanged but for its counters if loss or gradient was not finite),
      and metrics: loss (nats a token), grad_norm, num_targets, refused_in_a_row.
    """
    num_targets = batch.weight.sum()

    def mean_loss(trainable, micro):
        joined, prefix = learner.combine(params, frozen, trainable)
        return batch_loss(config, joined, prefix, micro, tail=tail, remat=remat) / num_targets

    def accumulate(carry, micro):
        loss, grads = jax.value_and_grad(mean_loss)(state.trainable, micro)
        return jax.tree.map(jnp.add, carry, (loss, grads)), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
    (loss, grads), _ = jax.lax.scan(accumulate, zero, batch)
    grads = _masked(grads, mask)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    # Again, because an optimizer may move a parameter that has no gradient (weight decay).
    updates = _masked(updates, mask)
    trainable = optax.apply_updates(state.trainable, updates)

    def keep_if_finite(new, old):
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    refused = (~finite).astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        trainable=keep_if_finite(trainable, state.trainable),
        opt_state=keep_if_finite(opt_state, state.opt_state),
        refused=state.refused + refused,
        refused_in_a_row=jnp.where(finite, 0, state.refused_in_a_row + 1),
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "num_targets": num_targets,
        "refused_in_a_row": state.refused_in_a_row,
    }
    return state, metrics


def _masked(tree: Any, mask: Any) -> Any:
    """A pytree times a mask, which is one array or a pytree that `tree` extends."""
    return jax.tree.map(lambda factor, part: jax.tree.map(lambda leaf: leaf * factor, part), mask, tree)


train_step = jax.jit(
    train_step_function,
    static_argnames=("config", "optimizer", "learner", "tail", "remat"),
    donate_argnames=("state",),
)


@functools.partial(jax.jit, static_argnames=("config", "learner", "tail"))
def eval_step(
    config: ModelConfig,
    learner: Learner,
    params: Any,
    frozen: Any,
    trainable: Any,
    batch: TrainBatch,
    *,
    tail: str = "class",
) -> tuple[Array, Array]:
    """Sum [] of divergences in nats, and number [] of targets, over a batch; nothing is trained."""
    joined, prefix = learner.combine(params, frozen, trainable)

    def add(total, micro):
        return total + batch_loss(config, joined, prefix, micro, tail=tail), None

    total, _ = jax.lax.scan(add, jnp.float32(0), batch)
    return total, batch.weight.sum()
