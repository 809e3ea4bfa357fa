"""SentencePiece models of GGUF files and of directories, against llama.cpp and sentencepiece itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jinja2
import pytest
import sentencepiece
from chat_templates import GEMMA3
from oracles.llama_server import LlamaServer
from texts import HAND_PICKED, SPLIT_TEXTS
from trained_tokenizers import sentence_piece_gguf, sentence_piece_model, toy_pieces  # noqa: F401

from cartridges_jax.formats.gguf import GGUFFile
from cartridges_jax.formats.wheels import cache_dir
from cartridges_jax.text.chat import ChatTemplate
from cartridges_jax.text.sentence_piece import SentencePieceTokenizer
from cartridges_jax.text.tokenizer import tokenizer_from_directory, tokenizer_from_gguf


@pytest.mark.parametrize("space_in_front", [False, True])
def test_sentence_piece_ids_are_those_of_llama_cpp(sentence_piece_model, tmp_path, space_in_front):
    pytest.importorskip("xllamacpp", reason="xllamacpp, the tokenization oracle, is not installed")
    file = sentence_piece_gguf(tmp_path / "tiny.gguf", sentence_piece_model, space_in_front=space_in_front)
    tokenizer, llama = tokenizer_from_gguf(file), LlamaServer(file.path)
    for text in SPLIT_TEXTS:
        # llama.cpp writes a space behind user-defined tokens too, sentencepiece does not.
        if space_in_front and ("\n" in text or "<b>" in text):
            continue
        for control in (False, True):
            assert tokenizer.encode(text, control=control) == llama.tokenize(text, control=control), repr(text)


def test_sentence_piece_ids_are_those_of_its_own_package(sentence_piece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece_model)
    tokenizer = tokenizer_from_directory(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentence_piece_model)
    for text in SPLIT_TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text), repr(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, theirs.vocab_size())


def test_the_space_in_front_stands_at_the_start_and_behind_control_tokens_only(sentence_piece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece_model)
    tokenizer = tokenizer_from_directory(tmp_path)
    start, control, text = (
        tokenizer.encode_with_offsets("xa", after=after)[0] for after in ("start", "control", "text")
    )
    assert start == control != text
    assert tokenizer.decode(start) == "xa"
    assert tokenizer.decode([2, *start]) == "xa" and tokenizer.decode([*start, *text]) == "xaxa"


def test_user_defined_runs_of_spaces_are_found_though_a_gguf_file_writes_them_plainly():
    tokenizer = SentencePieceTokenizer(**toy_pieces(("▁", 1), ("  ", 4)), space_in_front=False)
    assert tokenizer.encode("a  a a") == [259, 261, 259, 260, 259]
    assert tokenizer.encode_with_offsets("a  a a")[1] == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]
    assert tokenizer.decode([259, 261, 259]) == "a  a"


def test_tokens_added_to_a_sentence_piece_model_are_found(sentence_piece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece_model)
    size = tokenizer_from_directory(tmp_path).vocab_size
    added = {
        str(size): {"content": "<|turn|>", "special": True},
        str(size + 1): {"content": "<tool>", "special": False},
    }
    config = {"added_tokens_decoder": added, "bos_token": "<s>", "eos_token": "<|turn|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_from_directory(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 2, size)
    assert tokenizer.encode("<tool>")[-1] == size + 1
    assert size not in tokenizer.encode("<|turn|>") and tokenizer.encode("<|turn|>", control=True) == [size]


@pytest.fixture(scope="module")
def gemma() -> GGUFFile:
    path = Path(os.environ.get("CARTRIDGES_JAX_GEMMA", cache_dir() / "gemma-3-270m-q4_k_m.gguf"))
    if not path.is_file():
        pytest.skip(f"Gemma's GGUF file is not at {path} (CARTRIDGES_JAX_GEMMA names another place)")
    return GGUFFile(path)


def test_gemma_is_tokenized_as_by_llama_cpp(gemma):
    pytest.importorskip("xllamacpp", reason="xllamacpp, the tokenization oracle, is not installed")
    tokenizer, llama = tokenizer_from_gguf(gemma), LlamaServer(gemma.path)
    html = ["<h1>a</h1>\n\n\n\n<table>", "<start_of_turn>user\n<end_of_turn>", "a\t\t\tb", "\n" * 40, " " * 40 + "x"]
    for text in [*SPLIT_TEXTS, *html]:
        for control in (False, True):
            assert tokenizer.encode(text, control=control) == llama.tokenize(text, control=control), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in HAND_PICKED:
        offsets = tokenizer.encode_with_offsets(text)[1]
        assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text)))
    messages = [
        {"role": r, "content": c}
        for r, c in zip(["system", "user", "assistant", "user"], ["S.\n", " a <h1>", "é\n\n", "日"])
    ]
    rendered = ChatTemplate(GEMMA3, tokenizer).render(messages, add_generation_prompt=True)
    text = jinja2.Template(GEMMA3, trim_blocks=True, lstrip_blocks=True).render(
        messages=messages, bos_token="<bos>", add_generation_prompt=True
    )
    assert rendered.token_ids == llama.tokenize(text, control=True)
    chat = ChatTemplate.from_gguf(gemma, tokenizer)
    assert chat.is_plain and tokenizer.token_text(chat.end_of_turn_id) == "\n"
    assert {tokenizer.decode([i]).strip("\n") for i in chat.stop_ids} == {""} and len(chat.stop_ids) > 31
