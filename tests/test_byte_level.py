"""Byte-level BPE of GGUF files, split before merging as llama.cpp splits."""

from __future__ import annotations

import pytest
from oracles.llama_server import LlamaServer
from texts import SPLIT_TEXTS
from trained_tokenizers import CONTROL, gguf_file, vocabulary  # noqa: F401

from cartridges_jax.errors import UserError
from cartridges_jax.text.byte_level import ByteLevelBPE
from cartridges_jax.text.tokenizer import tokenizer_from_gguf

SPLITTERS = ["smollm", "gpt-2", "llama-bpe", "qwen2"]


@pytest.mark.parametrize("pre", [*SPLITTERS, "refact", "dbrx", "olmo"])  # other names of some
def test_a_splitter_splits_as_llama_cpp_does(vocabulary, tmp_path, pre):
    pytest.importorskip("xllamacpp", reason="xllamacpp, the tokenization oracle, is not installed")
    tokens, merges = vocabulary
    types = [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL))
    parts = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": types,
        "token_merges": merges,
    }
    file = gguf_file(tmp_path / "tiny.gguf", len(tokens), {**parts, "bos_token_id": 0, "eos_token_id": 1})
    tokenizer, llama = tokenizer_from_gguf(file), LlamaServer(file.path)
    for text in SPLIT_TEXTS:
        for control in (False, True):
            assert tokenizer.encode(text, control=control) == llama.tokenize(text, control=control), repr(text)


def test_splitters_differ(vocabulary):
    tokens, merges = vocabulary
    text = "DON'T we'Re 12345678 foo_bar--baz!!\n\n?"
    assert len({tuple(ByteLevelBPE(tokens, merges, pre=pre).encode(text)) for pre in SPLITTERS}) == len(SPLITTERS)


@pytest.mark.parametrize("pre", ["default", "tekken"])
def test_a_splitter_that_is_not_known_is_named(pre):
    with pytest.raises(UserError, match=pre):
        ByteLevelBPE(["a"], [], pre=pre)
