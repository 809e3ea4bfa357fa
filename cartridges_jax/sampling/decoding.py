"""The compiled programs that decode: admit rows, take steps, resize.

Everything in a request that differs from row to row is passed as data; the static arguments
(`choice`, `num_top`) only say which parts a batch needs at all.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Int, Int32

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import Cache, Decoder, ModelConfig, lm_logits
from cartridges_jax.parallel import constrain, on_mesh_of
from cartridges_jax.sampling.rows import Outputs, Rows, choose_tokens, continues, for_host
from cartridges_jax.sampling.select import Choice


@flax.struct.dataclass
class State:
    """Rows between two decode steps.

    Attributes:
      cache: B rows; the last token of each is not in it yet.
      tokens: [B] int32, that last token.
      num_generated: [B] int32.
      running: [B] bool.
    """

    cache: Cache
    tokens: Int32[Array, " B"]
    num_generated: Int32[Array, " B"]
    running: Bool[Array, " B"]


def _constrained(state: State) -> State:
    """The state placed as `empty_state` places it: a program's result is the next one's argument."""
    per_row = {name: constrain(getattr(state, name), "rows") for name in ("tokens", "num_generated", "running")}
    return State(cache=state.cache.constrained(), **per_row)


def empty_state(cache: Cache, mesh: Mesh | None = None) -> State:
    """The state of an empty cache's B rows, of which none is running."""
    per_row = functools.partial(parallel.zeros, mesh, ("rows",), (cache.num_rows,))
    return State(cache=cache, tokens=per_row(jnp.int32), num_generated=per_row(jnp.int32), running=per_row(bool))


def admit(
    state: State, read: Cache, tokens: Int[Array, " R"], running: Bool[Array, " R"], at: Int[np.ndarray, " R"]
) -> State:
    """Writes R prompts that were read, and their first tokens, into rows `at`.

    A row may occur twice in `at` if both write the same. The state is donated.
    """
    cache = state.cache.with_rows(read, at)
    lengths, tokens, num_generated, running = _put_per_row(
        (cache.lengths, state.tokens, state.num_generated, state.running), (read.lengths, tokens, running), at
    )
    return State(cache.replace(lengths=lengths), tokens, num_generated, running)


@functools.partial(jax.jit, donate_argnames=("held",))
def _put_per_row(held: tuple[Array, ...], new: tuple[Array, ...], at: Array) -> tuple[Array, ...]:
    lengths, tokens, num_generated, running = held
    new_lengths, new_tokens, new_running = new
    with on_mesh_of(held):
        return tuple(constrain(part, "rows") for part in (
            lengths.at[at].set(new_lengths), tokens.at[at].set(new_tokens), num_generated.at[at].set(1),
            running.at[at].set(new_running),
        ))  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "choice", "num_top", "num_steps"), donate_argnames=("state",))
def decode(
    config: ModelConfig,
    params: Any,
    prefix: KVPrefix | None,
    state: State,
    rows: Rows,
    enough: Int[Array, ""],
    *,
    choice: Choice,
    num_top: int,
    num_steps: int,
) -> tuple[State, Outputs]:
    """Takes up to `num_steps` tokens per running row.

    Args:
      enough: scalar int32; stops early once at most that many rows are running.

    Returns:
      The state and outputs [num_steps, B].
    """
    num_rows = state.tokens.shape[0]
    outputs = (
        jnp.full((num_steps, num_rows), -1, jnp.int32),
        jnp.zeros((num_steps, num_rows, num_top), jnp.int32),
        jnp.zeros((num_steps, num_rows, num_top), jnp.float32),
    )
    state = state.replace(running=state.running & (state.num_generated < rows.limits))

    def unfinished(carry):
        number, state, _ = carry
        return (number < num_steps) & (jnp.sum(state.running) > enough)

    def step(carry):
        number, state, outputs = carry
        hidden, cache, _ = Decoder(config).apply(
            {"params": params},
            state.tokens[:, None],
            None,
            state.running.astype(jnp.int32)[:, None],
            prefix=prefix,
            cache=state.cache,
        )
        logits = lm_logits(params, config, hidden[:, 0])
        token, top_ids, top = choose_tokens(logits, state.num_generated, rows, choice, num_top)
        emitted = jnp.where(state.running, token, -1)
        num_generated = state.num_generated + state.running
        state = State(
            cache=cache,
            tokens=token,
            num_generated=num_generated,
            running=state.running & continues(token, num_generated, rows),
        )
        outputs = tuple(into.at[number].set(part) for into, part in zip(outputs, (emitted, top_ids, top)))
        return number + 1, state, outputs

    _, state, outputs = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, outputs))
    with on_mesh_of(params):
        return _constrained(state), for_host(outputs)


@functools.partial(jax.jit, static_argnames=("num_slots",))
def resize(state: State, at: Int[Array, " R"], occupied: Bool[Array, " R"], *, num_slots: int) -> State:
    """The state with row i taken from row at[i], with S slots.

    Args:
      at: [R], the rows of the result.
      occupied: [R], False where a row of the result is empty.
      num_slots: at least the length of the longest occupied row.
    """

    def fit(part: Array, slot_axis: int) -> Array:
        slots = part.shape[slot_axis]
        part = jnp.take(jax.lax.slice_in_dim(part, 0, min(slots, num_slots), axis=slot_axis), at, axis=-4)
        padding = [(0, 0)] * part.ndim
        padding[slot_axis] = (0, max(num_slots - slots, 0))
        return jnp.pad(part, padding)

    with on_mesh_of(state):
        return _constrained(
            State(
                cache=state.cache.mapped(fit).replace(lengths=jnp.where(occupied, state.cache.lengths[at], 0)),
                tokens=state.tokens[at],
                num_generated=state.num_generated[at],
                running=state.running[at] & occupied,
            )
        )
