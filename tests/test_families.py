"""Every family against transformers: a random model saved to disk, logits of every position to 1e-4."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, build_twin, load, load_gguf, save, saved_family, write_gguf
from peers import torch
from tiny import at_position, random_prefix, random_tokens, run, twin_run

from cartridges_jax.data.packing import TrainBatch
from cartridges_jax.distill.step import batch_loss
from cartridges_jax.models import empty_cache
from cartridges_jax.models.unstacked import unstack_layers

WITH_GGUF = [name for name, family in FAMILIES.items() if family.gguf]
# Their logits are more than a product with the head.
WITH_ADAPTED_LOGITS = ["gemma2", "granite"]
WITH_WINDOWS = ["mistral", "qwen2_windows", "gemma2", "gemma3", "phi3"]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=FAMILIES)
def pair(request, root):
    return saved_family(request.param, root)


def close(found, expected, tolerance=1e-4):
    expected = np.asarray(expected)
    # So that an error of the tolerance is small beside what is compared.
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance)


def test_logits_equal_transformers(pair, rng):
    """40 tokens lie beyond every window and beyond Llama 3.1's original context here."""
    model, twin = pair
    tokens = random_tokens(rng, model.config, 2, 40)
    found, _, _ = run(model, tokens)
    for row in range(2):
        close(found[row], twin_run(twin, tokens[row]))


def test_packed_segments_have_the_logits_each_has_alone(pair, rng):
    model, twin = pair
    lengths = [13, 1, 21]
    segments = [random_tokens(rng, model.config, length) for length in lengths]
    tokens = np.concatenate([*segments, np.zeros(3, np.int32)])
    positions = np.concatenate([np.arange(length) for length in [*lengths, 3]])
    segment_ids = np.repeat([1, 2, 3, 0], [*lengths, 3])
    found, _, _ = run(model, tokens[None], positions=positions[None], segment_ids=segment_ids[None])
    start = 0
    for segment in segments:
        close(found[0, start : start + len(segment)], twin_run(twin, segment))
        start += len(segment)


def test_packed_segments_after_a_prefix_have_the_logits_each_has_alone(pair, rng):
    """Twelve slots, windows of eight: a window leaves the prefix slot by slot."""
    model, twin = pair
    prefix = random_prefix(rng, model.config, 12)
    segments = [random_tokens(rng, model.config, length) for length in (17, 6)]
    positions = np.concatenate([np.arange(17), np.arange(6)])
    segment_ids = np.repeat([1, 2], [17, 6])
    found, _, _ = run(
        model, np.concatenate(segments)[None], positions=positions[None], segment_ids=segment_ids[None], prefix=prefix
    )
    close(found[0, :17], twin_run(twin, segments[0], keys=prefix.keys, values=prefix.values))
    close(found[0, 17:], twin_run(twin, segments[1], keys=prefix.keys, values=prefix.values))


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_prefill_then_decode_gives_the_logits_of_one_forward(pair, rng, with_prefix, unstacked):
    """Also with the layers of parameters, prefix and cache in arrays of their own."""
    model, twin = pair
    prefix = laid_out = random_prefix(rng, model.config, 6) if with_prefix else None
    tokens = random_tokens(rng, model.config, 1, 20)
    if unstacked:
        model = dataclasses.replace(model, params=unstack_layers(model.params, model.config))
        if with_prefix:
            laid_out = prefix.unstacked()
    empty = empty_cache(model.config, 1, 24, jnp.float32, unstacked=unstacked)
    found, cache, _ = run(model, tokens[:, :14], prefix=laid_out, cache=empty)
    parts = [found]
    for at in range(14, 20):
        found, cache, _ = run(model, tokens[:, at : at + 1], prefix=laid_out, cache=cache)
        parts.append(found)
    slots = {} if prefix is None else {"keys": prefix.keys, "values": prefix.values}
    close(np.concatenate(parts, axis=1)[0], twin_run(twin, tokens[0], **slots))


def test_logits_at_far_positions_equal_transformers(pair, rng):
    """After twelve slots that replace 150 tokens, as in a thinned cache; a window sees none of them."""
    model, twin = pair
    prefix = at_position(random_prefix(rng, model.config, 12), 150)
    tokens = random_tokens(rng, model.config, 30)
    found, _, _ = run(model, tokens[None], prefix=prefix)
    if any(kind.window for kind in model.config.period):
        # transformers counts a window in slots; without a prefix slots and positions agree.
        alone, _, _ = run(model, tokens[None], positions=150 + np.arange(30)[None])
        close(alone[0], twin_run(twin, tokens, start=150))
    else:
        close(found[0], twin_run(twin, tokens, keys=prefix.keys, values=prefix.values, start=150))


@pytest.mark.parametrize("name", WITH_WINDOWS)
def test_a_window_can_be_told_to_see_the_whole_prefix(name, root, rng):
    """Then it is as if the prefix stood at the window's edge: equal to transformers with the mask opened by hand."""
    model, twin = saved_family(name, root)
    exempt = dataclasses.replace(model, config=dataclasses.replace(model.config, windows_see_prefix=False))
    prefix = random_prefix(rng, model.config, 12)
    tokens = random_tokens(rng, model.config, 20)
    windowed, _, _ = run(model, tokens[None], prefix=prefix)
    found, _, _ = run(exempt, tokens[None], prefix=prefix)
    assert np.abs(np.asarray(found - windowed)).max() > 1e-2
    own = np.tril(np.ones((20, 20), bool))
    near = own & (np.arange(20)[:, None] - np.arange(20) < 8)
    masks = {}
    for kind, seen in (("full_attention", own), ("sliding_attention", near)):
        both = np.concatenate([np.ones((20, 12), bool), seen], axis=1)
        masks[kind] = torch.from_numpy(np.where(both, 0.0, np.finfo(np.float32).min).astype(np.float32))[None, None]
    if name in ("mistral", "phi3"):  # know one kind of layer
        masks = masks["sliding_attention"]
    close(found[0], twin_run(twin, tokens, keys=prefix.keys, values=prefix.values, whole_mask=masks))


@pytest.mark.parametrize("name", WITH_ADAPTED_LOGITS)
def test_the_streamed_loss_is_that_of_transformers_logits(name, root, rng):
    """The loss applies the head itself: value against transformers, gradient against one through `lm_logits`."""
    model, twin = saved_family(name, root)
    prefix = random_prefix(rng, model.config, 6)
    tokens = random_tokens(rng, model.config, 20)
    rows, ids = np.arange(4, 20), np.argsort(rng.random((16, model.config.vocab_size)), axis=-1)[:, :5]
    teacher = np.log(rng.dirichlet(np.ones(6), 16)[:, :5])
    positions, ones = np.arange(20)[None], np.ones((1, 20), np.int32)
    parts = (tokens[None], positions, ones, rows, ids, teacher, np.ones(16))
    batch = TrainBatch(*(jnp.asarray(part, jnp.float32 if part.dtype == float else jnp.int32) for part in parts))

    def streamed(keys):
        return batch_loss(model.config, model.params, prefix.replace(keys=keys), batch, tail="drop")

    def whole(keys):
        logits, _, _ = run(model, tokens[None], prefix=prefix.replace(keys=keys))
        student = jnp.take_along_axis(jax.nn.log_softmax(logits[0, rows]), jnp.asarray(ids), axis=-1)
        return jnp.sum(np.exp(teacher) * (teacher - student))

    logits = twin_run(twin, tokens, keys=prefix.keys, values=prefix.values)[rows]
    student = torch.log_softmax(logits.double(), -1).numpy()
    expected = np.sum(np.exp(teacher) * (teacher - np.take_along_axis(student, ids, axis=-1)))
    found, gradient = jax.value_and_grad(streamed)(prefix.keys)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(whole)(prefix.keys), rtol=1e-3, atol=1e-4)
    assert np.abs(np.asarray(gradient)).max() > 0.01


CASES = [(name, number) for name, family in FAMILIES.items() for number in range(len(family.perturbed))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_config_field_moves_the_logits_as_in_transformers(name, number, root, tmp_path, rng):
    model, twin = saved_family(name, root)
    overrides = FAMILIES[name].perturbed[number]
    other_twin = build_twin(FAMILIES[name], seed=11, **overrides)
    other = load(save(other_twin, tmp_path / "model"))
    tokens = random_tokens(rng, model.config, 40)
    found = np.asarray(run(other, tokens[None])[0][0])
    close(found, twin_run(other_twin, tokens))
    assert np.abs(found - np.asarray(run(model, tokens[None])[0][0])).max() > 1e-3
    assert other.config.fingerprint() != model.config.fingerprint()


@pytest.mark.parametrize("name", WITH_GGUF)
def test_a_gguf_file_gives_the_logits_of_transformers(name, root, tmp_path, rng):
    model, twin = saved_family(name, root)
    other = load_gguf(write_gguf(twin, FAMILIES[name].gguf, tmp_path / "model.gguf"))
    tokens = random_tokens(rng, model.config, 60)
    close(run(other, tokens[None])[0][0], twin_run(twin, tokens))


def test_sharded_files_give_the_same_parameters(root, tmp_path):
    model, twin = saved_family("llama31", root)
    directory = save(twin, tmp_path / "shards", max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    other = load(directory)
    for name, value in other.params["layers"]["0"].items():
        np.testing.assert_array_equal(value, model.params["layers"]["0"][name])
