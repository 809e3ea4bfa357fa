"""What a compiled program sends, as it is read from HLO: hand-written programs, and one of this machine's compiler."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cartridges_jax.aot.hardware import H100, V5E, V5P
from cartridges_jax.aot.hlo import collectives
from cartridges_jax.aot.network import Links, network_seconds

ADD = """\
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def program(entry: str, *computations: str, devices: int = 8) -> str:
    return "\n".join(
        [
            f"HloModule step, num_partitions={devices}",
            "",
            *computations,
            f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{entry}\n}}",
        ]
    )


def only(text, **options):
    (found,) = collectives(text, **options)
    return found


@pytest.mark.parametrize(
    ("instruction", "kind", "sent"),
    [
        # Of N bytes among g devices a ring sends N (g - 1) / g to gather or to scatter, and both to reduce everywhere.
        (
            "f32[8,16]{1,0:T(8,128)} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
            "all-gather",
            512 * 3 / 4,
        ),
        ("bf16[64]{0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add", "all-reduce", 128),
        (
            "f32[16]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add",
            "reduce-scatter",
            64 * 3,
        ),
        ("f32[16]{0} all-to-all(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}", "all-to-all", 64 * 7 / 8),
        ("s8[100]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 100),
        (
            "(f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
            "all-gather",
            64 * 3 / 4,
        ),
        (
            "(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}",
            "collective-permute",
            16,
        ),
        (
            "(f32[4]{0}, bf16[4]{0}) all-reduce(%x, %y), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
            "all-reduce",
            2 * 24 * 7 / 8,
        ),
    ],
)
def test_a_ring_sends_what_the_operation_needs(instruction, kind, sent):
    found = only(program(f"  ROOT %out = {instruction}", ADD))
    assert (found.kind, found.sent, found.times, found.depth) == (kind, pytest.approx(sent), 1, 0)


def test_a_loop_inside_a_loop_multiplies():
    inner = "%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {\n  %g = f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add\n}\n"
    count = "%less (p: (s32[], f32[4])) -> pred[] {\n  %n = s32[] constant(3)\n  %i = s32[] get-tuple-element(%p), index=0\n  ROOT %c = pred[] compare(%i, %n), direction=LT\n}\n"
    outer = (
        "%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {\n  %h = f32[8]{0} all-gather(%p), replica_groups={}, dimensions={0}\n"
        "  %w = (s32[], f32[4]) while(%p), condition=%less, body=%inner\n}\n"
    )
    entry = (
        '  %w = (s32[], f32[4]) while(%x), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"5"}}'
    )
    found = {one.kind: one for one in collectives(program(entry, ADD, inner, count, outer))}
    assert (found["all-gather"].times, found["all-gather"].depth) == (5, 1)
    assert (found["all-reduce"].times, found["all-reduce"].depth) == (15, 2)


def test_a_loop_that_says_nothing_runs_as_often_as_the_caller_says():
    body = "%body (p: (pred[], f32[4])) -> (pred[], f32[4]) {\n  %g = f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add\n}\n"
    goes_on = "%goes_on (p: (pred[], f32[4])) -> pred[] {\n  ROOT %i = pred[] get-tuple-element(%p), index=0\n}\n"
    text = program("  %w = (pred[], f32[4]) while(%x), condition=%goes_on, body=%body", ADD, body, goes_on)
    with pytest.raises(ValueError, match=r"g \(all-reduce\) is sent in a loop"):
        collectives(text)
    assert only(text, trips_of_open_loops=8).times == 8


def test_groups_are_read_in_every_notation():
    def groups(written):
        return only(
            program(f"  ROOT %out = f32[4]{{0}} all-reduce(%x), replica_groups={written}, to_apply=%add", ADD)
        ).groups

    assert groups("{{0,2},{1,3}}") == ((0, 2), (1, 3))
    assert groups("[2,4]<=[8]") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert groups("[4,2]<=[2,4]T(1,0)") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert groups("mesh['a'=2,'b'=4] {'b'}") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert groups("mesh['a'=4,'b'=2,'c'=1], device_ids=([2,4]T(1,0)) {'b'}") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert groups("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}") == ((0, 1, 2, 3), (4, 5, 6, 7))
    with pytest.raises(ValueError, match="notation"):
        groups("something else")
    assert groups("{}") == (tuple(range(8)),)


def test_what_a_tpu_makes_of_a_reduce_scatter_is_one():
    fused = "%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {\n  %r = f32[16]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add\n}\n"
    found = only(program("  ROOT %f = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1", ADD, fused))
    assert (found.kind, found.sent) == ("reduce-scatter", 64 * 3 / 4)


def seconds(groups, chip, *shape):
    """Of a sum of 1 GB on every device, the devices in the order of their places."""
    text = program(
        f"  ROOT %o = f32[250000000]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add",
        ADD,
        devices=math.prod(shape),
    )
    places = list(itertools.product(*map(range, shape)))
    return network_seconds(collectives(text), Links(chip, shape, places))


def test_between_nodes_a_group_has_the_network_cards_of_its_members():
    gigabyte = 1e9
    assert seconds("[2,8]<=[16]", H100, 16) == pytest.approx(2 * gigabyte * 7 / 8 / 450e9)
    assert seconds("[8,2]<=[2,8]T(1,0)", H100, 16) == pytest.approx(2 * gigabyte / 2 / 50e9)
    assert seconds("[1,16]<=[16]", H100, 16) == pytest.approx(2 * gigabyte * 15 / 16 / 400e9)


@pytest.mark.parametrize(
    ("groups", "chip", "shape", "links"),
    [
        ("[4,4]<=[16]", V5E, (4, 4), 1),  # rows: lines
        ("[4,4]<=[4,4]T(1,0)", V5E, (4, 4), 1),  # columns
        ("[1,16]<=[16]", V5E, (4, 4), 2),  # its corners have two
        ("[4,4]<=[2,2,2,2]T(0,2,1,3)", V5E, (4, 4), 2),  # blocks of 2x2
        ("{{0,5},{1,4}}", V5E, (4, 4), 1),  # no box
        ("{{0,1,4,5},{2,3}}", V5E, (4, 4), 1),  # the slower of two groups
        ("[8,16]<=[128]", V5E, (8, 16), 2),  # rows: rings
        ("[16,8]<=[8,16]T(1,0)", V5E, (8, 16), 1),
        ("[32,8]<=[256]", V5E, (16, 16), 1),  # half of a ring
        ("[1,256]<=[256]", V5E, (16, 16), 4),
        ("[4,4]<=[16]", V5P, (2, 2, 4), 1),  # no whole cube
        ("[16,4]<=[64]", V5P, (4, 4, 4), 2),
        ("[1,64]<=[64]", V5P, (4, 4, 4), 6),
    ],
)
def test_a_group_has_the_links_of_its_worst_connected_chip(groups, chip, shape, links):
    (found,) = collectives(
        program(
            f"  ROOT %o = f32[250000000]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add",
            ADD,
            devices=math.prod(shape),
        )
    )
    one_link = {"v5e": 50e9, "v5p": 100e9}[chip.name]
    assert seconds(groups, chip, *shape) == pytest.approx(found.sent / (links * one_link))


def test_a_scan_that_was_compiled_here_is_counted_by_its_length():
    code = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cartridges_jax.aot.hlo import collectives
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
def f(w, x):
    return jax.lax.scan(lambda c, _: (jax.lax.with_sharding_constraint(jnp.tanh(x.T @ (x @ c)), whole), None), w, None, length=7)[0]
text = jax.jit(f).lower(jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=whole), jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)).compile().as_text()
print([(c.kind, c.times, c.depth, c.sent, len(c.groups[0])) for c in collectives(text)])
"""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([("all-reduce", 7, 1, 2 * 32 * 16 * 4 * 7 / 8, 8)])
