"""Layers in arrays of their own are the stack's memory; what they compute is in test_families.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tiny import random_prefix, random_tokens, run

from cartridges_jax import sampling
from cartridges_jax.models import load_model
from cartridges_jax.models.unstacked import unstack_layers
from cartridges_jax.parallel import make_mesh


def test_unstacked_layers_are_views_of_the_stack(tiny_model):
    unstacked = unstack_layers(tiny_model.params, tiny_model.config)
    stack = tiny_model.params["layers"]["0"]["gate_proj"]
    begin = stack.unsafe_buffer_pointer()
    for layer in range(tiny_model.config.num_layers):
        part = unstacked[f"layer_{layer}"]["gate_proj"]
        np.testing.assert_array_equal(part, stack[layer])
        assert part.unsafe_buffer_pointer() == begin + layer * part.nbytes


def test_narrow_layers_are_views_too_and_decode_to_the_same_logits(tiny_gguf, rng):
    model = load_model(str(tiny_gguf), weights="bfloat16")
    stack = model.params["layers"]["0"]["up_proj"].bits
    part = model.decode_params["layer_1"]["up_proj"]
    assert part.bits.dtype == jnp.bfloat16
    assert part.bits.unsafe_buffer_pointer() == stack.unsafe_buffer_pointer() + part.bits.nbytes
    tokens = random_tokens(rng, model.config, 1, 9)
    stacked, _, _ = run(model, tokens)
    unstacked, _, _ = run(dataclasses.replace(model, params=model.decode_params), tokens)
    np.testing.assert_allclose(unstacked, stacked, atol=0.02)


def test_a_model_on_one_cpu_device_decodes_with_unstacked_layers(tiny_model, rng):
    assert "layers" not in tiny_model.decode_params and "layers" in tiny_model.params
    assert tiny_model.decoding_cache(2, 64).is_unstacked and not tiny_model.reading_cache(2, 64).is_unstacked
    prefix = random_prefix(rng, tiny_model.config, 5)
    unstacked = tiny_model.decoding_prefix(prefix)
    assert isinstance(unstacked.keys, tuple)
    # It is read with the stacked parameters, too.
    tokens = random_tokens(rng, tiny_model.config, 1, 9)
    np.testing.assert_array_equal(
        run(tiny_model, tokens, prefix=unstacked)[0], run(tiny_model, tokens, prefix=prefix)[0]
    )


def test_on_a_mesh_layers_stay_stacked_even_if_it_has_one_device(tiny_gguf, tiny_model, rng):
    model = load_model(str(tiny_gguf), mesh=make_mesh("fsdp:-1", jax.devices()[:1]))
    assert "layers" in model.decode_params and not model.decoding_cache(2, 64).is_unstacked
    prefix = random_prefix(rng, model.config, 5)
    found, expected = (
        sampling.generate_tokens(which, [[5, 6, 7], [8]], prefix, max_tokens=6, stop_ids=())
        for which in (model, tiny_model)
    )
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
