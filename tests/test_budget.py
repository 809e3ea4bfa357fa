"""A run that fits a given time: what is decided, stored, followed and refused. No real time is measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil

import pytest
from tiny_runs import Collected, config_of, settings, talker_gguf, write_inputs  # noqa: F401

from cartridges_jax.distill.step import train_step
from cartridges_jax.errors import UserError
from cartridges_jax.pipeline import budget
from cartridges_jax.pipeline import run as pipeline
from cartridges_jax.pipeline.config import default_config, from_config_dict
from cartridges_jax.pipeline.pacing import (
    Estimate,
    Pace,
    fitting_steps,
    in_words,
    least_minutes,
    study_should_end,
    usable_seconds,
)

# About what the quickstart takes on two cores: 745 messages in batches of 32.
QUICKSTART = Estimate(study=280.0, train=200.0, evaluate=70.0, batch=12.0, conversations=522, steps=230)
LOADING = 10.0


def batches_until_the_end(minutes, seconds_per_batch=12.0, compiling=20.0):
    """Batches of a study with an even pace, until it should end."""
    for count in itertools.count(1):
        marks = [[n, compiling + n * seconds_per_batch] for n in range(1, count + 1)]
        if study_should_end(minutes, LOADING, marks, QUICKSTART):
            return count


# Decisions


def test_a_study_ends_later_the_larger_the_budget_is():
    counts = [batches_until_the_end(minutes) for minutes in (4, 5, 7, 10, 15, 20)]
    assert counts == sorted(set(counts))


def test_a_study_on_a_slower_machine_ends_with_fewer_batches():
    assert batches_until_the_end(10, seconds_per_batch=24.0) < batches_until_the_end(10) / 1.9


@pytest.mark.parametrize("minutes", [5, 10, 20])
@pytest.mark.parametrize("slowness", [0.7, 1.0, 1.4])
def test_the_parts_of_a_run_add_up_to_its_budget(minutes, slowness):
    """On a machine that is slower than estimated in everything, and whose evaluation and training compile as long as its study."""
    batch, compiling, step, heldout = 12 * slowness, 20.0, 200 / 230 * slowness, 2.0 * slowness
    batches = batches_until_the_end(minutes, batch, compiling)
    study = compiling + batches * batch
    evaluation = 70 * slowness + compiling
    trial = compiling + 4 * step + 2 * heldout
    left = usable_seconds(minutes) - LOADING - study - evaluation - trial
    steps = fitting_steps(left, step, heldout, 40, 20, 10_000)
    training = steps * step + (steps // 40 + 2) * heldout
    assert LOADING + study + trial + training + evaluation == pytest.approx(60 * minutes, rel=0.05)
    # Training and study keep the proportion of auto sizes.
    assert 0.7 * 200 / 280 < training / (batches * batch) < 1.3 * 200 / 280


def test_the_pace_is_that_of_the_batches_after_the_one_that_compiles():
    pace = Pace.of([[1, 50.0], [2, 74.0], [3, 98.0]], QUICKSTART)
    assert pace == Pace(compiling=26.0, batch=24.0, ratio=2.0)
    assert pace.evaluation(QUICKSTART) == pytest.approx(2 * 70 + 26)
    assert Pace.of([[2, 48.0]], QUICKSTART) == Pace(compiling=0.0, batch=24.0, ratio=2.0)


def test_steps_are_what_fits_with_the_held_out_losses_within_bounds():
    assert fitting_steps(100.0, 1.0, 0.0, 40, 20, 500) == 100
    assert fitting_steps(100.0, 1.0, 4.0, 40, 20, 500) == int((100 - 8) / 1.1)
    assert fitting_steps(-5.0, 1.0, 4.0, 40, 20, 500) == 20
    assert fitting_steps(5000.0, 1.0, 4.0, 40, 20, 500) == 500
    assert fitting_steps(0.0, 1.0, 4.0, 40, 20, 12) == 12


def test_the_smallest_budget_grows_with_loading_evaluation_and_what_is_held_out():
    least = least_minutes(QUICKSTART, LOADING, 24, 22.4)
    assert least_minutes(QUICKSTART, LOADING + 60, 24, 22.4) == pytest.approx(least + 1, abs=0.15)
    more = dataclasses.replace(QUICKSTART, evaluate=190.0)  # half of an estimate is certain
    assert least_minutes(more, LOADING, 24, 22.4) == pytest.approx(least + 1, abs=0.15)
    assert least_minutes(QUICKSTART, LOADING, 200, 22.4) > least
    # The quickstart in five minutes must be possible.
    assert least < 5


def test_the_cost_in_quality_is_said_in_numbers():
    assert in_words(5, 128, 60, QUICKSTART, 231) == (
        "budget of 5 minutes: 128 conversations instead of 522 and 60 steps instead of 231; expect a lower kl_closed"
    )
    assert in_words(30, 680, 400, QUICKSTART, 231).endswith("expect kl_closed as with auto sizes, or higher")


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget_minutes": -1.0}, "budget_minutes=-1.0: must be above 0"),
        ({"budget_minutes": float("inf")}, "budget_minutes=inf: must be above 0"),
        ({"budget_minutes": 5.0, "study.conversations": 99}, "budget_minutes=5 decides study.conversations=99"),
        ({"budget_minutes": 5.0, "train.steps": 7}, "train.steps=7: leave both 0"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(changes, words):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(words)):
        from_config_dict(config)


# Runs


class Clock:
    """Passes `seconds` with every reading."""

    def __init__(self, seconds=4.0):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        self.now += self.seconds
        return self.now


class Halt(BaseException):
    pass


@pytest.fixture
def started(talker_gguf, tmp_path, monkeypatch):  # noqa: F811
    """Runs the talker with a budget on a machine of a known rate: (what was said, the report)."""
    write_inputs(tmp_path)
    # The tiny model's counted operations take seconds at this rate.
    monkeypatch.setattr(budget, "measured_flops", lambda *args: 1e8)

    def start(minutes, workdir="run", *, seconds=4.0, **changes):
        monkeypatch.setattr(budget, "monotonic", Clock(seconds))
        said = []
        small = {
            "study__conversations": 0,
            "train__steps": 0,
            "study__asks_per_sentence": 3.0,
            "budget_minutes": minutes,
        }
        config = config_of(settings(talker_gguf, tmp_path, **small | changes))
        return said, pipeline.run(config, tmp_path / workdir, reporter=Collected(said))

    return start


def decisions(workdir):
    """Per study: (batches or None, steps of its trainings)."""
    plan = json.loads((workdir / "plan.json").read_text())
    return [
        (entry.get("batches"), [found["steps"] for found in entry["steps"].values()])
        for entry in plan["studies"].values()
    ]


def test_a_run_stores_its_plan_and_follows_it_when_it_is_started_again(started, tmp_path):
    compiled = train_step._cache_size()
    said, report = started(2.0)
    # The trial's program is the training's.
    assert train_step._cache_size() <= compiled + 1
    plan = (tmp_path / "run" / "plan.json").read_text()
    ((batches, (steps,)),) = decisions(tmp_path / "run")
    assert report["steps"] == steps and report["config"]["train"]["steps"] == steps
    kept = report["study"]["conversations"]
    assert report["study"]["asked"] == kept == report["config"]["study"]["conversations"]
    assert any(
        line.startswith(f"budget of 2 minutes: {kept} conversations instead of 64 and {steps} steps instead of ")
        for line in said
    )
    assert batches and len(list((tmp_path / "run" / "study").glob("*/shard-*.parquet"))) == batches

    # A machine with another pace, or load, changes nothing any more.
    said, again = started(2.0, seconds=60.0)
    assert [f"{stage}: nothing changed, skipped" in said for stage in ("study", "train", "evaluate")] == [True] * 3
    assert (tmp_path / "run" / "plan.json").read_text() == plan
    assert again["conditions"] == report["conditions"]
    # What was measured before training is what an evaluation after it measures.
    shutil.rmtree(tmp_path / "run" / "evaluate")
    assert started(2.0)[1]["conditions"] == report["conditions"]


def test_a_larger_budget_studies_and_trains_more_in_stages_of_its_own(started, tmp_path):
    _, first = started(2.0)
    said, second = started(6.0)
    assert second["study"]["conversations"] > first["study"]["conversations"]
    assert second["steps"] > first["steps"]
    assert any("study: runs again, changed: budget_minutes 2.0 -> 6.0" in line for line in said)
    assert len(decisions(tmp_path / "run")) == 2


def test_a_run_that_was_stopped_in_its_study_ends_it_by_the_stored_marks(started, tmp_path, monkeypatch):
    decided = budget.study_should_end
    asked = []

    def stops(minutes, loading, marks, estimate):
        asked.append(len(marks))
        if len(marks) == 2 and asked.count(2) == 1:
            raise Halt
        return decided(minutes, loading, marks, estimate)

    monkeypatch.setattr(budget, "study_should_end", stops)
    with pytest.raises(Halt):
        started(2.0)
    (shards,) = (tmp_path / "run" / "study").iterdir()
    before = {path.name: path.read_bytes() for path in shards.glob("shard-*")}
    _, report = started(2.0)
    assert {name: (shards / name).read_bytes() for name in before} == before
    assert asked[:3] == [1, 2, 2] and report["study"]["conversations"] >= 3 + 8


def test_a_budget_that_is_too_small_names_the_smallest_that_works_before_any_study(started, tmp_path):
    with pytest.raises(
        UserError, match=r"budget_minutes=0.2 is too short .* give budget_minutes=([\d.]+) or more"
    ) as error:
        started(0.2)
    assert not list((tmp_path / "run").rglob("shard-*")) and not (tmp_path / "run" / "plan.json").exists()
    least = float(re.search(r"give budget_minutes=([\d.]+)", str(error.value))[1])
    with pytest.raises(UserError, match="too short"):
        started(least - 0.2)
    # Loading is measured anew, and the clock counts readings.
    _, report = started(least)
    assert report["steps"] >= 1


def test_a_finished_study_without_its_plan_is_refused(started, tmp_path):
    started(2.0)
    (tmp_path / "run" / "plan.json").unlink()
    with pytest.raises(UserError, match="plan.json lacks the plan of .*: restore it, or delete that directory"):
        started(2.0)
