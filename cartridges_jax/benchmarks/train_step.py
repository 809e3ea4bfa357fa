"""One distillation step, in target tokens per second, against transformers + PEFT's cartridge.

Both sides train the same cartridge of the same model on the same conversations, with the
same targets, loss, clipping and optimizer. Ours packs the conversations into rows as the
trainer does; the peer pads its batch to the longest of them. Both pay for preparing the
batch.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cartridges_jax.benchmarks import figures, memory
from cartridges_jax.benchmarks.inputs import (
    COMMON,
    OURS,
    Common,
    config_dict,
    make_conversations,
    read_conversations,
    read_model,
    read_variants,
)
from cartridges_jax.benchmarks.machine import CEILINGS, Ceilings, flops_per_second, multiplied_in
from cartridges_jax.benchmarks.peers import TRANSFORMERS, hugging_face
from cartridges_jax.benchmarks.results import Result, say_absent
from cartridges_jax.benchmarks.rounds import (
    absent_peers,
    compared,
    compared_variants,
    durations,
    keeping,
    take_turns_with_ceilings,
)
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.corpus import read_corpus
from cartridges_jax.data.examples import Example, render_examples
from cartridges_jax.data.packing import PackingPlan, plan_packing
from cartridges_jax.distill.learner import make_learner
from cartridges_jax.distill.settings import TrainSettings, learning_rate, make_optimizer
from cartridges_jax.distill.step import init_state, train_step
from cartridges_jax.errors import UserError
from cartridges_jax.models import Model
from cartridges_jax.models.costs import distillation_flops
from cartridges_jax.prefixes.first_tokens import initialise_from_first_tokens

NAME = "train_step"


@dataclasses.dataclass(frozen=True)
class TrainStepSettings:
    """The settings of the measurement.

    Attributes:
      slots: P, one setting each; the first gives the headline.
      dtype: dtype of cartridges_jax.
      variants: storage of our weights in further measurements ("bfloat16", "int8").
      peer_dtypes: dtypes of the peer.
      conversations: study directory of a finished run; "" generates conversations.
      num_conversations: number of conversations to generate.
      steps_per_round: different batches in a measured round.
      measure_memory: also run each side by itself in a process of its own.
      num_frozen: first slots that do not learn.
      train: the trainer's settings; rows, lengths and rates are used.
    """

    common: Common
    slots: tuple[int, ...]
    dtype: str
    variants: tuple[str, ...]
    peer_dtypes: tuple[str, ...]
    conversations: str
    num_conversations: int
    steps_per_round: int
    measure_memory: bool
    num_frozen: int
    train: TrainSettings

    def check(self) -> None:
        """Raises UserError for a value that the benchmark cannot use."""
        if not self.slots or min(self.slots) <= self.num_frozen:
            raise UserError(f"slots={self.slots}: give sizes above num_frozen={self.num_frozen}")
        if self.steps_per_round < 1 or self.num_conversations < 1:
            raise UserError("steps_per_round and num_conversations must be 1 or more")
        self.train.check()


def default_config():
    """The defaults that experiments override."""
    return config_dict(NAME, TrainStepSettings(
        common=COMMON,
        slots=(128, 512),
        dtype="float32",
        variants=("bfloat16",),
        peer_dtypes=("float32", "bfloat16"),
        conversations="",
        num_conversations=48,
        steps_per_round=1,
        measure_memory=True,
        num_frozen=1,
        train=TrainSettings(steps=140, schedule="constant", warmup_steps=0, final_fraction=1.0),
    ))  # fmt: skip


class Ours:
    """Our trainer's step, one batch after the other."""

    def __init__(self, model: Model, prefix: KVPrefix, plan: PackingPlan, settings: TrainStepSettings):
        self._model, self._plan, self._settings = model, plan, settings
        self._optimizer = make_optimizer(settings.train.clip_norm)
        # The peer's rate is constant too.
        self._rate = learning_rate(settings.train, settings.train.warmup_steps)
        self._learner = make_learner(settings.train.learner, num_frozen=settings.num_frozen)
        self._frozen, trainable = self._learner.init(model, prefix)
        self._mask = self._learner.mask(self._frozen, trainable)
        # Committed to the device, as what the step returns is: else the second step compiles again.
        self.state = jax.device_put(init_state(trainable, self._optimizer), jax.devices()[0])

    def step(self, batch: int) -> float:
        """One optimizer step on a batch of the plan; returns the loss."""
        train = self._settings.train
        self.state, metrics = train_step(
            self._model.config, self._optimizer, self._learner, self._model.params, self._frozen, self._mask,
            self.state, self._plan.batch(batch), self._rate, tail=train.tail, remat=train.remat,
        )  # fmt: skip
        return float(metrics["loss"])

    def round(self) -> list[float]:
        return [self.step(batch) for batch in range(len(self._plan.steps))]


def members(plan: PackingPlan) -> list[list[Example]]:
    """The conversations of every step, as the peer is given them."""
    return [[plan.examples[i] for row in rows for i in row] for rows in plan.steps]


def peer_round(trainer: Any, batches: Sequence[Sequence[Example]]) -> Callable[[], list[float]]:
    return lambda: [trainer.step(batch) for batch in batches]


def plan_of(examples: list[Example], settings: TrainStepSettings) -> PackingPlan:
    train = settings.train
    return plan_packing(
        examples, num_steps=settings.steps_per_round, rows_per_step=train.rows_per_step, row_tokens=train.row_tokens,
        micro_batches=train.micro_batches, seed=settings.common.seed,
    )  # fmt: skip


def examples_of(model: Model, settings: TrainStepSettings, workdir: Path) -> list[Example]:
    """The conversations that fit a row, rendered."""
    if settings.conversations:
        conversations = read_conversations(settings.conversations)
    else:
        common = settings.common
        directory = workdir / "study" / f"{settings.num_conversations}-{common.seed}-{model.source_sha256[:8]}"
        document = read_corpus(common.document).documents[0]
        conversations = make_conversations(model, document, directory, settings.num_conversations, common.seed)
    examples = [e for c in conversations for e in render_examples(c, model.chat, targets=settings.train.targets)]
    return [example for example in examples if len(example.tokens) <= settings.train.row_tokens]


def run(settings: TrainStepSettings, workdir: Path) -> Result:
    """Measures every P; writes the figure."""
    common, train = settings.common, settings.train
    models = read_variants(common, settings.dtype, settings.variants)
    model = models[OURS]
    document = read_corpus(common.document).documents[0]
    examples = examples_of(model, settings, workdir)
    plan = plan_of(examples, settings)
    batches = members(plan)
    missing = absent_peers(common, TRANSFORMERS)
    say_absent(missing)
    theirs = _load_peers(settings, model, workdir) if common.peers and not missing else {}
    tokens = train.rows_per_step * train.row_tokens
    ceilings = Ceilings(model.config, tokens, plan.num_targets * train.micro_batches)
    prefixes = (initialise_from_first_tokens(model, document.text, num_slots) for num_slots in settings.slots)
    rows, machines = zip(*(_row(settings, models, theirs, plan, prefix, ceilings, workdir) for prefix in prefixes))
    result = Result(
        benchmark=NAME,
        unit="target tokens/s",
        rows=list(rows),
        machine=machines[0],
        absent=missing,
        more={
            "conversations": sum(map(len, batches)),
            "target_tokens": sum(_num_targets(batch) for batch in batches),
            "tokens": sum(len(example.tokens) for batch in batches for example in batch),
            "packed_tokens": settings.steps_per_round * tokens,
            "padded_tokens": sum(len(batch) * max(len(e.tokens) for e in batch) for batch in batches),
            "length_histogram": dict(sorted(collections.Counter(len(e.tokens) for e in examples).items())),
            "repeats": common.repeats,
        },
    )
    figures.train_step(result, workdir / f"{NAME}.png")
    return result


def _num_targets(batch: Sequence[Example]) -> int:
    return sum(len(example.rows) for example in batch)


def _load_peers(settings: TrainStepSettings, model: Model, workdir: Path) -> dict[str, Any]:
    """The peer's frozen models by name, which ends in the dtype."""
    from cartridges_jax.benchmarks.peers import transformers_peft

    transformers_peft.use_threads(settings.common.threads)
    float_model = model if settings.dtype == "float32" else read_model(settings.common)
    directory = hugging_face.export(float_model, workdir / "hugging_face")
    return {f"{TRANSFORMERS} {dtype}": transformers_peft.load(directory, dtype) for dtype in settings.peer_dtypes}


def _peer_rounds(
    settings: TrainStepSettings, theirs: dict[str, Any], batches: Sequence[Sequence[Example]], prefix: KVPrefix
) -> dict[str, Callable[[], list[float]]]:
    if not theirs:
        return {}
    from cartridges_jax.benchmarks.peers import transformers_peft

    arrays = [np.asarray(x, np.float32) for x in (prefix.keys, prefix.values)]
    rounds = {}
    for name, frozen in theirs.items():
        wrapped = transformers_peft.with_cartridge(frozen, *arrays, settings.num_frozen, trained=True)
        trainer = transformers_peft.Trainer(
            wrapped, learning_rate=settings.train.learning_rate, clip_norm=settings.train.clip_norm
        )
        rounds[name] = peer_round(trainer, batches)
    return rounds


def _row(
    settings: TrainStepSettings,
    models: dict[str, Model],
    theirs: dict[str, Any],
    plan: PackingPlan,
    prefix: KVPrefix,
    ceilings: Ceilings,
    workdir: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All sides on one cartridge, in turns: the row, and the machine's ceilings."""
    config, num_slots, batches = models[OURS].config, prefix.num_slots, members(plan)
    rounds = {name: Ours(model, prefix, plan, settings).round for name, model in models.items()}
    rounds |= _peer_rounds(settings, theirs, batches, prefix)
    losses: dict[str, list[float]] = {}
    times, machine = take_turns_with_ceilings(
        f"{NAME} P={num_slots}", {name: keeping(losses, name, call) for name, call in rounds.items()}, ceilings,
        repeats=settings.common.repeats,
    )  # fmt: skip
    flops = sum(
        distillation_flops(config, [len(e.tokens) for e in batch], _num_targets(batch), num_slots) for batch in batches
    )
    fractions = {
        name: flops / times[name].median / flops_per_second(machine, multiplied_in(model.params))
        for name, model in models.items()
    }
    num_targets = sum(_num_targets(batch) for batch in batches)
    row = {
        "slots": num_slots,
        **compared(times, list(theirs), num_targets),
        "fraction_of_limit": fractions[OURS],
        "variants": compared_variants(
            times, [name for name in models if name != OURS], list(theirs), num_targets, fractions
        ),
        "gflop_per_round": flops / 1e9,
        **durations(times),
        "first_losses": {name: values[0] for name, values in losses.items()},
        "machine": {name: machine[name] for name in CEILINGS},
    }
    if settings.measure_memory:
        kept_as = dict(zip(models, ("", *settings.variants), strict=True))
        used = [example for batch in batches for example in batch]
        row["peak_bytes"] = _peaks(settings, workdir, used, prefix, kept_as, list(theirs))
    return row, machine


def _peaks(
    settings: TrainStepSettings,
    workdir: Path,
    used: Sequence[Example],
    prefix: KVPrefix,
    kept_as: dict[str, str],
    rivals: Sequence[str],
) -> dict[str, int | None]:
    """Peak bytes of each side, weights and libraries included, in steady steps.

    Args:
      kept_as: storage of the weights by our sides' names.
      rivals: the peers' names, which end in their dtype.
    """
    data = workdir / "memory.npz"
    workdir.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{field}{i}": getattr(e, field) for i, e in enumerate(used) for field in ("tokens", "rows", "ids", "logprobs")
    }
    np.savez(data, keys=np.asarray(prefix.keys), values=np.asarray(prefix.values), count=len(used), **arrays)
    peaks = {}
    for name in (*kept_as, *rivals):
        task = {
            "side": "ours" if name in kept_as else "peer",
            "dtype": settings.dtype if name in kept_as else name.split(" ")[-1],
            "weights": kept_as.get(name, ""),
            "model": settings.common.model,
            "directory": str(workdir / "hugging_face"),
            "data": str(data),
            "threads": settings.common.threads,
            "num_frozen": settings.num_frozen,
            "train": dataclasses.asdict(settings.train),
        }
        peaks[name] = memory.peak_bytes("cartridges_jax.benchmarks.train_step_memory", task)
    data.unlink()
    return peaks
