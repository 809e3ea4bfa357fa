"""A run as stages: what is kept, what runs again and why, and what a report holds. The model is a tiny one."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_runs import Collected, config_of, contents, copied, finished, settings, talker_gguf  # noqa: F401

import cartridges_jax
from cartridges_jax import sampling
from cartridges_jax.checkpoint import load_cartridge, portable_config
from cartridges_jax.corpus import Corpus, tokenize_corpus
from cartridges_jax.corpus.questions import Question, questions_hash, read_questions
from cartridges_jax.data.conversations import read_shard
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.conditions import make_conditions
from cartridges_jax.models import load_model
from cartridges_jax.models.model import fastest_weights
from cartridges_jax.pipeline import run as pipeline
from cartridges_jax.pipeline.config import default_config, from_config_dict
from cartridges_jax.pipeline.inputs import freeze_questions, replaced_questions
from cartridges_jax.pipeline.stages import context
from cartridges_jax.pipeline.workdir import Workdir, read_json, write_json

STAGES = ("study", "train", "evaluate")


def again(talker_gguf, inputs, workdir, **changes):
    """Runs the same in a copy of the workdir; (what was said, the report)."""
    said: list[str] = []
    report = pipeline.run(config_of(settings(talker_gguf, inputs, **changes)), workdir, reporter=Collected(said))
    return said, report


def kept(said):
    return [stage for stage in STAGES if f"{stage}: nothing changed, skipped" in said]


def without_clocks(files):
    return {name: value for name, value in files.items() if not name.endswith("seconds.json")}


# What is made


def test_a_report_holds_every_number_that_the_readme_names(finished):
    report = json.loads((finished / "run" / "report.json").read_text())
    assert set(report["conditions"]) == {"none", "first_tokens", "whole_text", "cartridge"}
    for measures in report["conditions"].values():
        assert set(measures) == {
            "answer_nll", "teacher_kl", "heldout_kl", "own_nll", "facts", "f1", "exact_match", "kl_closed", "gap_closed",
            "prefix_tokens", "kv_bytes",
        }  # fmt: skip
        measured = {name: value for name, value in measures.items() if not name.endswith("_closed")}
        assert all(math.isfinite(value) for value in measured.values())
    assert {condition["name"] for condition in report["condition_list"]} == set(report["conditions"])
    assert {metric["name"] for metric in report["metric_list"]} == set(report["conditions"]["none"])
    assert report["corpus"]["tokens"] > report["cartridge"]["tokens"] == 24
    assert report["cartridge"]["bytes"] == report["conditions"]["cartridge"]["kv_bytes"] == 2 * 3 * 2 * 24 * 16 * 4
    assert report["conversations"] + report["dropped_training_questions"] == 18 - 3
    assert report["steps"] == 12
    assert set(report["seconds"]) == {"synthesis", "training", "evaluation", "total"}
    assert report["seconds"]["total"] == pytest.approx(sum(report["seconds"][k] for k in list(report["seconds"])[:3]))
    for name in ("kl_closed", "gap_closed", "facts"):
        assert report[name] == report["conditions"]["cartridge"][name]
        assert (report[name] is None) == (name in report["reasons"])
    assert [step["step"] for step in report["history"]["train"]] == list(range(1, 13))
    assert [step["step"] for step in report["history"]["heldout"]] == [0, 4, 8, 12]
    assert report["config"]["train"]["steps"] == 12 and len(report["answers"]) == 2
    assert sum(report["coverage"]["conversations_per_sentence"]) == 18


def test_the_published_cartridge_is_the_one_that_was_measured(finished):
    report = json.loads((finished / "run" / "report.json").read_text())
    published = load_cartridge(finished / "run" / "cartridge")
    (staged,) = (finished / "run" / "train").glob("*/cartridge")
    np.testing.assert_array_equal(published.prefix.keys, load_cartridge(staged).prefix.keys)
    assert [document.sha256 for document in published.metadata.documents] == [report["corpus"]["sha256"]]
    assert published.metadata.config == portable_config(report["config"])
    assert "accept_license" not in published.metadata.config
    assert published.metadata.config["model"] == Path(report["config"]["model"]).name
    assert published.metadata.num_frozen == 1 and published.metadata.step == 12


def test_the_answer_to_every_example_is_in_a_parquet_file_beside_the_report(finished):
    report = json.loads((finished / "run" / "report.json").read_text())
    rows = pq.read_table(finished / "run" / report["answers_file"]).to_pylist()
    assert len(rows) == 4 * (2 + report["heldout_conversations"])
    of_cartridge = [row for row in rows if row["condition"] == "cartridge" and row["task"] == "questions"]
    assert [row["answer"] for row in of_cartridge] == [item["answers"]["cartridge"] for item in report["answers"]]
    total, tokens = (sum(row[f"teacher_kl_{part}"] for row in of_cartridge) for part in ("sum", "tokens"))
    assert report["conditions"]["cartridge"]["teacher_kl"] == pytest.approx(total / tokens)
    assert report["answers_file"] in (finished / "run" / "report.html").read_text()


def test_the_evaluation_questions_are_frozen_whole_into_the_workdir(tmp_path):
    workdir = Workdir(tmp_path / "run")
    questions = [Question("What?", ("a", "b"), "It is a, or b."), Question("Where?", ("here",))]
    assert freeze_questions(workdir, questions) == []
    assert read_questions(tmp_path / "run" / "questions.jsonl") == questions
    assert freeze_questions(workdir, questions) == [] == replaced_questions(workdir)


@pytest.mark.parametrize(
    "others",
    [[], [Question("What?", ("b",), "E.")], [Question("What?", ("a",), "F.")], [Question("Who?", ("a",), "E.")]],
)
def test_other_questions_in_the_same_workdir_are_refused_or_start_a_new_evaluation(tmp_path, others):
    workdir = Workdir(tmp_path / "run")
    frozen = [Question("What?", ("a",), "E.")]
    freeze_questions(workdir, frozen)
    with pytest.raises(UserError, match=r"1 other evaluation questions.*--workdir.*--config.new_evaluation=True"):
        freeze_questions(workdir, others)
    assert read_questions(tmp_path / "run" / "questions.jsonl") == frozen
    assert freeze_questions(workdir, others, new_evaluation=True) == [questions_hash(frozen)]
    # The new ones are as frozen as the old ones were, and the replacement is not forgotten.
    assert freeze_questions(workdir, others) == replaced_questions(workdir) == [questions_hash(frozen)]
    with pytest.raises(UserError, match="frozen"):
        freeze_questions(workdir, frozen)


def test_a_run_with_other_questions_is_refused_before_work_and_a_new_evaluation_is_reported(
    talker_gguf, finished, copied, tmp_path
):
    path = tmp_path / "other.jsonl"
    path.write_text('{"question": "What of boat 3?", "answers": ["c and o"]}\n')
    before = contents(copied)
    with pytest.raises(UserError, match="2 other evaluation questions"):
        again(talker_gguf, finished, copied, questions=str(path))
    assert {name: value for name, value in contents(copied).items() if name != "run.json"} == {
        name: value for name, value in before.items() if name != "run.json"
    }
    said, report = again(talker_gguf, finished, copied, questions=str(path), train__steps=1, new_evaluation=True)
    assert any(line.startswith("new evaluation") for line in said) and kept(said) == ["study"]
    assert len(report["replaced_questions"]) == 1 and report["questions"] == 1
    assert "New evaluation" in (copied / "report.html").read_text()


def test_the_summary_is_said_and_not_printed(talker_gguf, finished, copied, capsys):
    said, _ = again(talker_gguf, finished, copied)
    assert any("The whole text" in text and "Report:" in text for text in said)
    assert capsys.readouterr().out == ""


def test_training_questions_that_equal_an_evaluation_question_are_dropped_and_counted(
    talker_gguf, finished, copied, tmp_path, monkeypatch
):
    (shard, *_) = sorted((copied / "study").glob("*/shard-*.parquet"))
    asked = [conversation.messages[0].content for conversation in read_shard(shard)]
    lines = [json.dumps({"question": question, "answers": ["t"]}) for question in asked]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(lines) + "\n")

    def stop(*args, **kwargs):
        raise UserError("trained enough")

    monkeypatch.setattr(pipeline, "evaluate", stop)
    before = set((copied / "train").glob("*/result.json"))
    with pytest.raises(UserError, match="trained enough"):
        again(talker_gguf, finished, copied, questions=str(path), train__steps=1, new_evaluation=True)
    (result,) = set((copied / "train").glob("*/result.json")) - before
    trained = json.loads(result.read_text())
    assert trained["dropped_training_questions"] >= len(asked) - 3
    assert trained["trained_on"] == 15 - trained["dropped_training_questions"]


# What is kept


def test_an_identical_run_reruns_nothing_and_says_so(talker_gguf, finished, copied):
    run = copied
    before = without_clocks(contents(run, *STAGES, "cartridge"))
    times = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and "cartridge" in file.parts}
    first = json.loads((run / "report.json").read_text())
    said, report = again(talker_gguf, finished, copied)
    assert kept(said) == list(STAGES)
    assert without_clocks(contents(run, *STAGES, "cartridge")) == before
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert {k: v for k, v in report.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_a_kept_stage_costs_no_further_seconds(talker_gguf, finished, copied):
    before = json.loads((copied / "report.json").read_text())["seconds"]
    _, report = again(talker_gguf, finished, copied)
    assert report["seconds"] == before


def test_a_changed_train_setting_keeps_the_study_and_is_named(talker_gguf, finished, copied):
    before = contents(copied, "study")
    said, report = again(talker_gguf, finished, copied, train__steps=3)
    assert kept(said) == ["study"]
    assert any(line.startswith("train: runs again, changed:") and "train.steps 12 -> 3" in line for line in said)
    assert any(line.startswith("evaluate: runs again, changed:") for line in said)
    assert without_clocks(contents(copied, "study")) == without_clocks(before)
    assert report["steps"] == 3 and load_cartridge(copied / "cartridge").metadata.step == 3


def test_a_changed_evaluation_setting_reruns_the_evaluation_only(talker_gguf, finished, copied):
    said, report = again(talker_gguf, finished, copied, evaluation__max_questions=1)
    assert kept(said) == ["study", "train"]
    assert any(re.search(r"evaluation.max_questions \d+ -> 1", line) for line in said)
    assert report["questions"] == len(report["answers"]) == 1


def test_a_changed_seed_reruns_everything(talker_gguf, finished, copied):
    said, _ = again(talker_gguf, finished, copied, seed=1, heldout=1, study__conversations=4, train__steps=1)
    assert kept(said) == []
    assert any(line.startswith("study: runs again") and "seed 0 -> 1" in line for line in said)


def test_changed_code_reruns_the_stages_that_depend_on_it(talker_gguf, finished, copied, monkeypatch):
    real = context.code_hash
    monkeypatch.setattr(context, "code_hash", lambda *parts: real(*parts)[::-1] if "distill" in parts else real(*parts))
    before = load_cartridge(copied / "cartridge")
    said, _ = again(talker_gguf, finished, copied)
    assert kept(said) == ["study"]
    assert any(line.startswith("train: runs again, changed:") and "code" in line for line in said)
    after = load_cartridge(copied / "cartridge")
    assert before.metadata == after.metadata
    np.testing.assert_array_equal(before.prefix.keys, after.prefix.keys)


def test_going_back_to_an_earlier_setting_finds_its_stages(talker_gguf, finished, copied):
    before = load_cartridge(copied / "cartridge")
    again(talker_gguf, finished, copied, train__steps=1)
    assert load_cartridge(copied / "cartridge").metadata.step == 1
    said, _ = again(talker_gguf, finished, copied)
    assert kept(said) == list(STAGES)
    after = load_cartridge(copied / "cartridge")
    assert after.metadata == before.metadata
    np.testing.assert_array_equal(after.prefix.values, before.prefix.values)


def test_every_source_file_of_the_package_belongs_to_a_stage_or_cannot_change_its_outcome():
    """A new part that a stage uses must be added to its list, or stale results would be kept."""
    root = Path(cartridges_jax.__file__).parent
    outside = (
        {"__init__.py", "api.py", "chat.py", "cli.py", "errors.py", "files.py", "typed_config.py"}
        | {f"evaluation/{name}.py" for name in ("__init__", "report", "page", "summary", "units", "figures", "svg")}
        | {f"parallel/{name}" for name in ("__init__.py", "job.py", "local.py", "start.py")}
    )
    for file in root.rglob("*.py"):
        name = file.relative_to(root).as_posix()
        if name in outside or name.startswith(("pipeline/", "benchmarks/", "aot/")):
            continue
        assert any(name == part or name.startswith(f"{part}/") for part in context._EVALUATE_CODE), name


# The workdir


def test_a_second_run_in_the_same_workdir_is_refused(talker_gguf, finished, copied):
    with Workdir(copied).held(), pytest.raises(UserError, match="another run is working in .*--workdir"):
        again(talker_gguf, finished, copied)
    assert kept(again(talker_gguf, finished, copied)[0]) == list(STAGES)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}


def test_what_changed_is_told_in_both_directions(tmp_path):
    workdir = Workdir(tmp_path)
    with workdir.held():
        _, first = workdir.stage("study", {"a": 1, "gone": "x" * 64})
    again = Workdir(tmp_path)
    _, changes = again.stage("study", {"a": 2, "new": None})
    assert first == []
    assert [change.split(" ")[0] for change in changes] == ["a", "gone"]
    assert changes[0] == "a 1 -> 2" and len(changes[1]) < 40


# The configuration


def test_weights_are_chosen_once_and_what_was_chosen_is_what_a_run_is_known_by():
    config = from_config_dict(default_config())
    assert config.weights == "auto"
    chosen = config.with_weights_chosen()
    assert chosen.weights == fastest_weights("float32")
    assert dataclasses.replace(config, dtype="bfloat16").with_weights_chosen().weights == ""
    assert dataclasses.replace(config, weights="int8").with_weights_chosen().weights == "int8"


def test_the_defaults_are_a_config_that_is_accepted():
    assert from_config_dict(default_config()).train.epochs > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.stepz": 3}, r"config\.train has no field 'stepz'"),
        ({"modle": "x"}, "config has no field 'modle'"),
        ({"train.steps": "many"}, "config.train.steps='many' is a str: give a int"),
        ({"train.steps": True}, "config.train.steps=True is a bool"),
        ({"train.remat": 1}, "config.train.remat=1 is a int: give a bool"),
        ({"study.families": {"qa": "half"}}, r"config.study.families.qa='half'"),
    ],
)
def test_a_field_that_is_unknown_or_of_another_type_is_named(changes, words):
    config = default_config()
    with config.unlocked(), config.ignore_type():
        for name, value in changes.items():
            *path, last = name.split(".")
            at = config
            for part in path:
                at = at[part]
            at[last] = value
    with pytest.raises(UserError, match=words):
        from_config_dict(config)


def test_a_missing_field_is_named():
    config = default_config()
    with config.unlocked():
        del config.train["steps"]
    with pytest.raises(UserError, match=r"config\.train lacks the field 'steps'"):
        from_config_dict(config)


def test_whole_numbers_are_taken_where_fractions_are_meant():
    config = default_config()
    with config.unlocked(), config.ignore_type():
        config.train.learning_rate = 1
    run = from_config_dict(config)
    assert run.train.learning_rate == 1.0 and isinstance(run.train.learning_rate, float)


def test_each_condition_is_the_prefix_that_its_name_says(talker_gguf):
    model = load_model(str(talker_gguf))
    document = tokenize_corpus(Corpus.from_text("Shed 4 has t and s. " * 8, "d"), model.tokenizer)
    cartridge = sampling.prefill(model, model.tokenizer.encode("something else in twenty tokens or so"))
    found = make_conditions(model, document, cartridge, room=64)
    by_name = {condition.name: condition for condition in found}
    assert list(by_name) == ["none", "first_tokens", "whole_text", "cartridge"]
    whole = model.chat.system_prefix(document.text).token_ids
    assert by_name["whole_text"].prefix_tokens == len(whole)
    assert by_name["first_tokens"].prefix_tokens == by_name["cartridge"].prefix_tokens == cartridge.num_slots
    assert by_name["none"].prefix_tokens == len(model.chat.default_head())
    assert by_name["cartridge"].prefix is cartridge
