"""Whole directories as they are published: config, weights, tokenizer and template, to an answer."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from families import FAMILIES, build_twin, save
from peers import torch
from tiny_texts import FAMILIES as TEXTS
from tiny_texts import save_tokenizer

import cartridges_jax as cj
from cartridges_jax import sampling
from cartridges_jax.errors import UserError
from cartridges_jax.models.model import fastest_weights

# SmolLM3's and Granite's own templates write the day's date.
PAIRS = [
    ("llama31", "llama3.1"), ("qwen3", "qwen3"), ("gemma3", "gemma3"), ("mistral", "mistral-v2"), ("smollm3", "qwen3"),
    ("granite", "qwen3"),
]  # fmt: skip
CONVERSATION = [
    {"role": "user", "content": "Hello, the island?"},
    {"role": "assistant", "content": "x = 1"},
    {"role": "user", "content": "it's naïve"},
]


def write(name, texts, directory):
    theirs = save_tokenizer(texts, directory)
    twin = build_twin(FAMILIES[name], seed=3, vocab_size=len(theirs) + 3)  # published embeddings have spare rows
    save(twin, directory)
    return twin, theirs


@pytest.mark.parametrize(("name", "texts"), PAIRS)
def test_a_directory_is_loaded_and_answers_as_transformers_does(name, texts, tmp_path):
    twin, theirs = write(name, texts, tmp_path)
    model = cj.load_model(str(tmp_path))
    ids = theirs.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_dict=False, enable_thinking=TEXTS[texts].thinking
    )
    rendered = model.chat.render(CONVERSATION, add_generation_prompt=True)
    assert rendered.token_ids == ids
    np.testing.assert_allclose(cj.logits(model, ids), twin(torch.tensor([ids])).logits[0], rtol=0, atol=1e-4)
    expected = twin.generate(
        torch.tensor([ids]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=sorted(model.chat.stop_ids),
        pad_token_id=0,
    )[0, len(ids) :]
    assert cj.generate(model, [CONVERSATION], max_tokens=12) == [model.tokenizer.decode(expected.tolist()).strip()]


def test_a_spare_row_of_the_embedding_may_be_drawn_and_says_nothing(tmp_path):
    twin, theirs = write("llama31", "llama3.1", tmp_path)
    with torch.no_grad():
        # One of the two is above 0 whatever the hidden state, and all tokens of the vocabulary are at 0.
        twin.lm_head.weight.zero_()[-2:] = torch.tensor([[1.0], [-1.0]])
    save(twin, tmp_path)
    model = cj.load_model(str(tmp_path))
    prompt = model.chat.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True).token_ids
    (drawn,) = sampling.generate_tokens(model, [prompt], max_tokens=5)
    assert len(drawn.token_ids) == 5 and min(drawn.token_ids) >= model.tokenizer.vocab_size == len(theirs)
    assert cj.generate(model, ["Hello"], max_tokens=5) == [""]
    # … and may stand in a conversation that goes on.
    assert cj.logits(model, prompt + drawn.token_ids).shape == (len(prompt) + 5, len(theirs) + 3)


def test_a_cartridge_stands_for_the_system_message_of_a_model_without_one(tmp_path):
    """Gemma writes the system text into the first user turn: prefix and continuation are the whole rendering."""
    twin, theirs = write("gemma3", "gemma3", tmp_path)
    model = cj.load_model(str(tmp_path))
    head = model.chat.system_prefix("the island naïve").token_ids
    turn = model.chat.render_continuation([{"role": "user", "content": "Hello?"}]).token_ids
    found = cj.logits(model, turn, prefix=cj.prefill(model, head))
    np.testing.assert_allclose(found, twin(torch.tensor([head + turn])).logits[0, len(head) :], rtol=0, atol=1e-4)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    write("llama31", "llama3.1", tmp_path)
    (tmp_path / "other").mkdir()
    save_tokenizer("gemma3", tmp_path / "other")
    twin = build_twin(FAMILIES["llama31"], seed=3, vocab_size=50)
    save(twin, tmp_path / "other")
    with pytest.raises(UserError, match="do not belong together"):
        cj.load_model(str(tmp_path / "other"))


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_directory_without_one_of_its_files_is_refused(missing, tmp_path):
    write("llama31", "llama3.1", tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=missing.split(".")[0]):
        cj.load_model(str(tmp_path))


def test_weights_that_are_not_finite_leave_nothing_loaded(tmp_path):
    twin, _ = write("llama31", "llama3.1", tmp_path)
    with torch.no_grad():
        twin.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    save(twin, tmp_path)
    with pytest.raises(UserError, match="layers.2.mlp.up_proj.weight holds values that are not finite"):
        cj.load_model(str(tmp_path))
    shutil.rmtree(tmp_path)


def test_unknown_options_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="int4"):
        cj.load_model(str(tmp_path), weights="int4")


@pytest.mark.parametrize(
    ("dtype", "flags", "expected"),
    [
        ("float32", "fpu avx512f avx512_bf16", "bfloat16"),
        ("float32", "fpu amx_bf16 amx_tile", "bfloat16"),
        ("float32", "fpu avx2 avx512f", ""),
        ("bfloat16", "fpu avx512_bf16", ""),
    ],
)
def test_weights_are_narrow_where_the_processor_multiplies_such(dtype, flags, expected, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
    assert fastest_weights(dtype, cpuinfo) == expected
    assert fastest_weights(dtype, tmp_path / "none") == ""
