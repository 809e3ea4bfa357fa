"""One side of `train_step` in a process of its own, which reports its peak memory: python -m … TASK (JSON)."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable

import numpy as np

from cartridges_jax.benchmarks import memory

_STEPS = 2


def main() -> None:
    task = json.loads(sys.argv[1])
    with np.load(task["data"]) as data:
        keys, values = data["keys"], data["values"]
        fields = ("tokens", "rows", "ids", "logprobs")
        examples = [{field: data[f"{field}{i}"] for field in fields} for i in range(int(data["count"]))]
    (_ours if task["side"] == "ours" else _peer)(task, keys, values, examples)
    memory.report_high_water_mark()


def _measured(step: Callable[[], object]) -> None:
    # Steps before the reset compile; their memory is not the step's.
    for _ in range(_STEPS):
        step()
    memory.reset_high_water_mark()
    for _ in range(_STEPS):
        step()


def _peer(task: dict, keys: np.ndarray, values: np.ndarray, examples: list[dict]) -> None:
    from cartridges_jax.benchmarks.peers import transformers_peft

    transformers_peft.use_threads(task["threads"])
    model = transformers_peft.load(task["directory"], task["dtype"])
    wrapped = transformers_peft.with_cartridge(model, keys, values, task["num_frozen"], trained=True)
    trainer = transformers_peft.Trainer(
        wrapped, learning_rate=task["train"]["learning_rate"], clip_norm=task["train"]["clip_norm"]
    )
    batch = [types.SimpleNamespace(**example) for example in examples]
    _measured(lambda: trainer.step(batch))


def _ours(task: dict, keys: np.ndarray, values: np.ndarray, examples: list[dict]) -> None:
    from cartridges_jax import cartridge
    from cartridges_jax.benchmarks.train_step import Ours
    from cartridges_jax.data.examples import Example
    from cartridges_jax.data.packing import plan_packing
    from cartridges_jax.distill.settings import TrainSettings
    from cartridges_jax.models import load_model

    train = TrainSettings(**task["train"])
    model = load_model(task["model"], dtype=task["dtype"], weights=task["weights"])
    plan = plan_packing(
        [Example.of(**example) for example in examples],
        num_steps=None,
        rows_per_step=train.rows_per_step,
        row_tokens=train.row_tokens,
        micro_batches=train.micro_batches,
    )
    settings = types.SimpleNamespace(train=train, num_frozen=task["num_frozen"])
    ours = Ours(model, cartridge.from_plain_tokens(keys, values), plan, settings)
    _measured(lambda: ours.step(0))


if __name__ == "__main__":
    main()
