"""The quickstart from end to end on the real model, with as little of everything as still learns something."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONDITIONS = ("none", "first_tokens", "whole_text", "cartridge")
MEASURES = (
    "answer_nll",
    "teacher_kl",
    "heldout_kl",
    "own_nll",
    "facts",
    "f1",
    "exact_match",
    "prefix_tokens",
    "kv_bytes",
)


def program(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / name), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    settings = {
        "heldout": 4, "cartridge.num_slots": 64, "study.conversations": 24, "study.requests_per_batch": 48,
        "study.families.qa": 1.0, "study.families.question": 0.0, "study.families.summarization": 0.0,
        "study.writer_max_tokens": 16, "study.answer_max_tokens": 16, "train.steps": 8, "train.rows_per_step": 2,
        "train.warmup_steps": 1, "train.learning_rate": 0.02, "train.eval_every": 8, "evaluation.max_questions": 4,
        "evaluation.max_answer_tokens": 16, "train.row_tokens": 96,
    }  # fmt: skip
    done = program(
        "train.py",
        "--config=experiments/quickstart.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return workdir


@pytest.fixture(scope="module")
def report(workdir):
    return json.loads((workdir / "report.json").read_text())


def test_the_report_has_every_key_it_promises(report):
    for path in (
        "model", "corpus.tokens", "cartridge.tokens", "cartridge.bytes", "kl_closed", "gap_closed", "facts",
        "dropped_training_questions", "seconds.synthesis", "seconds.training", "seconds.evaluation", "seconds.total",
        "conversations", "steps", *(f"conditions.{name}.{measure}" for name in CONDITIONS for measure in MEASURES),
    ):  # fmt: skip
        value = report
        for key in path.split("."):
            assert key in value, path
            value = value[key]
        assert value is not None or path in report["reasons"], path
    assert report["model"] == "smollm2-135m-instruct" and report["steps"] == 8
    assert report["cartridge"]["tokens"] == 64 and len(report["answers"]) == 4
    # 30 layers, 3 key/value heads of width 64, float32.
    assert report["cartridge"]["bytes"] == 64 * 2 * 30 * 3 * 64 * 4
    assert report["conversations"] == 24 - 4 - report["dropped_training_questions"]


def test_the_cartridge_is_nearer_to_the_whole_document_than_no_document_is(report):
    kl = {name: report["conditions"][name]["teacher_kl"] for name in CONDITIONS}
    assert kl["whole_text"] == 0 and kl["cartridge"] < kl["none"]
    assert report["kl_closed"] == pytest.approx(1 - kl["cartridge"] / kl["none"])
    before, *_, after = (entry["loss"] for entry in report["history"]["heldout"])
    assert after < before


def test_the_page_needs_nothing_from_elsewhere(workdir):
    page = (workdir / "report.html").read_text()
    assert "<html" in page and "smollm2-135m-instruct" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert not re.search(r"@import|url\((?!['\"]?(?:data:|#))", page)


def test_a_chat_answers_from_the_cartridge(workdir):
    done = program("chat.py", f"--cartridge={workdir / 'cartridge'}", "--prompt=Which island is it?", "--max_tokens=16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
