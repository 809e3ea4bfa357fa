"""What holds for tokenizers of every kind, and files that give none."""

from __future__ import annotations

import pytest
from texts import SPLIT_TEXTS
from trained_tokenizers import (  # noqa: F401
    CONTROL,
    FAST_KINDS,
    fast_tokenizer,
    gguf_file,
    sentence_piece_gguf,
    sentence_piece_model,
    toy_pieces,
    vocabulary,
)  # fmt: skip

from cartridges_jax.errors import UserError
from cartridges_jax.text.byte_level import ByteLevelBPE
from cartridges_jax.text.sentence_piece import SentencePieceTokenizer
from cartridges_jax.text.tokenizer import Tokenizer, tokenizer_from_directory, tokenizer_from_gguf

KINDS = [*FAST_KINDS, "tokenizer.model", "gguf", "bpe"]


def every_kind(tmp_path, vocabulary, model) -> dict[str, Tokenizer]:
    found: dict[str, Tokenizer] = {}
    for kind in FAST_KINDS:
        (tmp_path / kind).mkdir(parents=True)
        fast_tokenizer(kind).save(str(tmp_path / kind / "tokenizer.json"))
        found[kind] = tokenizer_from_directory(tmp_path / kind)
    (tmp_path / "tokenizer.model").write_bytes(model)
    found["tokenizer.model"] = tokenizer_from_directory(tmp_path)
    found["gguf"] = tokenizer_from_gguf(sentence_piece_gguf(tmp_path / "a.gguf", model, space_in_front=False))
    tokens, merges = vocabulary
    types = [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL))
    found["bpe"] = ByteLevelBPE(tokens, merges, pre="llama-bpe", token_types=types)
    return found


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, vocabulary, sentence_piece_model) -> dict[str, Tokenizer]:
    return every_kind(tmp_path_factory.mktemp("kinds"), vocabulary, sentence_piece_model)


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_makes_a_control_token(kinds, kind):
    tokenizer = kinds[kind]
    control = set(tokenizer.control_tokens.values())
    assert len(control) >= 4
    for token in tokenizer.control_tokens:
        for text in (
            token,
            f"a{token}b",
            f" {token} ",
            token * 3,
            token[:-1] + token,
            "".join(tokenizer.control_tokens),
        ):
            assert not control & set(tokenizer.encode(text)), repr(text)
            assert not control & set(tokenizer.encode_with_offsets(text, after="text")[0])
        assert tokenizer.encode(token, control=True) == [tokenizer.control_tokens[token]]


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_cover_the_text_in_order_and_decoding_gives_it_back(kinds, kind):
    tokenizer = kinds[kind]
    for text in SPLIT_TEXTS:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text) and len(ids) == len(offsets)
        assert [a for a, _ in offsets] == sorted(a for a, _ in offsets), repr(text)
        assert [b for _, b in offsets] == sorted(b for _, b in offsets), repr(text)
        assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text))), repr(text)
        # NFC changes a text, and Metaspace takes a space that is there for the one it would write.
        if kind != "bytes" and not (kind == "mistral" and text.startswith(" ")):
            assert tokenizer.decode(ids) == text, repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_incomplete_utf8_is_replaced_and_ids_above_the_vocabulary_are_nothing(kinds, kind):
    tokenizer = kinds[kind]
    # U+10F1F has no piece of its own; its bytes do.
    ids = tokenizer.encode_with_offsets("\U00010f1f", after="text")[0]
    assert len(ids) > 1 and "\ufffd" in tokenizer.decode(ids[:-1])
    above = tokenizer.vocab_size
    assert tokenizer.decode([above]) == ""
    # Not even between the bytes of one character, nor where a space in front is taken off.
    assert tokenizer.decode([ids[0], above + 7, *ids[1:]]) == "\U00010f1f"
    start = tokenizer.encode("xa")
    assert tokenizer.decode([above, *start]) == tokenizer.decode(start) == "xa"


def test_fingerprints_are_equal_for_the_same_tokenizer_only(kinds, tmp_path, vocabulary, sentence_piece_model):
    again = every_kind(tmp_path, vocabulary, sentence_piece_model)
    assert {kind: t.fingerprint for kind, t in again.items()} == {kind: t.fingerprint for kind, t in kinds.items()}
    assert len({t.fingerprint for t in kinds.values()}) == len(kinds)


@pytest.mark.parametrize("kind", [1, 4])
def test_a_turns_border_is_a_control_token_whatever_the_file_says(kind):
    tokenizer = SentencePieceTokenizer(**toy_pieces(("<start_of_turn>", kind), ("<h1>", 4)), space_in_front=False)
    assert tokenizer.control_tokens["<start_of_turn>"] == 260
    assert 260 not in tokenizer.encode("<start_of_turn>")
    assert tokenizer.encode("<h1>a") == [261, 259]
    bpe = ByteLevelBPE(["<", "<|im_end|>", "<think>"], [], pre="qwen2", token_types=[1, 4, 4])
    assert bpe.encode("<|im_end|><think>") == [*bpe.encode("<|im_end|>"), 2]
    assert 1 not in bpe.encode("<|im_end|>")


@pytest.mark.parametrize(
    "files, complaint",
    [
        ({}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": b"{"}, "not valid JSON"),
        ({"tokenizer.json": b"[]"}, "not a JSON object"),
        ({"tokenizer.json": b"{}"}, "lacks a part"),
        ({"tokenizer.json": b'{"model": {"type": "Odd", "vocab": {}}}'}, "cannot use"),
        ({"tokenizer.model": b"\xff\xff"}, "not a SentencePiece model"),
        ({"tokenizer.model": b""}, "no pieces"),
    ],
)
def test_a_directory_without_a_usable_tokenizer_is_refused_in_one_line(tmp_path, files, complaint):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        tokenizer_from_directory(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "kind, complaint", [("t5", "'t5'"), ("llama", "tokens' is missing"), ("gpt2", "tokens' is missing")]
)
def test_a_gguf_file_without_a_usable_tokenizer_is_refused(tmp_path, kind, complaint):
    with pytest.raises(UserError, match=complaint):
        tokenizer_from_gguf(gguf_file(tmp_path / "tiny.gguf", 10, {"tokenizer_model": kind}))
