"""Tasks and conditions by name. The model is a tiny one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_evaluation import DOCUMENT, NUM_SLOTS, QUESTIONS, SETTINGS, corpus_of, heldout, prefixes, tasks_of  # noqa: F401
from tiny import random_prefix

from cartridges_jax.corpus.questions import Question
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation import conditions as evaluation_conditions
from cartridges_jax.evaluation.conditions import Condition, make_conditions
from cartridges_jax.evaluation.evaluate import EvaluationSettings, evaluate
from cartridges_jax.evaluation.results import SHOWN_ANSWERS
from cartridges_jax.evaluation.tasks import TASKS, Example, Metric, TaskInputs, make_tasks, register
from cartridges_jax.prefixes.first_tokens import initialise_from_first_tokens


class Vowels:
    """A task of its own: prompts without references, and a score of its own."""

    name = "vowels"
    metrics = (Metric("vowels", "Vowels", aggregate="sum", format="count"), Metric("f1", "Their F1"))

    def __init__(self, inputs, argument="tins"):
        content = f"Say something of {argument} in {inputs.corpus.name}."
        self.examples = (Example("only", ({"role": "user", "content": content},)),)

    def score(self, example, answer):
        return {"vowels": sum(map(answer.lower().count, "aeiou")), "f1": 0.5}


@pytest.fixture
def vowels(monkeypatch):
    monkeypatch.setitem(TASKS, "vowels", Vowels)


def test_a_task_of_its_own_is_chosen_by_name_and_its_metrics_are_listed(tiny_model, prefixes, vowels):
    inputs = TaskInputs(corpus_of(tiny_model), QUESTIONS[:1])
    tasks = make_tasks(("questions", "vowels:brooms"), inputs)
    found = evaluate(tiny_model, prefixes, tasks, SETTINGS)
    names = [metric["name"] for metric in found.metric_list]
    assert "vowels" in names and "f1" in names and "f1_vowels" in names and "own_nll_vowels" in names
    (row,) = (row for row in found.rows if row["task"] == "vowels" and row["condition"] == "cartridge")
    assert row["question"] == "Say something of brooms in sheds." and row["teacher_kl_tokens"] > 0
    assert found.conditions["cartridge"]["vowels"] == sum(map(row["answer"].lower().count, "aeiou"))
    assert found.conditions["cartridge"]["f1_vowels"] == 0.5
    alone = evaluate(tiny_model, prefixes, tasks[:1], SETTINGS)
    for measure in ("teacher_kl", "own_nll", "f1"):
        assert found.conditions["none"][measure] == pytest.approx(alone.conditions["none"][measure], rel=1e-4)
    assert [answer["task"] for answer in found.answers] == ["questions", "vowels"]


def test_scores_without_a_metric_are_refused(tiny_model, prefixes):
    task = Vowels(TaskInputs(corpus_of(tiny_model)))
    task.metrics = ()
    with pytest.raises(ValueError, match="task 'vowels' returns the score 'f1'"):
        evaluate(tiny_model, prefixes, [task], SETTINGS)


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="already an evaluation task 'questions'"):
        register("questions")(Vowels)


def test_fewer_conditions_are_enough_and_a_missing_baseline_has_a_reason(tiny_model, prefixes):
    tasks = tasks_of(tiny_model, QUESTIONS[:1])
    three = [condition for condition in prefixes if condition.name != "first_tokens"]
    found = evaluate(tiny_model, three, tasks, SETTINGS)
    assert list(found.conditions) == ["none", "whole_text", "cartridge"] and found.headline["kl_closed"] is not None
    # The judge is shown last.
    assert [condition["name"] for condition in found.condition_list] == ["none", "cartridge", "whole_text"]
    found = evaluate(tiny_model, three[1:], tasks, SETTINGS)
    assert found.headline["kl_closed"] is None and "'none' was not evaluated" in found.reasons["kl_closed"]
    with pytest.raises(UserError, match="add 'whole_text'"):
        evaluate(tiny_model, [three[0], three[2]], tasks, SETTINGS)


def test_an_extra_condition_is_measured_like_the_others(tiny_model, rng, prefixes):
    extra = Condition("made_up", random_prefix(rng, tiny_model.config, 5), "Made up")
    found = evaluate(tiny_model, [*prefixes, extra], tasks_of(tiny_model, QUESTIONS[:1]), SETTINGS)
    assert set(found.conditions["made_up"]) == set(found.conditions["none"])
    assert found.conditions["made_up"]["prefix_tokens"] == 5
    assert {"name": "made_up", "title": "Made up", "role": ""} in found.condition_list


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conditions": ("none", "cartridge")}, "lacks the judge: add 'whole_text'"),
        ({"conditions": ("whole_text", "nonsense")}, "'nonsense'"),
        ({"conditions": ("none", "none", "whole_text")}, "different names"),
        ({"tasks": ("exam",)}, "evaluation task 'exam': choose among heldout, questions"),
        ({"tasks": ()}, "one or more"),
        ({"max_answer_tokens": 0}, "max_answer_tokens=0"),
        ({"max_questions": -1}, "max_questions=-1"),
    ],
)
def test_settings_that_no_evaluation_could_use_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(EvaluationSettings(), **changes).check()


def test_names_may_be_a_list_or_separated_by_commas():
    chosen = ("none", "whole_text", "summary:64")
    for given in (list(chosen), "none, whole_text,summary:64", ("none,whole_text", "summary:64")):
        assert EvaluationSettings(conditions=given).conditions == chosen


def test_many_answers_are_all_in_the_rows_and_some_are_shown(tiny_model, prefixes):
    questions = [Question(f"What is in shed {n}?", ("paint",)) for n in range(SHOWN_ANSWERS + 2)]
    short = dataclasses.replace(SETTINGS, max_answer_tokens=2)
    found = evaluate(tiny_model, prefixes[:3], tasks_of(tiny_model, questions), short)
    assert len(found.answers) == SHOWN_ANSWERS and len(found.rows) == 3 * (SHOWN_ANSWERS + 2)
    assert len({row["example_id"] for row in found.rows}) == SHOWN_ANSWERS + 2


def test_a_conditions_draws_do_not_depend_on_the_other_conditions(tiny_model, monkeypatch):
    drawn = {}

    def make(name, model, corpus, num_slots, rng, *, room=0):
        drawn[name] = rng.random(3)

    monkeypatch.setattr(evaluation_conditions, "make_prefix", make)
    monkeypatch.setattr(evaluation_conditions, "prefix_title", lambda name: name)
    untrained = initialise_from_first_tokens(tiny_model, DOCUMENT.text, NUM_SLOTS)
    make_conditions(tiny_model, corpus_of(tiny_model), untrained, ("a", "b"), room=80, seed=1)
    before = dict(drawn)
    make_conditions(tiny_model, corpus_of(tiny_model), untrained, ("b", "c"), room=80, seed=1)
    np.testing.assert_array_equal(drawn["b"], before["b"])
    assert len({tuple(values) for values in drawn.values()}) == 3
    make_conditions(tiny_model, corpus_of(tiny_model), untrained, ("b",), room=80, seed=2)
    assert not np.array_equal(drawn["b"], before["b"])
