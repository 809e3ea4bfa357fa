"""From a GGUF file to parameters: the round trip through llama.cpp's layout, and damaged files."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import gguf_tensors, make_pair, permute, random_tokens, random_weights, run, tiny_config, twin_run, write_gguf

from cartridges_jax.errors import UserError
from cartridges_jax.models import load_model
from cartridges_jax.models.decoder import abstract_params
from cartridges_jax.models.gguf_names import params_from_gguf, unpermute_rows


class Tensors:
    """Tensors by name, in an order of one's own; a name may occur twice."""

    def __init__(self, tensors, names=None):
        self.tensors = tensors
        self.tensor_names = list(tensors) if names is None else names

    def read(self, name):
        return self.tensors[name]


@pytest.fixture
def tensors():
    config = tiny_config()
    return gguf_tensors(random_weights(config, seed=3), config)


def load(tensors, names=None, **config):
    config = tiny_config(**config)
    return params_from_gguf(Tensors(tensors, names), config, abstract_params(config), jnp.float32)


@pytest.mark.parametrize("num_heads", [1, 3, 4])
def test_unpermuting_undoes_llama_cpps_permutation(rng, num_heads):
    weight = rng.standard_normal((num_heads * 8, 5))
    assert not np.array_equal(permute(weight, num_heads), weight)
    np.testing.assert_array_equal(unpermute_rows(permute(weight, num_heads), num_heads), weight)


def test_a_permuted_row_pair_is_an_interleaved_pair():
    """Fixes the direction: row i and row i + H/2 of a head come to lie side by side in the file."""
    rows = np.arange(8)[:, None]
    assert permute(rows, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert unpermute_rows(permute(rows, 1), 1)[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_written_in_llama_cpps_layout_computes_as_in_transformers(tmp_path, rng, tied):
    # The two projections are permuted with different head counts.
    model, twin = make_pair(tmp_path, seed=int(rng.integers(1000)), tie_embeddings=tied, num_heads=8, num_kv_heads=2)
    assert model.config.tie_embeddings == tied
    tokens = random_tokens(rng, model.config, 30)
    np.testing.assert_allclose(run(model, tokens[None])[0][0], twin_run(twin, tokens), rtol=0, atol=1e-4)


def test_linear_weights_are_stored_in_by_out(tensors):
    params = load(tensors)
    np.testing.assert_array_equal(params["layers"]["down_proj"][1], tensors["blk.1.ffn_down.weight"].T)
    np.testing.assert_array_equal(params["embedding"], tensors["token_embd.weight"])


def test_the_order_of_the_tensors_does_not_matter(tensors, rng):
    names = rng.permutation(list(tensors)).tolist()
    jax.tree.map(np.testing.assert_array_equal, load(tensors, names), load(tensors))


def test_rope_frequencies_that_converters_add_are_passed_over(tensors):
    load(tensors | {"rope_freqs.weight": np.ones(8, np.float32)})


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.3.attn_q.weight", "output.weight", "blk.1.ffn_gate_exps.weight", "mm.0.weight"]
)
def test_a_tensor_without_a_parameter_is_refused_by_name(tensors, name):
    with pytest.raises(UserError, match=name):
        load(tensors | {name: tensors["token_embd.weight"]})


def test_a_tensor_that_occurs_twice_is_refused_by_name(tensors):
    with pytest.raises(UserError, match="blk.1.attn_k.weight occurs twice"):
        load(tensors, [*tensors, "blk.1.attn_k.weight"])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("blk.1.ffn_up.weight", "up_proj of layer 1"), ("token_embd.weight", "embedding"), ("output_norm.weight", "final_norm")],
)
def test_a_missing_tensor_is_named(tensors, name, complaint):
    del tensors[name]
    with pytest.raises(UserError, match=complaint):
        load(tensors)


def test_a_model_with_an_untied_head_needs_it(tensors):
    with pytest.raises(UserError, match="lm_head"):
        load(tensors, tie_embeddings=False)


@pytest.mark.parametrize("name", ["blk.2.attn_v.weight", "token_embd.weight", "output_norm.weight"])
def test_a_tensor_of_a_wrong_shape_is_refused_by_name(tensors, name):
    tensors[name] = tensors[name][:-2]
    with pytest.raises(UserError, match=f"{name} has shape"):
        load(tensors)


def test_a_projection_whose_rows_the_heads_do_not_divide_is_refused_by_name(tensors):
    tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"][:-3]
    with pytest.raises(UserError, match="blk.0.attn_q.weight"):
        load(tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blk.2.attn_q.weight", "output_norm.weight"])
def test_values_that_are_not_finite_are_refused_by_name(tensors, name, value):
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
        load(tensors)


def test_errors_reach_the_user_through_load_model(tmp_path, tensors):
    del tensors["blk.0.ffn_norm.weight"]
    path = write_gguf(tmp_path / "broken.gguf", tiny_config(), tensors)
    with pytest.raises(UserError, match="mlp_norm of layer 0"):
        load_model(str(path))
    with pytest.raises(UserError, match="float16"):
        load_model(str(path), dtype="float16")


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tmp_path, tensors):
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:-1]
    path = write_gguf(tmp_path / "short.gguf", tiny_config(), tensors)
    with pytest.raises(UserError, match="token_embd.weight has shape"):
        load_model(str(path))


def test_metadata_that_the_config_needs_is_asked_for_by_name():
    from cartridges_jax.models.config import config_from_gguf

    metadata = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64,
        "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 100,
    }  # fmt: skip
    config = config_from_gguf(metadata, tie_embeddings=True)
    # What the GGUF specification says holds where a key is absent.
    assert (config.num_kv_heads, config.head_dim, config.rope_base) == (4, 8, 10000.0)
    for key in ("llama.block_count", "llama.attention.layer_norm_rms_epsilon", "llama.context_length"):
        with pytest.raises(UserError, match=key):
            config_from_gguf({k: v for k, v in metadata.items() if k != key}, tie_embeddings=True)
    with pytest.raises(UserError, match="mamba"):
        config_from_gguf(metadata | {"general.architecture": "mamba"}, tie_embeddings=True)
    with pytest.raises(UserError, match="yarn"):
        config_from_gguf(metadata | {"llama.rope.scaling.type": "yarn"}, tie_embeddings=True)
