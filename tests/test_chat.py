"""The terminal chat and streamed answers."""

from __future__ import annotations

import pytest
from tiny import random_prefix

import cartridges_jax as cj
from cartridges_jax.chat import TooLong, chat
from cartridges_jax.errors import UserError


def talk(lines, answer):
    """The text that a chat with these input lines writes."""
    written = []
    pending = iter(lines)

    def read():
        line = next(pending, EOFError())
        if isinstance(line, Exception):
            raise line
        return line

    chat(answer, read=read, write=written.append)
    return "".join(written)


def echo(messages):
    yield f"[{len(messages)}] "
    yield messages[-1]["content"]


def test_each_answer_sees_the_conversation_so_far():
    assert talk(["one", "two"], echo) == "[1] one\n[3] two\n\n"


def test_commands_start_over_undo_and_end():
    assert talk(["one", "/new", "two", "/quit", "three"], echo).endswith("[1] two\n")
    assert talk(["one", "two", "/undo", "three", "/undo", "/undo", "/undo"], echo).count("nothing to undo") == 1
    assert "[3] three" in talk(["one", "two", "/undo", "three"], echo)
    assert "no command /oops" in talk(["/oops now", "one"], echo)


def test_a_line_that_fails_ends_neither_the_chat_nor_the_conversation():
    def picky(messages):
        if messages[-1]["content"] == "bad":
            raise UserError("this cannot be answered")
        yield from echo(messages)

    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    said = talk(["one", "bad", broken, "", "two \udc80"], picky)
    assert "this cannot be answered\n" in said and "not UTF-8" in said
    assert said.endswith("[3] two ?\n\n")


def test_the_oldest_turns_go_when_the_context_is_full_and_the_chat_says_so():
    def short(messages):
        if len(messages) > 3:
            raise TooLong("too long")
        return echo(messages)

    said = talk(["one", "two", "three", "four"], short)
    assert said.count("oldest question and answer were dropped") == 2
    assert "[3] four" in said
    assert talk(["one"], lambda messages: short(messages * 4)) == "too long\n\n"


def test_an_interrupted_answer_is_the_answer_so_far():
    def interrupted(messages):
        yield "half"
        raise KeyboardInterrupt

    assert talk(["one"], interrupted) == "half …\n\n"


@pytest.mark.parametrize("with_prefix", [False, True])
def test_streamed_pieces_joined_are_the_generated_answer(tiny_model, rng, with_prefix):
    prefix = random_prefix(rng, tiny_model.config, 6) if with_prefix else None
    counts = []
    for seed in range(4):
        options = {"prefix": prefix, "max_tokens": 17, "temperature": 1.5, "seed": seed}
        pieces = list(cj.stream(tiny_model, "Go on", **options))
        assert "".join(pieces) == cj.generate(tiny_model, "Go on", **options)
        assert all(pieces)
        counts.append(len(pieces))
    # An answer may be empty; most take more than one dispatch.
    assert max(counts) > 1


def test_a_conversation_beyond_the_context_is_refused_before_the_first_piece(tiny_model):
    with pytest.raises(TooLong, match="context has 512"):
        cj.stream(tiny_model, "the cat and the hat " * 200, max_tokens=9)
