"""SmolLM2-135M-Instruct: our logits against transformers' and llama.cpp's of the same file.

With `-n`, all tests here run in one process (see conftest.py), so that the model is loaded once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.llama_server import LlamaServer
from tiny import rope_base, twin_of, twin_run

from cartridges_jax import sampling
from cartridges_jax.corpus import QUICKSTART, read_corpus
from cartridges_jax.errors import UserError
from cartridges_jax.formats.sources import locate
from cartridges_jax.models import load_model
from cartridges_jax.quantized import num_bytes

NAME = "smollm2-135m-instruct"
DATA = Path(os.environ.get("CARTRIDGES_JAX_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")
HF_NAMES = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture(scope="session")
def model():
    try:
        return load_model(NAME)
    except UserError as error:
        pytest.skip(f"the model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def twin(model):
    """Transformers with our dequantised weights, so that what differs is the computation."""
    weights = {
        "model.embed_tokens.weight": np.asarray(model.params["embedding"]),
        "model.norm.weight": np.asarray(model.params["final_norm"]),
    }
    for name, stacked in model.params["layers"]["0"].items():
        for layer, value in enumerate(np.asarray(stacked)):
            weights[f"model.layers.{layer}.{HF_NAMES[name]}.weight"] = value.T
    return twin_of(weights, model.config)


@pytest.fixture(scope="session")
def texts(model):
    """Two stretches of 1,000 tokens: the quickstart's document, and other prose."""
    quickstart = read_corpus(QUICKSTART).text
    articles = DATA / "squad_v2_dev_8_articles.json"
    if articles.is_file():
        first = json.loads(articles.read_text(encoding="utf-8"))["data"][0]
        other = "\n".join(paragraph["context"] for paragraph in first["paragraphs"])
    else:
        other = " ".join(reversed(quickstart.split(". ")))
    stretches = [model.tokenizer.encode(text)[:1000] for text in (quickstart, other)]
    assert [len(stretch) for stretch in stretches] == [1000, 1000]
    return stretches


def assert_equal_logits(found, expected):
    expected = expected.numpy()
    assert np.isfinite(found).all() and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-3
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.999


def test_the_config_is_the_published_one(model):
    config = model.config
    assert (config.num_layers, config.d_model, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.head_dim, config.d_ff, config.vocab_size) == (64, 1536, 49152)
    assert (rope_base(config), config.context_length, config.tie_embeddings) == (100_000.0, 8192, True)
    assert config.norm_eps == pytest.approx(1e-5)


@pytest.mark.parametrize("stretch", [0, 1])
def test_logits_of_a_thousand_positions_equal_transformers(model, twin, texts, stretch):
    assert_equal_logits(sampling.logits(model, texts[stretch]), twin_run(twin, texts[stretch]))


def test_logits_behind_a_prefix_of_300_tokens_equal_transformers(model, twin, texts):
    document, conversation = texts[0][:300], texts[1][:700]
    prefix = sampling.prefill(model, document)
    found = sampling.logits(model, conversation, prefix)
    assert_equal_logits(found, twin_run(twin, conversation, keys=prefix.keys, values=prefix.values))
    # … and equal those of the whole text, whose keys and values transformers makes itself.
    assert_equal_logits(found[:100], twin_run(twin, document + conversation[:100])[300:])


def test_greedy_tokens_and_their_probabilities_are_llama_cpps_of_the_same_file(model):
    """Independent of our reading of the file, the un-permutation of q/k rows included.

    llama.cpp multiplies 4-bit weights with activations rounded to 8 bits, hence the tolerance.
    """
    text = read_corpus(QUICKSTART).text
    head = model.chat.system_prefix("").token_ids[:-2] + model.tokenizer.encode(text)[:300]
    close = model.chat.render_continuation([{"role": "user", "content": "What is this text about?"}]).token_ids
    prompt = head + [model.chat.end_of_turn_id, *model.tokenizer.encode("\n"), *close]
    found = LlamaServer(locate(NAME), context=1024).agreement(model, prompt, 48)
    assert found.num_tokens >= 40 and found.same >= 0.9
    assert len(found.differences) > 48 and np.abs(found.differences).mean() < 0.2


def test_bfloat16_stays_close_to_float32(model, texts):
    tokens = texts[0][:200]
    exact = np.asarray(jax.nn.log_softmax(jnp.asarray(sampling.logits(model, tokens)), axis=-1))
    narrow = load_model(NAME, dtype="bfloat16")
    found = np.asarray(jax.nn.log_softmax(jnp.asarray(sampling.logits(narrow, tokens)), axis=-1))
    divergence = np.sum(np.exp(exact) * (exact - found), axis=-1)
    assert 0 < divergence.mean() < 0.02


@pytest.mark.parametrize(("weights", "most", "share"), [("int8", 0.01, 0.255), ("bfloat16", 0.002, 0.501)])
def test_smaller_weights_cost_little(model, texts, weights, most, share):
    """2,000 tokens of both texts: KL from the float32 model; bytes against the float32 model's."""
    rounded = load_model(NAME, weights=weights)
    divergences = []
    for tokens in texts:
        exact = np.asarray(jax.nn.log_softmax(jnp.asarray(sampling.logits(model, tokens)), axis=-1))
        found = np.asarray(jax.nn.log_softmax(jnp.asarray(sampling.logits(rounded, tokens)), axis=-1))
        divergences.append(np.sum(np.exp(exact) * (exact - found), axis=-1))
    divergence = np.concatenate(divergences)
    print(f"{weights}: KL {divergence.mean():.5f}, {num_bytes(rounded.params) / 1e6:.0f} MB")
    assert divergence.shape == (2000,) and 0 < divergence.mean() < most
    assert num_bytes(rounded.params) < share * num_bytes(model.params)
