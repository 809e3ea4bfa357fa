"""Eight devices, of one process or two, do the work of one: training, tokens, measures, whole runs. The models are tiny."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from eight_devices import results_of
from tiny import write_tiny_gguf
from tiny_runs import command, finish, settings, talker_gguf, write_inputs  # noqa: F401

from cartridges_jax.checkpoint import load_cartridge

MESHES = ["data:8", "fsdp:8", "data:4,tensor:2", "data:2,fsdp:2,tensor:2"]
MIXED = ["data:4,tensor:2", "data:2,fsdp:2,tensor:2"]
# These take a minute each where two cores play eight devices; others of the same kind are in `make test`.
long = pytest.mark.long


def difference(found, expected):
    """Of the whole array, relative to its length."""
    return np.linalg.norm(np.asarray(found) - np.asarray(expected)) / np.linalg.norm(expected)


def assert_same_training(found, expected):
    np.testing.assert_allclose(found["train"], expected["train"], rtol=1e-5)
    np.testing.assert_allclose(found["heldout"], expected["heldout"], rtol=1e-5)
    assert difference(found["keys"], expected["keys"]) < 1e-5
    assert difference(found["values"], expected["values"]) < 1e-5


def assert_same_measures(found, expected):
    assert found.keys() == expected.keys()
    for condition, measures in expected.items():
        # Undefined ones, such as F1 without reference answers, are undefined in both.
        defined = {name: value for name, value in measures.items() if value is not None}
        assert defined and {name for name, value in found[condition].items() if value is not None} == set(defined)
        assert {name: found[condition][name] for name in defined} == pytest.approx(defined, rel=1e-4, abs=1e-6), (
            condition
        )


# Training


@pytest.fixture(scope="module")
def trained(tiny_gguf, tmp_path_factory):
    return results_of("train", tiny_gguf, ["", *MESHES], tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_steps_on_a_mesh_make_the_cartridge_of_one_device(trained, mesh):
    found, expected = trained[mesh], trained[""]
    assert len(expected["train"]) == 20 and expected["train"][-1] < expected["train"][0]
    assert_same_training(found, expected)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ("data:2,fsdp:2,tensor:2", [[0, 1], [2, 3]]),
        pytest.param("data:8", [[0, 1, 2, 3], [4, 5, 6, 7]], marks=long),
        pytest.param("fsdp:8", [[0, 1, 2, 3], [4, 5, 6, 7]], marks=long),
    ],
)
def test_twenty_steps_of_two_processes_make_the_cartridge_of_one_device(trained, tiny_gguf, tmp_path, mesh, parts):
    (found,) = results_of("train", tiny_gguf, [mesh], tmp_path, processes=2).values()
    expected = trained[""]
    # A process makes only the rows that its own devices take.
    assert found["parts"] == parts
    assert_same_training(found, expected)


@long
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_steps_with_small_weights_on_a_mesh_are_those_of_one_device(tiny_gguf, tmp_path, weights):
    mesh = "data:2,fsdp:2,tensor:2"
    results = results_of("train", tiny_gguf, ["", mesh], tmp_path, weights)
    # A last digit decides how a number is rounded to bfloat16.
    rtol = 1e-5 if weights == "int8" else 1e-3
    np.testing.assert_allclose(results[mesh]["train"], results[""]["train"], rtol=rtol)
    np.testing.assert_allclose(results[mesh]["heldout"], results[""]["heldout"], rtol=rtol)


@pytest.fixture(scope="module")
def compiled(tiny_gguf, tmp_path_factory):
    return results_of("compile", tiny_gguf, MIXED, tmp_path_factory.mktemp("compiled"))


def gathered(program):
    """Sizes of the numbers, not indices, that are gathered."""
    return [
        math.prod(shape) for operation, kind, shape in program["sent"] if operation == "all-gather" and kind[0] == "f"
    ]


def test_without_fsdp_neither_weights_nor_activations_are_gathered(compiled):
    assert gathered(compiled["data:4,tensor:2"]) == []


def test_with_fsdp_no_more_than_one_matrix_of_a_layer_is_gathered_at_a_time(compiled):
    # Tensor halves the largest, [64, 96], and the head's block of 288 tokens [288, 64].
    assert 64 * 48 in gathered(compiled["data:2,fsdp:2,tensor:2"])
    assert max(gathered(compiled["data:2,fsdp:2,tensor:2"])) <= 144 * 64


def test_state_and_optimizer_are_split_over_heads_and_slots_and_batches_over_rows(compiled):
    program = compiled["data:2,fsdp:2,tensor:2"]
    slots = [(whole, part) for whole, part in program["shards"].values() if whole]
    assert len(slots) == 3 * 2
    assert set(slots) == {((3, 2, 16, 16), (3, 1, 8, 16))}
    assert program["batch"]["tokens"] == (2, 8 // 4, 48)
    assert program["batch"]["ids"][1] == program["num_targets"]


# Tokens and measures


@pytest.fixture(scope="module")
def sampled(tiny_gguf, tmp_path_factory):
    return results_of("sample", tiny_gguf, ["", *MIXED], tmp_path_factory.mktemp("sampled"))


@pytest.mark.parametrize("mesh", MIXED)
def test_the_sampler_makes_the_tokens_of_one_device(sampled, mesh):
    found, expected = sampled[mesh], sampled[""]
    assert found["greedy"] == expected["greedy"]
    assert found["drawn"] == expected["drawn"] != expected["greedy"]
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], atol=1e-4)


@long
def test_two_processes_make_the_tokens_of_one_device(sampled, tiny_gguf, tmp_path):
    (found,) = results_of("sample", tiny_gguf, MIXED[1:], tmp_path, processes=2).values()
    assert found["greedy"] == sampled[""]["greedy"]
    assert found["drawn"] == sampled[""]["drawn"]


@long
def test_heads_that_do_not_divide_change_nothing_of_the_tokens(tmp_path):
    path = write_tiny_gguf(tmp_path / "nine.gguf", num_heads=9, num_kv_heads=3)
    results = results_of("sample", path, ["", "data:4,tensor:2"], tmp_path)
    assert results["data:4,tensor:2"]["greedy"] == results[""]["greedy"]


def test_an_evaluation_has_the_numbers_of_one_device(tiny_gguf, tmp_path):
    mesh = "data:2,fsdp:2,tensor:2"
    results = results_of("evaluate", tiny_gguf, ["", mesh], tmp_path)
    found, expected = results[mesh], results[""]
    assert found["answers"] == expected["answers"]
    assert_same_measures(found["measures"], expected["measures"])


@long
def test_two_processes_measure_the_numbers_of_one_device(tiny_gguf, tmp_path):
    mesh = "data:2,fsdp:2,tensor:2"
    (found,) = results_of("evaluate", tiny_gguf, [mesh], tmp_path, processes=2).values()
    (expected,) = results_of("evaluate", tiny_gguf, [""], tmp_path).values()
    assert found["answers"] == expected["answers"]
    assert_same_measures(found["measures"], expected["measures"])


# Self-study


@pytest.mark.long
def test_two_processes_study_side_by_side_in_shards_of_their_own(talker_gguf, tmp_path):
    # Each has all of the model on its four devices.
    (study,) = results_of("study", talker_gguf, ["data:2,tensor:4"], tmp_path, processes=2).values()
    first, second = study["written"]
    assert [name[-9:-8] for name in first] == list("0246"[: len(first)])
    assert [name[-9:-8] for name in second] == list("1357"[: len(second)])
    assert len(first) == len(second) > 0
    one, other = study["conversations"]
    assert one == other and len(one) == 18
    assert [entry[0] for entry in one] == sorted({entry[0] for entry in one})
    assert len({entry[1].lower() for entry in one}) == 18


@long
def test_processes_that_share_a_model_study_together(talker_gguf, tmp_path):
    (study,) = results_of("study", talker_gguf, ["fsdp:8"], tmp_path, processes=2).values()
    (alone,) = results_of("study", talker_gguf, [""], tmp_path).values()
    first, second = study["written"]
    assert first == alone["written"][0] and not second
    assert study["conversations"][0] == study["conversations"][1] == alone["conversations"][0]


# Whole runs


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")


@pytest.mark.long
def test_a_run_on_a_mesh_is_finished_and_kept_on_another(talker_gguf, tmp_path, eight_devices):
    write_inputs(tmp_path)
    values = settings(talker_gguf, tmp_path, train__rows_per_step=4)
    first = finish(command(values, tmp_path / "run", "--config.mesh=data:4,tensor:2"), timeout=900)
    assert first.returncode == 0, first.stderr
    assert "8 devices: data 4, tensor 2" in first.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["conditions"]["whole_text"]["teacher_kl"] == 0
    assert report["conditions"]["cartridge"]["teacher_kl"] < report["conditions"]["first_tokens"]["teacher_kl"]
    assert load_cartridge(tmp_path / "run" / "cartridge").prefix.num_slots == 24

    second = finish(command(values, tmp_path / "run"))
    for stage in ("study", "train", "evaluate"):
        assert f"{stage}: nothing changed, skipped" in second.stdout


def test_rows_that_the_mesh_does_not_divide_are_refused_at_once(tiny_gguf, tmp_path, eight_devices):
    write_inputs(tmp_path)
    values = settings(tiny_gguf, tmp_path, train__rows_per_step=4)
    done = finish(command(values, tmp_path / "run", "--config.mesh=data:-1"))
    assert done.returncode == 2 and done.stderr.startswith(
        "error: the 4 rows of a micro-batch cannot be split into the 8 parts"
    )
    assert "loading" not in done.stdout
