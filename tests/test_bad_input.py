"""Bad input: one line that names the value and the remedy, before expensive work, and earlier work stays.

A wrong wheel hash, and a disk too full for the model itself, are in test_formats.py.
"""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from tiny_runs import (  # noqa: F401
    DOCUMENT,
    ROOT,
    Collected,
    command,
    config_of,
    contents,
    copied,
    finish,
    finished,
    settings,
    talker_gguf,
    write_inputs,
)

from cartridges_jax.checkpoint import load_cartridge
from cartridges_jax.data.conversations import read_shard
from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.run import run

# A model that does not exist: whatever is refused instead of it is refused before a model is loaded.
NO_MODEL = "no-such-model"


@pytest.fixture
def inputs(tmp_path):
    write_inputs(tmp_path)
    return tmp_path


def refusal(values, workdir) -> str:
    """The one line with which a run is refused, and nothing was studied for it."""
    before = contents(workdir) if workdir.is_dir() else {}
    with pytest.raises(UserError) as caught:
        run(config_of(values), workdir)
    message = str(caught.value)
    assert "\n" not in message
    if workdir.is_dir():
        after = contents(workdir)
        # The record of the last command, the questions of this one, and the clocks may change; work may not.
        work = {name: value for name, value in before.items() if "/" in name and not name.endswith("seconds.json")}
        assert {name: after.get(name) for name in work} == work
        assert not any(name.endswith(".parquet") for name in set(after) - set(before))
    return message


# As a program: one line on stderr, exit code 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.train.stepz=3"], ["no field", "stepz", "pipeline/config.py"]),
        (["--config.train.steps=many"], ["steps", "many"]),
        (["--config=experiments/none.py"], ["experiments/none.py"]),
        (["--wordkir=x"], ["wordkir"]),
        (["extra"], ["extra", "--name=value"]),
        ([], ["--config", "--workdir"]),
    ],
)
def test_a_wrong_command_line_ends_in_one_line_and_code_2(tmp_path, arguments, words):
    program = command({}, tmp_path / "run")[:2]
    config = [] if not arguments or arguments[0].startswith("--config=") else ["--config=experiments/quickstart.py"]
    workdir = [f"--workdir={tmp_path / 'run'}"] if arguments else []
    done = finish([*program, *config, *workdir, *arguments])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_refused_document_ends_the_program_in_one_line_and_code_2(inputs):
    (inputs / "doc.md").write_bytes(b"text\0and more")
    done = finish(command(settings(NO_MODEL, inputs), inputs / "run"))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "doc.md is binary" in line


def test_a_chat_with_what_is_no_cartridge_ends_in_one_line_and_code_2(tmp_path):
    done = finish([sys.executable, str(ROOT / "launch" / "chat.py"), f"--cartridge={tmp_path}", "--prompt=Hello"])
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line


# Documents and questions


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "does not exist"), (b"", "is empty"), (b" \n\t", "is empty"), (b"a\0b", "is binary"),
        (b"caf\xe9", "not UTF-8"),
    ],
)  # fmt: skip
def test_a_document_that_cannot_be_read_is_refused_before_the_model_is_loaded(inputs, data, words):
    path = inputs / "doc.md"
    path.unlink() if data is None else path.write_bytes(data)
    message = refusal(settings(NO_MODEL, inputs), inputs / "run")
    assert str(path) in message and words in message


def test_questions_that_cannot_be_read_are_refused_before_the_model_is_loaded(inputs):
    (inputs / "questions.jsonl").write_text('{"question": "Who?", "answers": ["A"]}\n{"question": "Who?"}\n')
    message = refusal(settings(NO_MODEL, inputs), inputs / "run")
    assert "questions.jsonl:2" in message and '"answers": None' in message


def test_an_article_of_a_file_that_does_not_exist_is_refused_before_the_model_is_loaded(inputs):
    message = refusal(
        settings(NO_MODEL, inputs, corpus=str(inputs / "no.json"), article="X", questions=""), inputs / "run"
    )
    assert "no.json does not exist" in message


def test_a_model_that_does_not_exist_is_named(inputs):
    assert NO_MODEL in refusal(settings(NO_MODEL, inputs), inputs / "run")


def test_a_document_of_headings_only_is_refused(talker_gguf, inputs):
    (inputs / "doc.md").write_text("# One\n\n## Two and three and four and five\n\n" * 8)
    assert "no sentence to ask about" in refusal(settings(talker_gguf, inputs), inputs / "run")


# Sizes


def test_a_document_shorter_than_the_cartridge_is_refused_with_a_size_that_works(talker_gguf, inputs):
    message = refusal(settings(talker_gguf, inputs, cartridge__num_slots=350), inputs / "run")
    assert "350 slots" in message
    size = int(message.split("--config.cartridge.num_slots=")[1].rstrip(")"))
    changed = settings(talker_gguf, inputs, cartridge__num_slots=size, evaluation__max_answer_tokens=10**4)
    assert "slots, evaluation" not in refusal(changed, inputs / "run")


@pytest.mark.parametrize(("num_slots", "num_frozen"), [(4, 4), (1, 1), (3, 8)])
def test_a_cartridge_without_a_slot_to_train_is_refused_before_the_model_is_loaded(inputs, num_slots, num_frozen):
    changes = {"cartridge__num_slots": num_slots, "cartridge__num_frozen": num_frozen}
    with pytest.raises(
        UserError, match=f"num_slots={num_slots} with cartridge.num_frozen={num_frozen}.*raise num_slots"
    ):
        config_of(settings(NO_MODEL, inputs, **changes))


def test_a_cartridge_and_a_conversation_beyond_the_models_context_are_refused(talker_gguf, inputs):
    (inputs / "doc.md").write_text(DOCUMENT * 3)
    changes = {"cartridge__num_slots": 490, "study__teacher_context": "chunk"}
    message = refusal(settings(talker_gguf, inputs, **changes), inputs / "run")
    assert "490 slots" in message and "context of 512" in message and "fewer slots" in message


def test_a_document_beyond_the_teachers_context_is_refused_with_the_setting_that_helps(talker_gguf, inputs):
    (inputs / "doc.md").write_text(DOCUMENT * 3)
    message = refusal(settings(talker_gguf, inputs), inputs / "run")
    assert "context of 512" in message and "--config.study.teacher_context=chunk" in message


def test_chunks_beyond_the_teachers_context_are_refused(talker_gguf, inputs):
    (inputs / "doc.md").write_text(DOCUMENT * 3)
    changes = {"study__teacher_context": "chunk", "study__chunk_min_tokens": 500, "study__chunk_max_tokens": 600}
    message = refusal(settings(talker_gguf, inputs, **changes), inputs / "run")
    assert "chunks of up to 600 tokens" in message and "study.chunk_max_tokens" in message


def test_long_chunks_of_a_long_document_are_refused_before_any_is_studied(talker_gguf, inputs):
    """The longest chunk may be too long where the shortest is not."""
    (inputs / "doc.md").write_text(DOCUMENT * 3)
    changes = {"study__teacher_context": "chunk", "study__chunk_min_tokens": 400, "study__chunk_max_tokens": 700}
    message = refusal(settings(talker_gguf, inputs, **changes), inputs / "run")
    assert "700" in message and "study.chunk_max_tokens" in message


def test_conversations_that_fit_no_training_row_are_refused_before_self_study(talker_gguf, inputs):
    message = refusal(settings(talker_gguf, inputs, train__row_tokens=20, train__steps=1), inputs / "run")
    assert "train.row_tokens" in message


def test_an_evaluation_question_that_exceeds_the_context_is_refused_before_self_study(talker_gguf, inputs):
    question = {"question": "What " + "has shed " * 80 + "?", "answers": ["t"]}
    (inputs / "questions.jsonl").write_text(json.dumps(question) + "\n")
    message = refusal(settings(talker_gguf, inputs, train__steps=1, study__conversations=5), inputs / "run")
    assert "context of 512" in message


def test_a_run_without_anything_to_evaluate_on_is_refused_before_self_study(talker_gguf, inputs):
    changes = {"questions": "", "heldout": 0, "train__steps": 1, "study__conversations": 5}
    message = refusal(settings(talker_gguf, inputs, **changes), inputs / "run")
    assert "nothing to evaluate on" in message


def test_more_log_probabilities_than_the_vocabulary_has_tokens_are_refused(talker_gguf, inputs):
    assert "study.top_logprobs=5000" in refusal(settings(talker_gguf, inputs, study__top_logprobs=5000), inputs / "run")


# Values


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float16"}, "dtype='float16': choose one of float32, bfloat16"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**40}, f"seed={2**40}"),
        ({"heldout": 18}, "heldout=18 leaves nothing"),
        ({"study__conversations": -1}, "study.conversations=-1"),
        ({"study__chunk_min_tokens": 161}, "study.chunk_min_tokens=161"),
        ({"study__teacher_context": "page"}, "study.teacher_context 'page': choose one of chunk, document"),
        ({"study__writer": "poet"}, "study.writer.*'poet'.*completion, chat"),
        ({"study__writer_temperature": -0.1}, "study.writer_temperature=-0.1"),
        ({"study__writer_top_k": -1}, "study.writer_top_k=-1"),
        ({"study__families__qa": -1.0, "study__families__generic": 1.0}, "qa has weight -1.0"),
        ({"study__families__generic": 0.0}, "all seed families have weight 0"),
        ({"train__steps": -1}, "train.steps=-1"),
        ({"train__learning_rate": 0.0}, "train.learning_rate=0.0"),
        ({"train__learning_rate": float("nan")}, "train.learning_rate=nan"),
        ({"train__schedule": "linear"}, "train.schedule='linear': choose one of constant, cosine"),
        ({"train__tail": "keep"}, "train.tail='keep': choose one of class, drop"),
        ({"train__micro_batches": 3}, "train.rows_per_step=2 is not divisible by train.micro_batches=3"),
        ({"evaluation__max_answer_tokens": 0}, "evaluation.max_answer_tokens=0"),
        ({"max_tokens": -1}, "max_tokens=-1: must be 0"),
        ({"train__epochs": 0.0}, "train.epochs=0.0"),
        ({"train__learner": "lora"}, "train.learner='lora': choose one of cartridge"),
        ({"study__asks_per_sentence": 0.0}, "study.asks_per_sentence=0.0"),
        ({"study__teacher": "oracle"}, "oracle.*local"),
        ({"study__filters": ("taste",)}, "study.filters has 'taste'"),
        ({"cartridge__init": "zeros"}, "zeros.*first_tokens"),
        ({"cartridge__tokens_per_slot": -8.0}, "cartridge.tokens_per_slot=-8.0"),
        ({"evaluation__conditions": ("none", "cartridge")}, "lacks the judge"),
        ({"evaluation__tasks": ("exam",)}, "exam.*heldout, questions"),
    ],
)
def test_a_value_that_no_run_could_use_is_named(talker_gguf, inputs, changes, words):
    with pytest.raises(UserError, match=words):
        run(config_of(settings(talker_gguf, inputs, **changes)), inputs / "run")
    assert not list(inputs.rglob("*.parquet"))


# Disk and workdir


def test_too_little_disk_is_told_before_self_study_with_what_is_needed(talker_gguf, inputs):
    message = refusal(settings(talker_gguf, inputs, train__keep_checkpoints=10**10), inputs / "run")
    assert " MB in " in message and "are free" in message and "--workdir" in message


@pytest.mark.parametrize("place", ["file/run", "/proc/cartridges_run"])
def test_a_workdir_that_cannot_be_written_is_refused_before_the_model_is_loaded(inputs, place):
    (inputs / "file").write_text("x")
    message = refusal(settings(NO_MODEL, inputs), inputs / place)
    assert str(inputs / place) in message and "cannot be written" in message and "--workdir" in message


def test_a_workdir_that_is_a_file_is_refused(inputs):
    message = refusal(settings(NO_MODEL, inputs), inputs / "doc.md")
    assert "doc.md is a file" in message


def test_a_directory_of_something_else_is_refused_and_stays_as_it_is(inputs):
    (inputs / "thesis").mkdir()
    (inputs / "thesis" / "chapter1.tex").write_text("x")
    message = refusal(settings(NO_MODEL, inputs), inputs / "thesis")
    assert "chapter1.tex" in message and "--workdir" in message
    assert [file.name for file in (inputs / "thesis").iterdir()] == ["chapter1.tex"]


def test_a_workdir_whose_first_record_was_killed_half_written_is_taken_up(talker_gguf, inputs):
    """`write_json` leaves such a file behind when the process dies before its rename."""
    workdir = inputs / "run"
    workdir.mkdir()
    (workdir / ".lock").touch()
    (workdir / ".run.json.abc12345").write_text('{"form')
    assert NO_MODEL in refusal(settings(NO_MODEL, inputs), workdir)


def test_a_damaged_run_record_costs_nothing(talker_gguf, finished, copied):
    """It only serves to say what changed."""
    (copied / "run.json").write_text('{"stages": ')
    said = []
    run(config_of(settings(talker_gguf, finished)), copied, reporter=Collected(said))
    assert [line for line in said if "skipped" in line] == [
        f"{stage}: nothing changed, skipped" for stage in ("study", "train", "evaluate")
    ]


# Earlier work


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus": "/no/such/file.md"}, {"train.steps": -1}, {"cartridge.num_slots": 400}, {"model": NO_MODEL},
        {"train.keep_checkpoints": 10**10},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_refused_command_leaves_the_earlier_run_as_it_was(talker_gguf, finished, copied, changes):
    before = contents(copied)
    with pytest.raises(UserError):
        run(config_of(settings(talker_gguf, finished) | changes), copied)
    assert contents(copied) == before


def test_a_truncated_shard_is_named_and_made_anew_alone_when_it_is_deleted(talker_gguf, finished, copied):
    shards = sorted((copied / "study").glob("*/shard-*.parquet"))
    assert len(shards) > 1
    whole = read_shard(shards[0])
    shards[0].write_bytes(shards[0].read_bytes()[:300])
    values = settings(talker_gguf, finished)
    message = refusal(values, copied)
    assert str(shards[0]) in message and "delete this file and rerun" in message
    shards[0].unlink()
    others = contents(copied, "train", "cartridge")
    said = []
    run(config_of(values), copied, reporter=Collected(said))
    again = read_shard(shards[0])
    assert [c.messages[0].content for c in again] == [c.messages[0].content for c in whole]
    assert [c.messages[1].token_ids for c in again] == [c.messages[1].token_ids for c in whole]
    assert contents(copied, "train", "cartridge") == others and "train: nothing changed, skipped" in said


def unfinished_training(workdir):
    """Takes a finished run back to the moment before its cartridge was written; its checkpoints."""
    (stage,) = [path for path in (workdir / "train").iterdir() if path.is_dir()]
    (stage / "result.json").unlink()
    shutil.rmtree(stage / "cartridge")
    return sorted((stage / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def damage(checkpoint):
    for file in checkpoint.rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_training_ends_as_it_would_have(talker_gguf, finished, copied, caplog):
    *_, newest = unfinished_training(copied)
    damage(newest)
    run(config_of(settings(talker_gguf, finished)), copied)
    assert any("damaged" in record.getMessage() for record in caplog.records)
    found, expected = load_cartridge(copied / "cartridge"), load_cartridge(finished / "run" / "cartridge")
    np.testing.assert_array_equal(found.prefix.keys, expected.prefix.keys)
    np.testing.assert_array_equal(found.prefix.values, expected.prefix.values)


def test_when_every_checkpoint_is_damaged_the_directory_to_delete_is_named(talker_gguf, finished, copied):
    checkpoints = unfinished_training(copied)
    for checkpoint in checkpoints:
        damage(checkpoint)
    values = settings(talker_gguf, finished)
    message = refusal(values, copied)
    assert str(checkpoints[0].parent) in message and "delete that directory" in message
    shutil.rmtree(checkpoints[0].parent)
    run(config_of(values), copied)
    found, expected = load_cartridge(copied / "cartridge"), load_cartridge(finished / "run" / "cartridge")
    np.testing.assert_array_equal(found.prefix.keys, expected.prefix.keys)


def test_a_damaged_cartridge_of_a_finished_stage_is_made_anew_by_what_the_message_says(talker_gguf, finished, copied):
    (cartridge,) = (copied / "train").glob("*/cartridge")
    damage(cartridge)
    values = settings(talker_gguf, finished)
    message = refusal(values, copied)
    stage = cartridge.parent
    assert f"delete {stage}" in message
    shutil.rmtree(stage)
    run(config_of(values), copied)
    assert load_cartridge(cartridge).metadata == load_cartridge(finished / "run" / "cartridge").metadata


@pytest.mark.parametrize("name", ["evaluate/*/result.json", "study/*/seconds.json"])
def test_a_damaged_record_is_named_and_deleting_it_helps(talker_gguf, finished, copied, name):
    (path,) = copied.glob(name)
    path.write_text('{"stages": ')
    values = settings(talker_gguf, finished)
    message = refusal(values, copied)
    assert str(path) in message and "delete it and rerun" in message
    path.unlink()
    run(config_of(values), copied)
