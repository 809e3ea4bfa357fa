"""Hugging Face's tokenizer.json, against the tokenizers package on the same file."""

from __future__ import annotations

import json

import pytest
from texts import SPLIT_TEXTS
from tokenizers import Tokenizer as FastTokenizer
from trained_tokenizers import CONTROL, FAST_KINDS, fast_tokenizer

from cartridges_jax.text.tokenizer import Tokenizer, tokenizer_from_directory


@pytest.fixture(params=FAST_KINDS)
def fast(request, tmp_path) -> tuple[FastTokenizer, Tokenizer]:
    machine = fast_tokenizer(request.param)
    machine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "</s>"}}))
    return machine, tokenizer_from_directory(tmp_path)


def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_package(fast):
    theirs, ours = fast
    compared = 0
    for text in [*SPLIT_TEXTS, "a<think>b</s", "<think>  x"]:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, control=True) == expected, repr(text)
        if not any(token in text for token in ours.control_tokens):
            assert ours.encode(text) == expected, repr(text)
            compared += 1
    assert compared > 150


def test_a_tokenizer_json_names_its_special_tokens(fast):
    theirs, ours = fast
    assert ours.bos_id is None
    assert ours.eos_id == theirs.token_to_id("</s>")
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=True)
    assert ours.control_tokens == {token: theirs.token_to_id(token) for token in CONTROL}
    assert ours.encode("<think>")[-1:] == [theirs.token_to_id("<think>")]


def test_ids_above_the_vocabulary_are_decoded_as_by_the_tokenizers_package(fast):
    theirs, ours = fast
    ids, above = ours.encode("a naïve b"), ours.vocab_size
    for mixed in ([above], [above, *ids], [*ids[:2], above + 9, *ids[2:], above]):
        assert ours.decode(mixed) == theirs.decode(mixed), mixed
    assert ours.decode([above, *ids]) == "a naïve b"


def test_the_fingerprint_of_a_tokenizer_json_ignores_what_does_not_decide_ids(tmp_path):
    fast_tokenizer("gemma").save(str(tmp_path / "tokenizer.json"))
    first = tokenizer_from_directory(tmp_path).fingerprint
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    changed = tokenizer_from_directory(tmp_path)
    assert changed.fingerprint == first and len(changed.encode("a b c d e f g h")) > 5
    document["model"]["merges"] = document["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert tokenizer_from_directory(tmp_path).fingerprint != first
