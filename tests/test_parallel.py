"""The mesh from its line, and the table from logical axes to mesh axes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from tiny import tiny_config

from cartridges_jax.cartridge import PREFIX_AXES
from cartridges_jax.data.examples import Example
from cartridges_jax.data.packing import BATCH_AXES, check_rows, plan_packing
from cartridges_jax.errors import UserError
from cartridges_jax.models.cache import CACHE_AXES
from cartridges_jax.models.decoder import abstract_params, param_axes
from cartridges_jax.models.sharding import param_shardings, undivided
from cartridges_jax.parallel import constrain, make_mesh, parse_mesh, partition


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


# The line


def test_axes_that_are_not_named_have_one_device():
    assert parse_mesh("data:2,fsdp:4,tensor:2") == {"data": 2, "fsdp": 4, "tensor": 2}
    assert parse_mesh(" tensor : 2 , data:-1") == {"data": -1, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("model:2", "no axis 'model', only data, fsdp, tensor"),
        ("data:2,", "no axis ''"),
        ("data:2,data:4", "names data twice"),
        ("data", "'' is not a size of data"),
        ("data:two", "'two' is not a size of data"),
        ("data:2.0", "'2.0' is not a size of data"),
        ("tensor:0", "tensor:0 must be 1 or more, or -1"),
        ("tensor:-2", "tensor:-2 must be 1 or more, or -1"),
        ("data:-1,fsdp:-1", "only one can be inferred"),
    ],
)
def test_a_line_that_is_no_mesh_is_refused_in_words(line, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)) as error:
        parse_mesh(line)
    assert repr(line) in str(error.value)


def test_no_line_is_no_mesh():
    assert make_mesh("") is None


def test_what_is_left_of_the_devices_is_inferred():
    mesh = make_mesh("fsdp:-1", jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("line", ["data:2", "data:-1,tensor:3"])
def test_sizes_that_do_not_make_up_the_devices_are_refused(line):
    with pytest.raises(UserError, match=r"asks for \d devices and there are 1"):
        make_mesh(line, jax.devices()[:1])


# The table


def test_an_axis_is_split_at_rest_and_gathered_for_use():
    mesh = mesh_of(2, 4, 2)
    axes = PREFIX_AXES["keys"]
    assert partition(mesh, axes, (3, 8, 144, 64)) == PartitionSpec(None, "tensor", "fsdp")
    assert partition(mesh, axes, (3, 8, 144, 64), in_use=True) == PartitionSpec(None, "tensor")


def test_rows_are_split_over_data_and_fsdp_as_far_as_these_divide_them():
    mesh = mesh_of(2, 4, 2)
    assert partition(mesh, ("rows", None), (16, 5)) == PartitionSpec(("data", "fsdp"))
    assert partition(mesh, ("rows", None), (6, 5)) == PartitionSpec("data")
    assert partition(mesh, ("rows", None), (1, 5)) == PartitionSpec()


def test_an_axis_of_one_device_splits_nothing():
    assert partition(mesh_of(data=8), ("rows", "vocab"), (8, 7)) == PartitionSpec("data")


def test_two_axes_that_claim_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'heads' and 'mlp' of one array would both be split over 'tensor'"):
        partition(mesh_of(tensor=2), ("heads", "mlp"), (4, 4))
    # … whatever the sizes of this mesh and this array are.
    with pytest.raises(ValueError, match="both be split over 'fsdp'"):
        partition(mesh_of(), ("rows", "slots"), (3, 5))


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="'hidden' has no rule"):
        partition(mesh_of(), ("hidden",), (4,))


def test_everything_that_is_placed_has_rules_that_do_not_collide():
    everything = [*param_axes(tiny_config(tie_embeddings=False, qkv_bias=True, o_bias=True, qk_norm=True)).values()]
    everything += [*PREFIX_AXES.values(), *BATCH_AXES, CACHE_AXES]
    for axes in everything:
        for in_use in (False, True):
            partition(mesh_of(2, 2, 2), axes, (8,) * len(axes), in_use=in_use)


# Parameters


def shardings(config, mesh):
    of = param_shardings(config, mesh)
    return {
        keys[-1].key: of(tuple(key.key for key in keys), leaf.shape).spec
        for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }


def test_matrices_are_split_over_fsdp_and_tensor_and_vectors_are_not():
    specs = shardings(tiny_config(tie_embeddings=False), mesh_of(2, 2, 2))
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert specs[name] == PartitionSpec(None, "fsdp", "tensor"), name
    for name in ("o_proj", "down_proj"):
        assert specs[name] == PartitionSpec(None, "tensor", "fsdp"), name
    assert specs["embedding"] == specs["lm_head"] == PartitionSpec("tensor", "fsdp")
    assert specs["attn_norm"] == specs["mlp_norm"] == specs["final_norm"] == PartitionSpec()


def test_heads_that_tensor_does_not_divide_are_replicated_and_never_cut():
    # SmolLM2-135M's; 9 * 16 columns would divide by 2.
    config, mesh = tiny_config(num_heads=9, num_kv_heads=3), mesh_of(tensor=2)
    specs = shardings(config, mesh)
    assert all(specs[name] == PartitionSpec() for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert specs["gate_proj"] == PartitionSpec(None, None, "tensor")
    assert undivided(config, mesh) == [
        "tensor:2 does not divide the model's 9 query and 3 key/value heads: every device has all of it"
    ]


def test_query_heads_stay_with_their_key_value_head():
    specs = shardings(tiny_config(num_heads=8, num_kv_heads=2), mesh_of(tensor=4))
    assert specs["q_proj"] == PartitionSpec()


def test_a_tensor_axis_that_divides_nothing_is_refused():
    with pytest.raises(UserError, match="tensor:5 divides neither the model's 2 key/value heads"):
        param_shardings(tiny_config(), mesh_of(tensor=5))


def test_a_mesh_that_divides_everything_leaves_nothing_to_say():
    assert undivided(tiny_config(), mesh_of(2, 2, 2)) == []


# Batches


def test_each_part_of_the_rows_has_its_targets_to_itself(rng):
    examples = []
    for number in range(40):
        tokens = np.full(int(rng.integers(5, 20)), number, np.int32)
        rows = np.sort(rng.choice(len(tokens) - 1, 3, replace=False)).astype(np.int32)
        ids = rng.integers(0, 99, (3, 2)).astype(np.int32)
        examples.append(Example.of(tokens, rows, ids, np.zeros((3, 2), np.float32)))
    whole, split = (
        plan_packing(examples, num_steps=2, rows_per_step=16, row_tokens=40, micro_batches=2, row_parts=parts).batch(1)
        for parts in (1, 4)
    )
    np.testing.assert_array_equal(split.tokens, whole.tokens)

    def targets(batch, micro):
        real = batch.weight[micro] > 0
        return sorted(zip(batch.rows[micro, real].tolist(), batch.ids[micro, real].tolist()))

    for micro in range(2):
        assert targets(split, micro) == targets(whole, micro)
        # Two rows of 40 tokens a part; padding too points into its own part.
        parts = split.rows[micro].reshape(4, -1) // (2 * 40)
        np.testing.assert_array_equal(parts, np.broadcast_to(np.arange(4)[:, None], parts.shape))


def test_rows_that_the_parts_do_not_divide_are_refused():
    with pytest.raises(UserError, match="the 6 rows of a micro-batch cannot be split into the 4 parts"):
        check_rows(12, 2, 4)


# Programs


def test_on_one_device_a_constraint_leaves_no_trace_in_the_program():
    assert "sharding" not in str(jax.make_jaxpr(lambda x: constrain(x, "rows", None))(jnp.ones((8, 2))))
