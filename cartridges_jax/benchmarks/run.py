"""Benchmarks by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import ml_collections

from cartridges_jax.benchmarks import inputs, results
from cartridges_jax.errors import UserError
from cartridges_jax.typed_config import config_values

# The settings' class by name; the module has the benchmark's name.
BENCHMARKS = {
    "train_step": "TrainStepSettings",
    "decode": "DecodeSettings",
    "self_study": "SelfStudySettings",
    "cache_sweep": "CacheSweepSettings",
}


def default_config(name: str) -> ml_collections.ConfigDict:
    """The settings of the benchmark `name`, one of `BENCHMARKS`."""
    return importlib.import_module(f"cartridges_jax.benchmarks.{name}").default_config()


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the benchmark that a config names; writes its JSON and PNG, prints the JSON as the last line.

    Raises:
      UserError: an unknown benchmark, or bad settings.
    """
    name = config_values(config).get("benchmark")
    if name not in BENCHMARKS:
        raise UserError(f"config.benchmark={name!r}: choose one of {', '.join(BENCHMARKS)}")
    module = importlib.import_module(f"cartridges_jax.benchmarks.{name}")
    settings = inputs.settings_of(getattr(module, BENCHMARKS[name]), config)
    workdir.mkdir(parents=True, exist_ok=True)
    record = results.write(module.run(settings, workdir), workdir)
    print(results.one_line(record), flush=True)
    return record
