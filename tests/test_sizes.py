"""Sizes that follow from the corpus, the estimate of the time, and the command line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from tiny import tiny_config

from cartridges_jax.corpus import Corpus, read_corpus, tokenize_corpus
from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.config import default_config, from_config_dict
from cartridges_jax.pipeline.sizes import (
    auto_conversations,
    auto_slots,
    auto_steps,
    estimated_seconds,
    expected_sizes,
    measured_flops,
    plan_line,
    with_sizes,
)


class Words:
    """A tokenizer of words, four characters of which are a token on average."""

    def encode_with_offsets(self, text):
        spans = [(at, min(at + 4, len(text))) for at in range(0, len(text), 4)]
        return list(range(len(spans))), spans

    def encode(self, text):
        return self.encode_with_offsets(text)[0]


def sized(corpus, **changes):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return with_sizes(from_config_dict(config), tokenize_corpus(corpus, Words()))


def test_the_defaults_leave_all_sizes_to_the_corpus():
    config = from_config_dict(default_config())
    assert (config.cartridge.num_slots, config.study.conversations, config.train.steps) == (0, 0, 0)


def test_the_quickstart_gets_an_eighth_of_its_tokens_and_six_questions_a_sentence():
    corpus = read_corpus("quickstart")
    config = sized(corpus)
    sentences = len(tokenize_corpus(corpus, Words()).sentences)
    tokens = len(Words().encode(corpus.text))
    assert config.study.conversations == 6 * sentences + 24
    assert tokens / 8 - 16 < config.cartridge.num_slots <= tokens / 8 and config.cartridge.num_slots % 16 == 0
    assert config.train.steps == 0


def test_what_is_given_is_not_touched():
    config = sized(
        read_corpus("quickstart"), **{"cartridge.num_slots": 77, "study.conversations": 99, "train.steps": 5}
    )
    assert (config.cartridge.num_slots, config.study.conversations, config.train.steps) == (77, 99, 5)


def test_ratios_are_settings_and_sizes_have_bounds():
    assert auto_slots(1189, 8.0) == 144 and auto_slots(1189, 4.0) == 288
    assert auto_slots(90, 8.0) == 32
    assert auto_conversations(83, 6.0, 24) == 522
    assert auto_conversations(1, 6.0, 24) == 64 and auto_conversations(10**6, 6.0, 24) == 131072
    assert auto_steps(21_000, 5.5, 4, 128) == 226


def test_a_text_without_sentences_is_refused_before_a_size_is_made_of_it():
    with pytest.raises(UserError, match="no sentence to ask about"):
        sized(Corpus.from_text("# A heading\n"))


def test_the_estimate_grows_with_every_size_and_the_plan_is_one_line():
    corpus = tokenize_corpus(read_corpus("quickstart"), Words())
    config = with_sizes(from_config_dict(default_config()), corpus)
    model, sizes = tiny_config(), expected_sizes(config)

    def seconds(**changes):
        return estimated_seconds(config, model, dataclasses.replace(sizes, **changes), corpus.num_tokens, 48, 1e11)

    for stage, field in (("study", "conversations"), ("train", "steps")):
        more = seconds(**{field: 2 * getattr(sizes, field)})
        assert more[stage] == pytest.approx(2 * seconds()[stage])
    assert seconds(num_slots=2 * sizes.num_slots)["train"] > seconds()["train"]
    line = plan_line(config, model, corpus, 66)
    assert "\n" not in line and f"{sizes.num_slots} slots" in line and "minutes" in line
    assert measured_flops(model, "float32", seconds=0.05) > 1e6


def cartridges(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cartridges_jax.cli", *arguments], capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian", "x.txt"), "no command 'trian': choose one of train, chat, evaluate, bench, aot"),
        (("train", "x.txt"), "cartridges train my.txt --out my.cartridge"),
        (("train", "nowhere.txt", "--out=a"), "nowhere.txt does not exist"),
        (("train", "x.txt", "--out=a", "--config.train.stepz=1"), "no field 'stepz'"),
        (("chat",), "cartridges chat my.cartridge"),
        (("chat", "nowhere"), "nowhere is not a cartridge"),
        (("evaluate", "nowhere"), "--corpus=my.txt"),
        (("bench", "speed"), "train_step, decode, self_study, cache_sweep"),
        (("aot",), "pod.topology is empty"),
    ],
)
def test_a_wrong_command_is_one_line_that_shows_a_right_one(arguments, words, tmp_path):
    done = cartridges(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("train", "questions"),
        ("chat", "temperature"),
        ("evaluate", "max_questions"),
        ("bench", "workdir"),
        ("aot", "programs"),
    ],
)
def test_every_command_lists_its_flags(command, flag):
    done = cartridges(command, "--help")
    assert done.returncode == 0 and f"cartridges {command}" in done.stdout and f"--{flag}:" in done.stdout
