"""Layers in arrays of their own are the stack's memory; what they compute is in test_families.py."""
import numpy as np

from cartridges_jax.models.apart import layers_apart


def test_layers_apart_are_views_of_the_stack(tiny_model):
    apart = layers_apart(tiny_model.params, tiny_model.config)
    stack = tiny_model.params["layers"]["0"]["gate_proj"]
    begin = stack.unsafe_buffer_pointer()
    for layer in range(tiny_model.config.num_layers):
        part = apart[f"layer_{layer}"]["gate_proj"]
        np.testing.assert_array_equal(part, stack[layer])
        assert part.unsafe_buffer_pointer() == begin + layer * part.nbytes


def test_a_model_on_one_cpu_device_decodes_with_its_layers_apart(tiny_model):
    assert tiny_model.layers_apart and "layers" not in tiny_model.decode_params
    assert "layers" in tiny_model.params
