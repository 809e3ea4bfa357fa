"""Decode speed over the size of the cache, at the best batch that a memory budget allows.

Two sides: every row with slots of its own (a document per conversation in its context),
and one prefix that all rows share (a cartridge, or a document that all requests are
about). The keys are random: their values do not change the speed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cartridges_jax import cartridge
from cartridges_jax.benchmarks import figures
from cartridges_jax.benchmarks.inputs import COMMON, Common, config_dict, read_model
from cartridges_jax.benchmarks.machine import BANDWIDTH, MATMUL, Ceilings, step_seconds_at_least
from cartridges_jax.benchmarks.results import Bar, Result
from cartridges_jax.benchmarks.rounds import take_turns_with_ceilings
from cartridges_jax.benchmarks.timing import Times, interleaved
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.errors import UserError
from cartridges_jax.models import Cache, Decoder, Model, ModelConfig, lm_logits
from cartridges_jax.models.costs import decode_bytes, decode_flops, kv_bytes_per_token
from cartridges_jax.sampling.select import most_likely

NAME = "cache_sweep"
OWN, SHARED = "own", "shared"


@dataclasses.dataclass(frozen=True)
class CacheSweepSettings:
    """The settings of the measurement.

    Attributes:
      sizes: slots of the cache, own or shared; the smallest and largest give the ratios.
      headline: the size whose shared prefix gives the headline.
      budget_gib: of keys and values, prefix and rows together.
      batches: the batch sizes to choose among; those that do not fit are left out.
      own_tokens: slots that every row has of its own after a shared prefix.
      steps: decode steps a measured round.
      dtype: of the model and the cache.
    """

    common: Common
    sizes: tuple[int, ...]
    headline: int
    budget_gib: float
    batches: tuple[int, ...]
    own_tokens: int
    steps: int
    dtype: str

    def check(self) -> None:
        """Raises UserError for a value that the benchmark cannot use."""
        if self.headline not in self.sizes:
            raise UserError(f"headline={self.headline} is none of sizes={self.sizes}")
        if self.steps < 1 or not self.batches or min(self.batches) < 1 or not self.budget_gib > 0:
            raise UserError("steps, batches and budget_gib must be above 0")


def default_config():
    """The defaults that experiments override."""
    return config_dict(NAME, CacheSweepSettings(
        common=dataclasses.replace(COMMON, peers=False), sizes=(128, 256, 512, 1024, 2048, 4096, 8192), headline=256,
        budget_gib=6.0, batches=(1, 4, 8, 16, 32, 64, 128, 256), own_tokens=64, steps=8, dtype="float32",
    ))  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "num_steps"), donate_argnames=("cache",))
def greedy_steps(
    config: ModelConfig, params: Any, prefix: KVPrefix | None, cache: Cache, tokens: Array, *, num_steps: int
) -> tuple[Cache, Array]:
    """`num_steps` greedy tokens of every row [B]; the cache returns with the lengths that it came with."""

    def step(carry, _):
        cache, tokens = carry
        hidden, cache, _ = Decoder(config).apply(
            {"params": params},
            tokens[:, None],
            None,
            jnp.ones_like(tokens)[:, None],
            prefix=prefix,
            cache=cache,
        )
        return (cache, most_likely(lm_logits(params, config, hidden[:, 0]))), None

    lengths = cache.lengths
    (cache, tokens), _ = jax.lax.scan(step, (cache, tokens), length=num_steps)
    return cache.replace(lengths=lengths), tokens


class Decoding:
    """Decoding of B rows that hold `own` slots each, after a prefix or none."""

    def __init__(self, model: Model, prefix: KVPrefix | None, num_rows: int, own: int, num_steps: int):
        self._model, self._steps = model, num_steps
        self._prefix = None if prefix is None else model.decoding_prefix(prefix)
        # Small and not constant, so that XLA folds no part of the work away.
        fill = jnp.linspace(-0.5, 0.5, model.config.head_dim, dtype=model.dtype)

        def filled() -> tuple[Cache, Array]:
            empty = model.decoding_cache(num_rows, own + num_steps)
            cache = empty.mapped(lambda part, slot_axis: part + (fill if slot_axis == -2 else fill[:, None]))
            cache = cache.replace(lengths=jnp.full((num_rows,), own, jnp.int32))
            return cache, jnp.arange(num_rows, dtype=jnp.int32) % model.config.vocab_size

        # One program, because two would hold the budget's gigabytes twice. Committed to the device like the
        # results of `greedy_steps`, because its second call would compile again otherwise.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._cache, self._tokens = jax.jit(filled, out_shardings=device)()

    def __call__(self) -> None:
        self._cache, self._tokens = greedy_steps(
            self._model.config,
            self._model.decode_params,
            self._prefix,
            self._cache,
            self._tokens,
            num_steps=self._steps,
        )
        jax.block_until_ready(self._tokens)


def random_prefix(model: Model, num_slots: int, seed: int) -> KVPrefix:
    config = model.config
    shape = (config.num_layers, config.num_kv_heads, num_slots, config.head_dim)
    keys, values = (jax.random.normal(key, shape, model.dtype) for key in jax.random.split(jax.random.key(seed)))
    return cartridge.from_plain_tokens(keys, values)


def fitting(settings: CacheSweepSettings, bytes_per_slot: int, kind: str, size: int) -> list[int]:
    """The batch sizes whose keys and values fit the budget."""
    budget = settings.budget_gib * 2**30

    def needed(rows: int) -> int:
        own = size if kind == OWN else settings.own_tokens
        return bytes_per_slot * ((size if kind == SHARED else 0) + rows * (own + settings.steps))

    return [rows for rows in sorted(settings.batches) if needed(rows) <= budget]


def run(settings: CacheSweepSettings, workdir: Path) -> Result:
    """Measures both sides over all sizes; writes the figure.

    A side's batch is chosen from single warm rounds of growing batches; only the chosen
    one is measured with repeats. The headline's size and the largest one, own and shared,
    alternate: together they hold twice the budget.
    """
    common = settings.common
    model = read_model(common, dtype=settings.dtype)
    bytes_per_slot = kv_bytes_per_token(model.config, model.dtype)
    prefixes = {size: random_prefix(model, size, common.seed) for size in settings.sizes}
    best = {
        (kind, size): _best_batch(settings, model, prefixes[size], kind, size, batches)
        for size in settings.sizes for kind in (SHARED, OWN)
        if (batches := fitting(settings, bytes_per_slot, kind, size))
    }  # fmt: skip
    ceilings = Ceilings(model.config, 512, 128)
    compared = (settings.headline, max(settings.sizes))
    rows, machines = [], []
    # The sides that the ratios compare alternate; the other sizes only draw the curve.
    for sizes in [compared, *((size,) for size in settings.sizes if size not in compared)]:
        sides: dict[str, Callable[[], object]] = {
            f"{kind} {size}": _decoding(settings, model, prefixes[size], kind, size, batch)
            for (kind, size), batch in best.items() if size in sizes
        }  # fmt: skip
        name = f"{NAME} {' and '.join(map(str, dict.fromkeys(sizes)))} slots"
        times, machine = take_turns_with_ceilings(name, sides, ceilings, repeats=common.repeats)
        machines.append(machine)
        rows += [
            _row(settings, model, kind, size, batch, times[f"{kind} {size}"], machine)
            for (kind, size), batch in best.items() if size in sizes
        ]  # fmt: skip
        del sides

    headline = next(row for row in rows if row["kind"] == SHARED and row["slots"] == settings.headline)
    others = {f"{row['kind']} {row['slots']}": row for row in rows if row["slots"] in compared}
    del others[f"{SHARED} {settings.headline}"]
    headline["peers"] = {name: row["value"] for name, row in others.items()}
    headline["ratio"] = {name: headline["value"] / row["value"] for name, row in others.items()}
    gains = {f"{kind} {compared[0]} over {compared[1]}": _gain(rows, kind, *compared) for kind in (OWN, SHARED)}
    result = Result(
        benchmark=NAME,
        unit="tokens/s",
        rows=[headline, *sorted((row for row in rows if row is not headline), key=lambda row: (row["kind"], row["slots"]))],
        machine=machines[0],
        absent=[],
        more={"budget_gib": settings.budget_gib, "own_tokens": settings.own_tokens, "kv_bytes_per_token": bytes_per_slot,
              "repeats": common.repeats, "gains": gains},
    )  # fmt: skip
    figures.cache_sweep(result, workdir / f"{NAME}.png")
    return result


def _decoding(
    settings: CacheSweepSettings, model: Model, prefix: KVPrefix, kind: str, size: int, batch: int
) -> Decoding:
    if kind == OWN:
        return Decoding(model, None, batch, size, settings.steps)
    return Decoding(model, prefix, batch, settings.own_tokens, settings.steps)


def _best_batch(
    settings: CacheSweepSettings, model: Model, prefix: KVPrefix, kind: str, size: int, batches: list[int]
) -> int:
    """The batch with the best speed: the batch grows until the speed falls."""
    best, speed = batches[0], 0.0
    with Bar(3 * len(batches), f"{NAME} {size} slots, batch of {kind}") as tick:
        for batch in batches:
            found = _single_speed(settings, model, prefix, kind, size, batch, tick)
            if found < 0.9 * speed:
                break
            if found > speed:
                best, speed = batch, found
    return best


def _single_speed(
    settings: CacheSweepSettings,
    model: Model,
    prefix: KVPrefix,
    kind: str,
    size: int,
    batch: int,
    tick: Callable[[str], None],
) -> float:
    """Tokens a second of one warm round.

    A function, so that one batch's cache is freed before the next is allocated.
    """
    name = f"{kind} {batch}"
    times = interleaved({name: _decoding(settings, model, prefix, kind, size, batch)}, repeats=1, on_progress=tick)
    return times[name].per_second(batch * settings.steps)


def _row(
    settings: CacheSweepSettings,
    model: Model,
    kind: str,
    size: int,
    batch: int,
    times: Times,
    machine: dict[str, Any],
) -> dict[str, Any]:
    own = (size if kind == OWN else settings.own_tokens) + settings.steps / 2
    shared = size if kind == SHARED else 0
    flops = decode_flops(model.config, batch, shared + own)
    read = decode_bytes(model.config, model.params, model.dtype, batch, shared, own)
    at_least = settings.steps * step_seconds_at_least(flops, read, machine)
    return {
        "kind": kind,
        "slots": size,
        "batch": batch,
        "value": times.per_second(batch * settings.steps),
        "peers": {},
        "ratio": {},
        "fraction_of_limit": at_least / times.median,
        "limit": batch * settings.steps / at_least,
        "bound_by": BANDWIDTH if read / machine["bandwidth_gb_s"] > flops / machine["matmul_gflops"] else MATMUL,
        "kv_gib": kv_bytes_per_token(model.config, model.dtype) * (shared + batch * (own + settings.steps / 2)) / 2**30,
        "seconds": list(times.seconds),
    }


def _gain(rows: list[dict[str, Any]], kind: str, small: int, large: int) -> dict[str, float] | None:
    """The speed of the small cache over that of the large one, measured and as the limits allow; None without one."""
    found = {row["slots"]: row for row in rows if row["kind"] == kind}
    if small not in found or large not in found:
        return None
    measured, allowed = (found[small][name] / found[large][name] for name in ("value", "limit"))
    return {"measured": measured, "limits_allow": allowed, "reached": measured / allowed}
