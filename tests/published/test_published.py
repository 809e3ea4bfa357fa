"""Published model directories, tiny: each loads, chats two turns, and stops where its files say."""

from __future__ import annotations

import dataclasses

import pytest
from published_models import PUBLISHED, write

import cartridges_jax as cj
from cartridges_jax import sampling


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """(its facts, the tiny model)."""
    directory = tmp_path_factory.mktemp("published") / "model"
    write(request.param, directory)
    return PUBLISHED[request.param], cj.load_model(str(directory))


def drawing(model, token_id):
    """The model that draws this token always."""
    name = "embedding" if model.config.tie_embeddings else "lm_head"
    head = model.params[name].at[:, 0].set(1).at[token_id, 0].set(2)
    return dataclasses.replace(model, params={**model.params, name: head})


def prompt_of(model):
    return model.chat.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True).token_ids


def test_a_published_model_chats_two_turns(published):
    _, model = published
    talking = drawing(model, model.tokenizer.encode("x")[-1])
    turns = [{"role": "user", "content": "Hello the island"}]
    first = cj.generate(talking, [turns], max_tokens=5)[0]
    assert first == "xxxxx"
    turns += [{"role": "assistant", "content": f"hm</think>{first}"}, {"role": "user", "content": "it's"}]
    assert cj.generate(talking, [turns], max_tokens=5) == ["xxxxx"]
    rendered = model.tokenizer.decode(model.chat.render(turns).token_ids, skip_control=False)
    assert first in rendered and "it's" in rendered


def test_a_published_model_stops_at_each_of_its_ends_and_at_no_other_token(published):
    facts, model = published
    ids = {text: model.tokenizer.control_tokens[text] for text in facts.ends}
    assert model.chat.stop_ids == set(ids.values())
    for token_id in ids.values():
        (drawn,) = sampling.generate_tokens(drawing(model, token_id), [prompt_of(model)], max_tokens=5)
        assert list(drawn.token_ids) == [token_id]
    for text in set(facts.tokens.values()) - set(facts.ends):
        other = model.tokenizer.control_tokens[text]
        (drawn,) = sampling.generate_tokens(drawing(model, other), [prompt_of(model)], max_tokens=5)
        assert list(drawn.token_ids) == [other] * 5
        break


def test_tokens_without_a_row_can_neither_be_drawn_nor_typed(published):
    facts, model = published
    assert model.tokenizer.vocab_size == model.config.vocab_size - facts.spare_rows
    for text in facts.beyond:
        assert text not in model.tokenizer.control_tokens
        for control in (False, True):
            ids = model.tokenizer.encode(f"a {text} b", control=control)
            assert max(ids) < model.config.vocab_size and model.tokenizer.decode(ids) == f"a {text} b"


def test_what_the_files_say_beyond_sizes_reaches_the_config(published):
    facts, model = published
    scaling = facts.config.get("rope_scaling") or {}
    factors = model.config.period[-1].rope.factors
    assert bool(factors) == bool(scaling)
    if scaling.get("type") == "yarn":
        assert model.config.context_length == 131_072 and model.config.period[0].rope.scale > 1
    else:
        assert model.config.context_length == facts.config["max_position_embeddings"]
    assert model.config.tie_embeddings == facts.config.get("tie_word_embeddings", True)
