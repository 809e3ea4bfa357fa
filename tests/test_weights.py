"""From a file's tensors to parameters: layouts, damaged files, shards, 8 bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import permute
from tiny import (
    gguf_tensors,
    make_pair,
    random_prefix,
    random_tokens,
    random_weights,
    run,
    tiny_config,
    twin_of,
    twin_run,
    write_gguf,
)

from cartridges_jax.errors import UserError
from cartridges_jax.models import load_model
from cartridges_jax.models.families import read_gguf_metadata
from cartridges_jax.models.families.family import unpermute_rows
from cartridges_jax.models.families.llama import FAMILIES
from cartridges_jax.models.weights import load_params


class Tensors:
    """Tensors by name, in an order of one's own; a name may occur twice."""

    def __init__(self, tensors, names=None):
        self.tensors = tensors
        self.tensor_names = list(tensors) if names is None else names

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name, index=()):
        return self.tensors[name][index]

    def sha256(self):
        return ""


@pytest.fixture
def tensors():
    config = tiny_config()
    return gguf_tensors(random_weights(config, seed=3), config)


def load(tensors, names=None, *, stored="", sharding_of=None, **config):
    table = FAMILIES[0].gguf_names
    return load_params(
        Tensors(tensors, names), table, tiny_config(**config), jnp.float32, stored=stored, sharding_of=sharding_of
    )


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
    np.testing.assert_array_equal(params["layers"]["0"]["down_proj"][1], tensors["blk.1.ffn_down.weight"].T)
    np.testing.assert_array_equal(params["embedding"], tensors["token_embd.weight"])


def test_the_order_of_the_tensors_does_not_matter(tensors, rng):
    names = rng.permutation(list(tensors)).tolist()
    jax.tree.map(np.testing.assert_array_equal, load(tensors, names), load(tensors))


def test_rope_frequencies_that_converters_add_are_passed_over(tensors):
    load(tensors | {"rope_freqs.weight": np.ones(8, np.float32)})


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.3.attn_q.weight", "blk.1.ffn_gate_exps.weight", "mm.0.weight"]
)
def test_a_tensor_without_a_parameter_is_refused_by_name(tensors, name):
    with pytest.raises(UserError, match=name):
        load(tensors | {name: tensors["token_embd.weight"]})


def test_a_tensor_that_occurs_twice_is_refused_by_name(tensors):
    with pytest.raises(UserError, match="blk.1.attn_k.weight occurs twice"):
        load(tensors, [*tensors, "blk.1.attn_k.weight"])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("blk.1.ffn_up.weight", "up_proj of layer 1"),
        ("token_embd.weight", "embedding"),
        ("output_norm.weight", "final_norm"),
    ],
)
def test_a_missing_tensor_is_named(tensors, name, complaint):
    del tensors[name]
    with pytest.raises(UserError, match=complaint):
        load(tensors)


def test_a_head_beside_tied_embeddings_is_left_out(tensors):
    """As in transformers, which ties them over whatever the file holds."""
    assert "lm_head" not in load(tensors | {"output.weight": tensors["token_embd.weight"]})


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
    metadata = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64,
        "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 100,
    }  # fmt: skip

    def read(metadata):
        return read_gguf_metadata(metadata, tie_embeddings=True)[1]

    # What the GGUF specification says holds where a key is absent.
    config = read(metadata)
    assert (config.num_kv_heads, config.head_dim, config.period[0].rope.base) == (4, 8, 10000.0)
    for key in ("llama.block_count", "llama.attention.layer_norm_rms_epsilon", "llama.context_length"):
        with pytest.raises(UserError, match=key.removeprefix("llama.")):
            read({k: v for k, v in metadata.items() if k != key})
    for change, complaint in [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv"),
        ({"llama.attention.value_length": 16}, "value_length"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"split.count": 3}, "3 parts"),
    ]:
        with pytest.raises(UserError, match=complaint):
            read(metadata | change)


@pytest.mark.parametrize("block_values", [1, 1000, 2**23])
def test_the_size_of_the_blocks_does_not_matter(tensors, monkeypatch, block_values):
    kinds = ("", "int8", "bfloat16")
    expected = [load(tensors, stored=stored) for stored in kinds]
    monkeypatch.setattr("cartridges_jax.models.weights._BLOCK_VALUES", block_values)
    jax.tree.map(np.testing.assert_array_equal, [load(tensors, stored=stored) for stored in kinds], expected)


def dequantized(leaf, axis):
    return np.asarray(leaf.values, np.float32) * np.expand_dims(np.asarray(leaf.scale), axis)


def test_eight_bits_are_within_half_a_step_of_the_weights(tensors):
    exact, found = load(tensors), load(tensors, stored="int8")
    for name in ("q_proj", "down_proj"):
        weight, rounded = exact["layers"]["0"][name], found["layers"]["0"][name]
        assert rounded.values.dtype == jnp.int8 and rounded.scale.shape == (3, weight.shape[2])
        step = np.abs(weight).max(axis=1, keepdims=True) / 127
        assert (np.abs(dequantized(rounded, 1) - weight) <= 0.5001 * step).all()
        assert np.abs(rounded.values).max() == 127
    step = np.abs(exact["embedding"]).max(axis=1, keepdims=True) / 127
    assert (np.abs(dequantized(found["embedding"], 1) - exact["embedding"]) <= 0.5001 * step).all()
    assert found["final_norm"].dtype == jnp.float32


def test_narrow_matrices_hold_the_bfloat16_nearest_to_each_weight(tensors):
    exact, found = load(tensors), load(tensors, stored="bfloat16")
    for weight, narrow in (
        (exact["layers"]["0"]["down_proj"], found["layers"]["0"]["down_proj"]),
        (exact["embedding"], found["embedding"]),
    ):
        assert narrow.bits.dtype == jnp.uint16 and narrow.shape == weight.shape
        np.testing.assert_array_equal(narrow.values, weight.astype(jnp.bfloat16))
    assert found["final_norm"].dtype == jnp.float32


def test_an_eight_bit_model_computes_with_the_rounded_weights(tmp_path, rng):
    """The same logits as transformers' with weights rounded by this test."""
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_config(), gguf_tensors(random_weights(tiny_config(), 5), tiny_config())
    )
    model = load_model(str(path), weights="int8")
    weights = random_weights(tiny_config(), 5)
    for name, weight in weights.items():
        if weight.ndim == 2:
            step = np.abs(weight).max(axis=1, keepdims=True) / 127
            weights[name] = (np.rint(weight / step) * step).astype(np.float32)
    tokens = random_tokens(rng, model.config, 30)
    np.testing.assert_allclose(
        run(model, tokens[None])[0][0], twin_run(twin_of(weights, tiny_config()), tokens), rtol=0, atol=2e-4
    )


def test_a_cartridges_gradient_flows_through_eight_bit_weights(tmp_path, rng):
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_config(), gguf_tensors(random_weights(tiny_config(), 5), tiny_config())
    )
    tokens = random_tokens(rng, tiny_config(), 1, 20)
    prefix = random_prefix(rng, tiny_config(), 6)
    target = rng.standard_normal((1, 20, tiny_config().vocab_size)).astype(np.float32)

    def gradient(model):
        def loss(keys):
            return jnp.sum(run(model, tokens, prefix=prefix.replace(keys=keys))[0] * target)

        return np.asarray(jax.grad(loss)(prefix.keys)).ravel()

    rounded, exact = gradient(load_model(str(path), weights="int8")), gradient(load_model(str(path)))
    assert 0.98 < rounded @ exact / np.linalg.norm(rounded) / np.linalg.norm(exact) < 1


SHARDED = """
import sys; sys.path[:0] = [sys.argv[1]]
import jax; jax.config.update("jax_num_cpu_devices", 8); jax.config.update("jax_platforms", "cpu")
import numpy as np
from cartridges_jax.models import load_model
from cartridges_jax.parallel import make_mesh
for weights in ("", "int8", "bfloat16"):
    plain = load_model(sys.argv[2], weights=weights)
    spread = load_model(sys.argv[2], weights=weights, mesh=make_mesh("fsdp:4,tensor:2"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), spread.params, plain.params)
    q_proj = spread.params["layers"]["0"]["q_proj"]
    q_proj = {"": lambda q: q, "int8": lambda q: q.values, "bfloat16": lambda q: q.bits}[weights](q_proj)
    assert {s.data.shape for s in q_proj.addressable_shards} == {(3, 16, 32)}, q_proj.sharding
print("sharded as asked")
"""


def test_weights_are_read_straight_into_their_sharding(tiny_gguf):
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(Path(__file__).parent), str(tiny_gguf)], capture_output=True, text=True
    )
    assert "sharded as asked" in done.stdout, done.stderr


MEMORY = """
import sys; sys.path[:0] = [sys.argv[1]]
import jax; jax.config.update("jax_num_cpu_devices", 4); jax.config.update("jax_platforms", "cpu")
import threading, time
import numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cartridges_jax.formats.safetensors_files import SafetensorsDirectory
from cartridges_jax.models.families import read_hugging_face_config
from cartridges_jax.models import weights
file = SafetensorsDirectory(sys.argv[2])
family, config = read_hugging_face_config(file.config)
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
weights.load_params(file, family.names, config, jnp.bfloat16)  # compiles, and is thrown away
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
def sharding_of(path, shape):
    return NamedSharding(mesh, P(*[None] * (len(shape) - 1), "fsdp") if len(shape) > 1 else P())
params = weights.load_params(file, family.names, config, jnp.bfloat16, sharding_of=sharding_of)
jax.block_until_ready(params)
done = True; thread.join()
shards = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
print("RESULT", peak - start, shards, max(np.prod(file.shape(n)) * 2 for n in file.tensor_names))
"""


def test_loading_holds_little_more_than_the_shards(tmp_path):
    """Peak host memory within 1.2 of the largest tensor beside the local shards (which live in host memory here)."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=60_000, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True
    )
    assert "RESULT" in done.stdout, done.stderr
    grown, shards, largest = map(int, done.stdout.split("RESULT")[1].split())
    assert largest == 60_000 * 512 * 2
    assert grown <= shards + 1.2 * largest
