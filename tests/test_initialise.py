"""Where a cartridge starts from: the first p tokens, against transformers' cache."""

from __future__ import annotations

import numpy as np
import pytest
from peers import torch

from cartridges_jax.distill.initialise import first_tokens, initialise_from_first_tokens
from cartridges_jax.errors import UserError


def test_the_first_p_tokens_keep_the_turns_close_last(tiny_model):
    text = "the cat and the hat of the other thing " * 5
    rendered = tiny_model.chat.system_prefix(text)
    end = rendered.spans[0][1]
    closing = rendered.token_ids[end:]
    assert tiny_model.tokenizer.decode(closing, skip_control=False) == "<|im_end|>\n"
    found = first_tokens(tiny_model, text, 24)
    assert len(found) == 24
    assert found[: 24 - len(closing)] == rendered.token_ids[: 24 - len(closing)]
    assert found[24 - len(closing) :] == closing


def test_an_initial_cartridge_holds_transformers_keys_and_values_of_those_tokens(tiny_pair):
    model, twin = tiny_pair
    text = "the cat and the hat of the other thing " * 5
    prefix = initialise_from_first_tokens(model, text, 24)
    assert (prefix.num_slots, prefix.next_position) == (24, 24)
    tokens = torch.tensor([first_tokens(model, text, 24)])
    layers = twin(tokens, use_cache=True).past_key_values.layers
    for layer, cached in enumerate(layers):
        np.testing.assert_allclose(prefix.keys[layer], cached.keys[0], atol=1e-4)
        np.testing.assert_allclose(prefix.values[layer], cached.values[0], atol=1e-4)


def test_a_cartridge_not_smaller_than_its_document_is_refused(tiny_model):
    text = "the cat and the hat " * 8
    length = len(tiny_model.chat.system_prefix(text).token_ids)
    assert len(first_tokens(tiny_model, text, length - 1)) == length - 1
    with pytest.raises(UserError, match=f"fills {length} tokens"):
        first_tokens(tiny_model, text, length)


def test_a_cartridge_without_room_for_content_is_refused_and_the_named_size_works(tiny_model):
    text = "the cat and the hat " * 8
    with pytest.raises(UserError, match="choose at least") as caught:
        first_tokens(tiny_model, text, 3)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    assert len(first_tokens(tiny_model, text, smallest)) == smallest
    with pytest.raises(UserError, match="choose at least"):
        first_tokens(tiny_model, text, smallest - 1)
