"""The rows of a batch: their requests' settings as arrays, and the choice of their next tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Int, Int32

from cartridges_jax.parallel import constrain
from cartridges_jax.sampling.buckets import power_of_two
from cartridges_jax.sampling.request import Live
from cartridges_jax.sampling.select import GREEDY, Choice, RowSampling, select_rows

# Of n steps: tokens [n, B] (-1 where a row took none), top ids [n, B, k], their log-probabilities [n, B, k].
Outputs = tuple[Array, Array, Array]


@flax.struct.dataclass
class Rows:
    """The requests' settings per row.

    Attributes:
      limits: [B] int32, max_tokens; 0 stops a row without a request.
      stop_ids: [B, n] int32, padded with -1.
      seeds: [B, …] uint32, key data of the request's seed.
      streams: [B] uint32, folded into the key.
      sampling: [B] each.
    """

    limits: Array
    stop_ids: Array
    seeds: Array
    streams: Array
    sampling: RowSampling


def rows_of(lives: Sequence[Live | None]) -> Rows:
    """The settings of requests, as NumPy arrays; a row without a request is stopped."""
    requests = [None if live is None or live.over else live.request for live in lives]
    most_stops = max((len(live.stops) for live in lives if live), default=0)
    stop_ids = np.full((len(lives), max(4, power_of_two(most_stops))), -1, np.int32)
    for row, live in enumerate(lives):
        if live is not None:
            stop_ids[row, : len(live.stops)] = sorted(live.stops)
    return Rows(
        limits=np.asarray([request.max_tokens if request else 0 for request in requests], np.int32),
        stop_ids=stop_ids,
        seeds=np.stack([_key_data(request.seed if request else 0) for request in requests]),
        streams=np.asarray([request.stream if request else 0 for request in requests], np.uint32),
        sampling=RowSampling.of([request.sampling if request else GREEDY for request in requests]),
    )


@functools.lru_cache(maxsize=1024)
def _key_data(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def choose_tokens(
    logits: Float32[Array, "B V"], num_generated: Int[Array, " B"], rows: Rows, choice: Choice, num_top: int
) -> tuple[Int32[Array, " B"], Int32[Array, "B k"], Float32[Array, "B k"]]:
    """The next token of each row, the ids of its most likely ones and their log-probabilities.

    Token i of a row is drawn with fold_in(key of the row, i).
    """
    keys = None
    if choice.candidates or choice.whole:
        fold = jax.vmap(jax.random.fold_in)
        keys = fold(fold(jax.random.wrap_key_data(rows.seeds), rows.streams), num_generated)
    token = select_rows(logits, keys, rows.sampling, choice)
    if not num_top:
        return token, jnp.zeros((*token.shape, 0), jnp.int32), jnp.zeros((*token.shape, 0), jnp.float32)
    top, top_ids = jax.lax.top_k(logits, num_top)
    return token, top_ids, top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def continues(token: Int[Array, " B"], num_generated: Int[Array, " B"], rows: Rows) -> Bool[Array, " B"]:
    """True where a row takes another token after `token`: no stop token, and fewer than its limit."""
    return jnp.all(rows.stop_ids != token[:, None], axis=-1) & (num_generated < rows.limits)


def for_host(outputs: Outputs) -> Outputs:
    """The outputs with all of them on every device, so that every process can read them."""
    return tuple(constrain(part) for part in outputs)
