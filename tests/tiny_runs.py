"""Whole runs with a tiny model: one that writes usable messages, a document it can be about, small settings.

The random model of `tiny.py` writes mostly unusable text, so self-study would keep nothing of it. The talker is
the same architecture with the same random layers, but its head all but rules out every token except a few words,
"?" and the ends of a line and a turn, which follow a "?". What it says still depends on all that it has read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import CONTROL_TOKENS, gguf_tensors, random_weights, tiny_config, vocabulary, write_gguf

from cartridges_jax.pipeline.config import RunConfig, default_config, from_config_dict
from cartridges_jax.pipeline.reporting import Reporter
from cartridges_jax.pipeline.run import run

ROOT = Path(__file__).parents[1]

WORDS = ("Ġt", "Ġs", "Ġw", "Ġc", "Ġb", "Ġf", "Ġo", "Ġand")
# Every sentence holds enough of the talker's words for its messages to be about it.
DOCUMENT = (
    "# The sheds\n\n"
    + " ".join(f"Shed {n} has t and s, w and c, b and f." for n in range(1, 9))
    + "\n\n## The boats\n\n"
    + " ".join(f"Boat {n} sails with c and o, s and t, w and b." for n in range(1, 5))
    + "\n"
)
QUESTIONS = (
    '{"question": "What has shed 4?", "answers": ["Shed 4 has t and s.", "t and s"]}\n'
    '{"question": "What sails with boat 2?", "answers": ["c and o"]}\n'
)

# Small enough for a run of seconds, with every stage and several batches, rows and checkpoints.
SMALL = {
    # The same on every processor.
    "weights": "",
    "heldout": 3,
    "cartridge.num_slots": 24,
    "study.conversations": 18,
    "study.requests_per_batch": 10,
    "study.chunk_min_tokens": 80,
    "study.chunk_max_tokens": 160,
    # One family: every family has a prefix of its own to compile for.
    "study.families.generic": 1.0,
    **{
        f"study.families.{name}": 0.0
        for name in ("qa", "question", "use_case", "summarization", "structuring", "creative")
    },
    "study.writer_temperature": 1.0,
    "study.writer_max_tokens": 12,
    "study.answer_temperature": 1.0,
    "study.answer_max_tokens": 12,
    "study.top_logprobs": 4,
    "train.steps": 12,
    "train.rows_per_step": 2,
    "train.row_tokens": 96,
    "train.warmup_steps": 2,
    "train.eval_every": 4,
    "train.checkpoint_every": 5,
    "evaluation.max_answer_tokens": 8,
}


class Collected(Reporter):
    """Collects a run's messages in a list."""

    def __init__(self, said: list[str]):
        self.said = said

    def say(self, text: str) -> None:
        self.said.append(text)


def write_talker(path: Path, *, seed: int = 0) -> Path:
    """A GGUF file of a tiny model that writes short messages of `WORDS`, most of them questions."""
    config = tiny_config(tie_embeddings=False)
    weights = random_weights(config, seed)
    tokens = vocabulary()
    embedding, norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
    # One constant coordinate: the head reads a bias from it.
    embedding[:, 0], norm[0] = 3.0, 1.0
    head = 0.1 * weights["lm_head.weight"]
    head[:, 0] = -9.0
    spoken = [tokens.index(token) for token in (*WORDS, "?", "Ċ", CONTROL_TOKENS[2])]
    head[spoken] = 0.4 * weights["lm_head.weight"][spoken]
    head[spoken, 0] = 0.0
    # A "?" ends the line or the turn, and nothing else does.
    for end in spoken[-2:]:
        head[end] = 2.0 * norm * embedding[tokens.index("?")]
        head[end, 0] = -5.0
    weights["lm_head.weight"] = head.astype(np.float32)
    return write_gguf(Path(path), config, gguf_tensors(weights, config))


@pytest.fixture(scope="session")
def talker_gguf(tmp_path_factory) -> Path:
    """The talker's file."""
    path = tmp_path_factory.getbasetemp() / "talker.gguf"
    return path if path.exists() else write_talker(path)


@pytest.fixture(scope="session")
def finished(talker_gguf, tmp_path_factory) -> Path:
    """A directory with `doc.md`, `questions.jsonl` and the workdir `run` of a finished run; copied, never changed.

    Found again by the other files that import this fixture and run in the same process.
    """
    directory = tmp_path_factory.getbasetemp() / "finished"
    if not directory.exists():
        directory.mkdir()
        write_inputs(directory)
        run(config_of(settings(talker_gguf, directory)), directory / "run")
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished workdir."""
    return shutil.copytree(finished / "run", tmp_path / "copied")


def write_inputs(directory: Path) -> None:
    (directory / "doc.md").write_text(DOCUMENT)
    (directory / "questions.jsonl").write_text(QUESTIONS)


def settings(model: Path | str, inputs: Path, **overrides) -> dict:
    """Dotted field to value: `SMALL`, this model, these inputs, and what a test changes (`train__steps=3`)."""
    values = {"model": str(model), "corpus": str(inputs / "doc.md"), "questions": str(inputs / "questions.jsonl")}
    return SMALL | values | {name.replace("__", "."): value for name, value in overrides.items()}


def config_of(values: dict) -> RunConfig:
    """The typed config of such settings."""
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return from_config_dict(config)


def command(values: dict, workdir: Path | str, *more: str) -> list[str]:
    """The same settings as a command line of launch/train.py."""
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--config={ROOT / 'experiments' / 'quickstart.py'}",
        f"--workdir={workdir}", *flags, *more,
    ]  # fmt: skip


def environment(cache: Path | None = None) -> dict[str, str]:
    """One computing thread a process, and compiled programs shared between processes through `cache`."""
    env = {**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
    if cache is not None:
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    return env


def finish(arguments: list[str], *, cache: Path | None = None, timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs a program to its end."""
    return subprocess.run(
        arguments,
        env=environment(cache),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def start(arguments: list[str], cache: Path | None = None) -> subprocess.Popen:
    """Starts a program, to be disturbed."""
    return subprocess.Popen(
        arguments,
        env=environment(cache),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(process: subprocess.Popen, true: Callable[[], bool], seconds: float = 600) -> None:
    """Raises AssertionError, with what the program wrote on stderr, if it ends first or takes longer."""
    end = time.monotonic() + seconds
    while not true():
        if process.poll() is not None or time.monotonic() > end:
            # Not killed: a launcher has to end its processes.
            process.terminate()
            raise AssertionError(process.communicate(timeout=200)[1][-2000:])
        time.sleep(0.005)


def contents(directory: Path, *names: str) -> dict[str, str]:
    """Every file below a directory (or below these parts of it) by its hash, but for the lock, which every run marks."""
    roots = [directory / name for name in names] if names else [directory]
    files = sorted(
        file
        for root in roots
        for file in ([root] if root.is_file() else root.rglob("*"))
        if file.is_file() and file.name != ".lock"
    )
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
