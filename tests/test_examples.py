"""Conversations rendered to examples: the tokens, and the targets where they belong."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_texts import FAMILIES, save_tokenizer

from cartridges_jax.data.examples import render_examples
from cartridges_jax.data.schema import Conversation, Message, TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.text.chat import ChatTemplate
from cartridges_jax.text.tokenizer import tokenizer_from_directory


def message(model, role, text, *, top=True, end=True, k=3):
    ids = model.tokenizer.encode(text) + ([model.chat.end_of_turn_id] if end else [])
    logprobs = None
    if top:
        table = np.stack([np.asarray(ids), np.zeros(len(ids)), np.ones(len(ids))], axis=1)[:, :k]
        logprobs = TopLogprobs.from_dense(table.astype(np.int32), np.log(np.full((len(ids), k), 0.3, np.float32)))
    return Message(role, text, ids, logprobs)


def assert_targets_predict_the_first_stored_id(example):
    np.testing.assert_array_equal(example.tokens[example.rows + 1], example.ids[:, 0])


def test_a_conversation_is_rendered_as_the_template_continues_a_prefix(tiny_model):
    user, assistant = (
        message(tiny_model, "user", "the cat?", top=False),
        message(tiny_model, "assistant", " and the hat."),
    )
    (example,) = render_examples(Conversation([user, assistant], {}), tiny_model.chat)
    whole = tiny_model.chat.render_continuation(
        [{"role": "user", "content": user.content}, {"role": "assistant", "content": assistant.content}],
        add_generation_prompt=False,
    ).token_ids
    closing = len(whole) - len(example.tokens)
    assert tiny_model.tokenizer.decode(whole[len(example.tokens) :]) == "\n" and closing == 1
    np.testing.assert_array_equal(example.tokens, whole[: len(example.tokens)])
    assert_targets_predict_the_first_stored_id(example)
    # The end-of-turn token is a target like the others.
    assert len(example.rows) == len(assistant.token_ids)
    assert example.tokens[example.rows[-1] + 1] == tiny_model.chat.end_of_turn_id


def test_a_conversation_of_two_rounds_is_rendered_as_the_template_does(tiny_model):
    turns = [
        message(tiny_model, *turn)
        for turn in (("user", "the cat?"), ("assistant", "one."), ("user", "and?"), ("assistant", "two."))
    ]
    (example,) = render_examples(Conversation(turns, {}), tiny_model.chat)
    whole = tiny_model.chat.render_continuation(
        [{"role": turn.role, "content": turn.content} for turn in turns], add_generation_prompt=False
    ).token_ids
    assert_targets_predict_the_first_stored_id(example)
    np.testing.assert_array_equal(example.tokens, whole[: len(example.tokens)])


@pytest.mark.parametrize("name", ["deepseek-r1", "qwq", "qwen3", "qwen3-thinking"])
def test_every_target_is_trained_in_the_context_that_serving_gives_it(name, tmp_path):
    """Reasoning models' templates leave the thinking of earlier answers out."""
    save_tokenizer(name, tmp_path)
    tokenizer = tokenizer_from_directory(tmp_path)
    chat = ChatTemplate.from_directory(tmp_path, tokenizer, thinking=FAMILIES[name].thinking)
    model = SimpleNamespace(tokenizer=tokenizer, chat=chat)
    thought = "hm\n</think>\n\nHello" if name != "qwen3" else "Hello"
    roles = [("user", "the "), ("assistant", thought), ("user", "x"), ("assistant", thought)]
    turns = [message(model, role, text, top=role == "assistant") for role, text in roles]
    first, second = render_examples(Conversation(turns, {}), chat)
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    for example, number in ((first, 1), (second, 3)):
        prompt = chat.render_continuation(plain[:number], add_generation_prompt=True).token_ids
        assert example.tokens.tolist() == prompt + list(turns[number].token_ids)
        assert len(example.rows) == len(turns[number].token_ids)
        assert_targets_predict_the_first_stored_id(example)


@pytest.mark.parametrize("end", [True, False])
def test_all_targets_take_the_users_tokens_too(tiny_model, end):
    turns = [
        message(tiny_model, "user", "where is the cat of the hat", end=end),
        message(tiny_model, "assistant", "in the hat", end=end),
    ]
    conversation = Conversation(turns, {})
    (example,) = render_examples(conversation, tiny_model.chat, targets="all")
    assert len(example.rows) == sum(len(turn.token_ids) for turn in turns)
    assert_targets_predict_the_first_stored_id(example)
    (fewer,) = render_examples(conversation, tiny_model.chat)
    assert len(fewer.rows) == len(turns[1].token_ids)


def test_all_targets_of_a_longer_conversation_are_those_of_every_message(tiny_model):
    messages = [
        message(tiny_model, "user", "where is the cat", end=False),
        message(tiny_model, "assistant", "in the hat"),
        message(tiny_model, "user", "and the hat", end=False),
        message(tiny_model, "assistant", "on the cat", end=False),
    ]
    (example,) = render_examples(Conversation(messages, {}), tiny_model.chat, targets="all")
    assert len(example.rows) == sum(len(m.token_ids) for m in messages)
    assert_targets_predict_the_first_stored_id(example)


def test_a_users_tokens_that_the_text_does_not_encode_to_are_no_targets(tiny_model):
    user, assistant = message(tiny_model, "user", "where is the cat"), message(tiny_model, "assistant", "in the hat")
    other = dataclasses.replace(user, content="where is the dog")
    (example,) = render_examples(Conversation([other, assistant], {}), tiny_model.chat, targets="all")
    assert len(example.rows) == len(assistant.token_ids)
    assert_targets_predict_the_first_stored_id(example)


def test_a_conversation_without_teacher_logprobs_is_refused_by_its_id(tiny_model):
    turns = [message(tiny_model, role, "the cat", top=False) for role in ("user", "assistant")]
    with pytest.raises(UserError, match="c17"):
        render_examples(Conversation(turns, {"id": "c17"}), tiny_model.chat)
    with pytest.raises(UserError, match="both"):
        render_examples(Conversation(turns, {"id": "c17"}), tiny_model.chat, targets="both")
