"""Gemma-3-270M, for those who accepted its terms: our logits against transformers' and llama.cpp's of the same file."""

from __future__ import annotations

import os

import numpy as np
import pytest
from oracles.llama_server import LlamaServer
from peers import torch, transformers
from tiny import twin_run

from cartridges_jax import sampling
from cartridges_jax.corpus import QUICKSTART, read_corpus
from cartridges_jax.errors import UserError
from cartridges_jax.formats.sources import locate
from cartridges_jax.models import load_model
from cartridges_jax.models.layout import layer_path

NAME = "gemma3-270m"
HF_NAMES = {
    "attn_norm": "input_layernorm", "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture(scope="session")
def model():
    if not os.environ.get("CARTRIDGES_JAX_ACCEPT_GEMMA_TERMS"):
        pytest.skip(
            "set CARTRIDGES_JAX_ACCEPT_GEMMA_TERMS=1 to accept https://ai.google.dev/gemma/terms and test with Gemma"
        )
    try:
        return load_model(NAME)
    except UserError as error:
        pytest.skip(f"the model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def text(model):
    document = read_corpus(QUICKSTART).text
    tokens = [model.tokenizer.bos_id, *model.tokenizer.encode(document)][:1000]
    assert len(tokens) == 1000
    return tokens


@pytest.fixture(scope="session")
def twin(model):
    """Transformers with our dequantised weights."""
    config, params = model.config, model.params
    local, everywhere = config.period[0], config.period[-1]
    twin = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            num_hidden_layers=18,
            hidden_size=640,
            intermediate_size=2048,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            vocab_size=262_144,
            max_position_embeddings=32_768,
            sliding_window=512,
            rms_norm_eps=1e-6,
            query_pre_attn_scalar=256,
            attn_implementation="eager",
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": everywhere.rope.base},
                "sliding_attention": {"rope_type": "default", "rope_theta": local.rope.base},
            },
        )
    )
    state = {
        "model.embed_tokens.weight": params["embedding"],
        "lm_head.weight": params["embedding"],
        "model.norm.weight": params["final_norm"] - 1,
    }
    for layer in range(config.num_layers):
        path, index = layer_path(config, layer)
        node = params
        for key in path:
            node = node[key]
        for name, value in node.items():
            value = value[index]
            state[f"model.layers.{layer}.{HF_NAMES[name]}.weight"] = value.T if value.ndim == 2 else value - 1
    twin.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return twin.eval().requires_grad_(False)


def test_the_config_is_the_published_one(model):
    config = model.config
    assert (config.num_layers, config.d_model, config.num_heads, config.num_kv_heads, config.head_dim) == (
        18,
        640,
        4,
        1,
        256,
    )
    assert [kind.window for kind in config.period] == [512] * 5 + [0]
    assert [kind.rope.base for kind in config.period] == [1e4] * 5 + [1e6]


def test_logits_of_a_thousand_positions_equal_transformers(model, twin, text):
    found, expected = sampling.logits(model, text), twin_run(twin, text).numpy()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.999
    assert np.abs(found - expected).max() <= 1e-2


def test_logits_behind_a_prefix_longer_than_the_window_equal_transformers(model, twin, text):
    prefix = sampling.prefill(model, text[:700])
    found, expected = sampling.logits(model, text[700:], prefix), twin_run(twin, text).numpy()[700:]
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.999
    assert np.abs(found - expected).max() <= 1e-2


def test_greedy_tokens_and_their_probabilities_are_llama_cpps_of_the_same_file(model, text):
    """Independent of our reading of the file. llama.cpp rounds activations to 8 bits, hence the tolerance."""
    found = LlamaServer(locate(NAME), context=1024).agreement(model, text[:600], 40)
    assert found.same >= 0.85
    assert np.abs(found.differences).mean() < 0.25
