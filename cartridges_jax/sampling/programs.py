"""The compiled programs under the engine: read a chunk, take first tokens, admit rows, decode, resize.

All of a request that differs from row to row comes in as data; what is static (`choice`,
`num_top`) says only which parts a batch needs at all. B rows of S slots decode; R rows
of W slots are read apart from them, so that reading compiles for R, W and the chunk and
not for every B and S too.
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

from cartridges_jax import parallel
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.models import CACHE_AXES, Cache, Decoder, ModelConfig, empty_cache, lm_logits
from cartridges_jax.parallel import constrain, on_mesh_of
from cartridges_jax.sampling.buckets import prefix_bucket
from cartridges_jax.sampling.select import Choice, RowSampling, select_rows

# A finite bias, so that a masked score minus the maximum never becomes inf - inf; exp() of it is exactly 0.
_MASKED = -1e30


@flax.struct.dataclass
class Front:
    """A resident prefix whose shape and pytree say little about it.

    Attributes:
      prefix: padded to a bucket; the padding's bias gives it weight exactly 0. Its static
        `next_position` is 0, so that prefixes of unlike lengths share programs.
      start: scalar int32, the position of the first token behind it.

    Where decoding uses unstacked layers, keys and values are tuples of them.
    """

    prefix: KVPrefix
    start: Array

    def stacked(self) -> Front:
        """The same with one array for all layers."""
        if not isinstance(self.prefix.keys, tuple):
            return self
        return self.replace(
            prefix=self.prefix.replace(keys=jnp.stack(self.prefix.keys), values=jnp.stack(self.prefix.values))
        )


def as_front(prefix: KVPrefix, dtype: Any, *, unstacked: bool = False, mesh: Mesh | None = None) -> Front:
    """Pads a prefix to its bucket, and keeps it where it is used: every decode step reads it.

    Args:
      unstacked: keys and values of every layer in arrays of their own.
      mesh: over which it is spread.
    """
    pad = prefix_bucket(prefix.num_slots) - prefix.num_slots
    slots = ((0, 0), (0, 0), (0, pad))
    bias = prefix.bias
    if pad and bias is None:
        bias = jnp.zeros(prefix.keys.shape[:3], jnp.float32)

    def layers(part: Array) -> Any:
        padded = jnp.pad(jnp.asarray(part, dtype), (*slots, (0, 0)))
        return tuple(padded) if unstacked else padded

    padded = KVPrefix(
        keys=layers(prefix.keys),
        values=layers(prefix.values),
        positions=jnp.pad(jnp.asarray(prefix.positions), (0, pad)),
        group=jnp.pad(jnp.asarray(prefix.group), (0, pad)),
        bias=None if bias is None else jnp.pad(jnp.asarray(bias, jnp.float32), slots, constant_values=_MASKED),
    )
    return Front(parallel.place_prefix(padded, mesh, in_use=True), jnp.int32(prefix.next_position))


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
    tokens: Array
    num_generated: Array
    running: Array


@flax.struct.dataclass
class Rows:
    """What requests ask for, per row.

    Attributes:
      limits: [B] int32, max_tokens; 0 stops a row that nobody waits for.
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


def _kept(state: State) -> State:
    """The state as `empty_state` lays it out: what comes out of one program goes into the next."""
    per_row = {name: constrain(getattr(state, name), "rows") for name in ("tokens", "num_generated", "running")}
    return State(cache=_kept_cache(state.cache), **per_row)


def _kept_cache(cache: Cache) -> Cache:
    return Cache(
        keys=constrain(cache.keys, *CACHE_AXES),
        values=constrain(cache.values, *CACHE_AXES),
        lengths=constrain(cache.lengths, "rows"),
    )


Outputs = tuple[Array, Array, Array]  # tokens [n, B] (-1: none), top ids [n, B, k], top log-probabilities [n, B, k]


def empty_state(
    config: ModelConfig, num_rows: int, num_slots: int, dtype: Any, *, unstacked: bool = False, mesh: Mesh | None = None
) -> State:
    """B rows that hold nothing."""
    per_row = functools.partial(parallel.zeros, mesh, ("rows",), (num_rows,))
    return State(
        cache=empty_cache(config, num_rows, num_slots, dtype, unstacked=unstacked, mesh=mesh),
        tokens=per_row(jnp.int32),
        num_generated=per_row(jnp.int32),
        running=per_row(bool),
    )


def _apply(config: ModelConfig, params: Any, front: Front | None, cache: Cache, tokens: Array, segment_ids: Array):
    start = 0 if front is None else front.start
    positions = start + cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, cache, _ = Decoder(config).apply(
        {"params": params}, tokens, positions, segment_ids, prefix=None if front is None else front.prefix, cache=cache
    )
    return hidden, cache


def _choose(logits: Array, num_generated: Array, rows: Rows, choice: Choice, num_top: int) -> Outputs:
    """Token [B] and the most likely ones [B, k]; token i of a row draws with fold_in(key, i)."""
    keys = None
    if choice.candidates or choice.whole:
        fold = jax.vmap(jax.random.fold_in)
        keys = fold(fold(jax.random.wrap_key_data(rows.seeds), rows.streams), num_generated)
    token = select_rows(logits, keys, rows.sampling, choice)
    if not num_top:
        return token, jnp.zeros((*token.shape, 0), jnp.int32), jnp.zeros((*token.shape, 0), jnp.float32)
    top, top_ids = jax.lax.top_k(logits, num_top)
    return token, top_ids, top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _for_host(outputs: Outputs) -> Outputs:
    """All of them on every device, so that every process can read them."""
    return tuple(constrain(part) for part in outputs)


def _goes_on(token: Array, num_generated: Array, rows: Rows) -> Array:
    return jnp.all(rows.stop_ids != token[:, None], axis=-1) & (num_generated < rows.limits)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache", "last"))
def read_chunk(
    config: ModelConfig, params: Any, front: Front | None, cache: Cache, last: Array, tokens: Array, segment_ids: Array
) -> tuple[Cache, Array]:
    """Appends a chunk [R, T] of prompts to the cache [R, W].

    Args:
      last: [R, D], the hidden state of each row's last token so far.

    Returns:
      The cache, and `last` as of now.
    """
    front = None if front is None else front.stacked()
    hidden, cache = _apply(config, params, front, cache, tokens, segment_ids)
    count = jnp.sum(segment_ids, axis=1)
    newest = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    with on_mesh_of(params):
        return _kept_cache(cache), constrain(jnp.where((count > 0)[:, None], newest, last), "rows", None)


@functools.partial(jax.jit, static_argnames=("config", "choice", "num_top"))
def first_tokens(
    config: ModelConfig, params: Any, last: Array, rows: Rows, *, choice: Choice, num_top: int
) -> tuple[Array, Outputs]:
    """What follows prompts that were read to their end, given `last` [R, D].

    Returns:
      running [R], whether a second token is to follow; outputs [1, R].
    """
    logits = lm_logits(params, config, last)
    token, top_ids, top = _choose(logits, jnp.zeros((last.shape[0],), jnp.int32), rows, choice, num_top)
    with on_mesh_of(params):
        running = constrain(_goes_on(token, jnp.ones_like(token), rows), "rows")
        return running, _for_host((token[None], top_ids[None], top[None]))


def admit(state: State, read: Cache, tokens: Array, running: Array, at: Array) -> State:
    """Puts R prompts that were read, and their first tokens [R], into rows `at` [R].

    A row may occur twice in `at` if what goes there is the same. The state is donated.

    Where layers are unstacked, each is a call of one small program: one large program took a
    second to compile, for every B, S, R and W, and was no faster.
    """
    held = state.cache
    if held.is_unstacked:
        keys, values = (
            tuple(put_rows(into, new, at, np.int32(layer), turned=turned) for layer, into in enumerate(layers))
            for layers, new, turned in ((held.keys, read.keys, True), (held.values, read.values, False))
        )
    else:
        keys, values = (put_rows(into, new, at) for into, new in ((held.keys, read.keys), (held.values, read.values)))
    lengths, tokens, num_generated, running = _put_per_row(
        (held.lengths, state.tokens, state.num_generated, state.running), (read.lengths, tokens, running), at
    )
    return State(Cache(keys, values, lengths), tokens, num_generated, running)


@functools.partial(jax.jit, static_argnames=("turned",), donate_argnames=("into",))
def put_rows(into: Array, new: Array, at: Array, layer: Array | None = None, *, turned: bool = False) -> Array:
    """Rows of `new` [L, R, K, W, H] in their places in a cache; of one layer if `into` is of one.

    Args:
      turned: `into` has [H, S] instead of [S, H].
    """
    if layer is not None:
        new = jax.lax.dynamic_index_in_dim(new, layer, keepdims=False)
    new = new[..., : into.shape[-1 if turned else -2], :]
    if turned:
        new = new.swapaxes(-1, -2)

    # Row by row: one scatter of all would be a loop over single numbers on the CPU.
    def put(r: Array, into: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(new, r, 1, axis=new.ndim - 4)
        start = (0,) * (into.ndim - 4) + (at[r], 0, 0, 0)
        return jax.lax.dynamic_update_slice(into, row.astype(into.dtype), start)

    into = jax.lax.fori_loop(0, at.shape[0], put, into)
    with on_mesh_of(into):
        return constrain(into, *CACHE_AXES)


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
    front: Front | None,
    state: State,
    rows: Rows,
    enough: Array,
    *,
    choice: Choice,
    num_top: int,
    num_steps: int,
) -> tuple[State, Outputs]:
    """Takes up to `num_steps` tokens per running row.

    Args:
      enough: scalar int32; stops early once no more rows than that are running.

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

    def goes_on(carry):
        number, state, _ = carry
        return (number < num_steps) & (jnp.sum(state.running) > enough)

    def step(carry):
        number, state, outputs = carry
        hidden, cache = _apply(
            config, params, front, state.cache, state.tokens[:, None], state.running.astype(jnp.int32)[:, None]
        )
        logits = lm_logits(params, config, hidden[:, 0])
        token, top_ids, top = _choose(logits, state.num_generated, rows, choice, num_top)
        emitted = jnp.where(state.running, token, -1)
        num_generated = state.num_generated + state.running
        state = State(
            cache=cache,
            tokens=token,
            num_generated=num_generated,
            running=state.running & _goes_on(token, num_generated, rows),
        )
        outputs = tuple(into.at[number].set(part) for into, part in zip(outputs, (emitted, top_ids, top)))
        return number + 1, state, outputs

    _, state, outputs = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, outputs))
    with on_mesh_of(params):
        return _kept(state), _for_host(outputs)


@functools.partial(jax.jit, static_argnames=("num_slots",))
def resize(state: State, at: Array, kept: Array, *, num_slots: int) -> State:
    """The state with row i taken from row at[i], with S slots.

    Args:
      at: [B'] int32.
      kept: [B'] bool, False where a row is empty.
      num_slots: at least what the longest kept row holds.
    """

    def fit(part: Array, slot_axis: int) -> Array:
        slots = part.shape[slot_axis]
        part = jnp.take(jax.lax.slice_in_dim(part, 0, min(slots, num_slots), axis=slot_axis), at, axis=-4)
        padding = [(0, 0)] * part.ndim
        padding[slot_axis] = (0, max(num_slots - slots, 0))
        return jnp.pad(part, padding)

    with on_mesh_of(state):
        return _kept(
            State(
                cache=state.cache.mapped(fit).replace(lengths=jnp.where(kept, state.cache.lengths[at], 0)),
                tokens=state.tokens[at],
                num_generated=state.num_generated[at],
                running=state.running[at] & kept,
            )
        )
