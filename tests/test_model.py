"""The decoder against transformers' Llama: the same weights, float32 logits to 1e-4."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch
from tiny import (
    at_position,
    make_pair,
    random_prefix,
    random_tokens,
    random_weights,
    run,
    tiny_config,
    twin_of,
    twin_run,
)

from cartridges_jax import sampling
from cartridges_jax.models import Decoder, empty_cache, lm_logits, row_as_prefix
from cartridges_jax.models.decoder import abstract_params


def close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def untied_pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("untied"), seed=1, tie_embeddings=False)


def test_logits_equal_transformers(tiny_pair, rng):
    tokens = random_tokens(rng, tiny_pair.model.config, 2, 40)
    found, _, _ = run(tiny_pair.model, tokens)
    for row in range(2):
        close(found[row], twin_run(tiny_pair.twin, tokens[row]))


def test_logits_of_an_untied_head_equal_transformers(untied_pair, rng):
    model, twin = untied_pair
    assert "lm_head" in model.params
    tokens = random_tokens(rng, model.config, 40)
    found, _, _ = run(model, tokens[None])
    close(found[0], twin_run(twin, tokens))


def test_each_packed_segment_has_the_logits_it_has_alone(tiny_pair, rng):
    lengths = [9, 1, 14, 6]
    segments = [random_tokens(rng, tiny_pair.model.config, length) for length in lengths]
    tokens = np.concatenate([*segments, np.zeros(4, np.int32)])
    positions = np.concatenate([np.arange(length) for length in [*lengths, 4]])
    segment_ids = np.repeat([1, 2, 3, 4, 0], [*lengths, 4])
    found, _, _ = run(tiny_pair.model, tokens[None], positions=positions[None], segment_ids=segment_ids[None])
    start = 0
    for segment in segments:
        close(found[0, start : start + len(segment)], twin_run(tiny_pair.twin, segment))
        start += len(segment)


def test_packed_segments_after_a_prefix_have_the_logits_each_has_alone(tiny_pair, rng):
    model, twin = tiny_pair
    prefix = random_prefix(rng, model.config, 11)
    first, second = (random_tokens(rng, model.config, length) for length in (7, 10))
    positions = np.concatenate([np.arange(7), np.arange(10)])
    segment_ids = np.repeat([1, 2], [7, 10])
    found, _, _ = run(
        model, np.concatenate([first, second])[None], positions=positions[None], segment_ids=segment_ids[None],
        prefix=prefix,
    )  # fmt: skip
    close(found[0, :7], twin_run(twin, first, keys=prefix.keys, values=prefix.values))
    close(found[0, 7:], twin_run(twin, second, keys=prefix.keys, values=prefix.values))


@pytest.mark.parametrize("next_position", [9, 9 + 55])
def test_logits_after_a_prefix_equal_past_key_values(tiny_pair, rng, next_position):
    """A thinned cache has fewer slots than positions; tokens continue at `next_position`."""
    prefix = at_position(random_prefix(rng, tiny_pair.model.config, 9), next_position)
    tokens = random_tokens(rng, tiny_pair.model.config, 2, 25)
    found, _, _ = run(tiny_pair.model, tokens, prefix=prefix)
    for row in range(2):
        expected = twin_run(tiny_pair.twin, tokens[row], keys=prefix.keys, values=prefix.values, start=next_position)
        close(found[row], expected)


def test_prefixes_that_differ_in_next_position_share_a_compiled_program(tiny_pair, rng):
    model = tiny_pair.model
    tokens, segment_ids = jnp.asarray(random_tokens(rng, model.config, 1, 6)), jnp.ones((1, 6), jnp.int32)

    @jax.jit
    def hidden(params, prefix):
        return Decoder(model.config).apply({"params": params}, tokens, None, segment_ids, prefix=prefix)[0]

    prefix = random_prefix(rng, model.config, 4)
    near, far = (hidden(model.params, at_position(prefix, position)) for position in (4, 90))
    assert np.abs(np.asarray(near - far)).max() > 1e-2
    assert hidden._cache_size() == 1


def test_positions_count_from_zero_in_a_conversation(tiny_pair, rng):
    model = tiny_pair.model
    prefix = at_position(random_prefix(rng, model.config, 4), 40)
    tokens = random_tokens(rng, model.config, 2, 7)
    implied, _, _ = run(model, tokens, prefix=prefix)
    given, _, _ = run(model, tokens, positions=np.tile(np.arange(7), (2, 1)), prefix=prefix)
    np.testing.assert_array_equal(given, implied)


def test_stacked_prefixes_are_mapped_over_as_a_batch_of_cartridges(tiny_pair, rng):
    model, twin = tiny_pair
    prefixes = [at_position(random_prefix(rng, model.config, 5), position) for position in (5, 31)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *prefixes)
    tokens = random_tokens(rng, model.config, 8)

    def logits(prefix):
        ones = jnp.ones((1, 8), jnp.int32)
        hidden, _, _ = Decoder(model.config).apply(
            {"params": model.params}, jnp.asarray(tokens)[None], None, ones, prefix=prefix
        )
        return lm_logits(model.params, model.config, hidden[0])

    for found, prefix in zip(jax.jit(jax.vmap(logits))(stacked), prefixes):
        expected = twin_run(twin, tokens, keys=prefix.keys, values=prefix.values, start=int(prefix.next_position))
        close(found, expected)


def test_a_prefix_bias_equals_an_additive_attention_mask(tiny_pair, rng):
    config = tiny_pair.model.config
    P, T, G = 6, 12, config.num_heads // config.num_kv_heads
    bias = (2 * rng.standard_normal((config.num_kv_heads, P))).astype(np.float32)
    prefix = random_prefix(rng, config, P)
    biased = prefix.replace(bias=jnp.broadcast_to(bias, (config.num_layers, *bias.shape)))
    tokens = random_tokens(rng, config, T)
    mask = np.zeros((config.num_heads, T, P + T), np.float32)
    mask[:, :, :P] = np.repeat(bias, G, axis=0)[:, None]
    mask[:, :, P:] = np.where(np.tril(np.ones((T, T), bool)), 0, np.finfo(np.float32).min)
    expected = twin_run(tiny_pair.twin, tokens, keys=prefix.keys, values=prefix.values, mask=mask)
    found, _, _ = run(tiny_pair.model, tokens[None], prefix=biased)
    close(found[0], expected)
    without, _, _ = run(tiny_pair.model, tokens[None], prefix=prefix)
    assert np.abs(np.asarray(without[0]) - expected.numpy()).max() > 1e-2


def test_an_untrained_first_p_cartridge_gives_the_logits_of_reading_those_tokens(tiny_pair, rng):
    model, twin = tiny_pair
    document, conversation = random_tokens(rng, model.config, 37), random_tokens(rng, model.config, 20)
    cartridge = sampling.prefill(model, document.tolist())
    found, _, _ = run(model, conversation[None], prefix=cartridge)
    close(found[0], twin_run(twin, np.concatenate([document, conversation]))[37:])


def test_prefill_then_decode_gives_the_logits_of_one_forward(tiny_pair, rng):
    model, twin = tiny_pair
    tokens = random_tokens(rng, model.config, 1, 18)
    cache = empty_cache(model.config, 1, 24, jnp.float32)
    found, cache, _ = run(model, tokens[:, :10], cache=cache)
    parts = [found]
    for at in range(10, 18):
        found, cache, _ = run(model, tokens[:, at : at + 1], cache=cache)
        parts.append(found)
    assert cache.lengths.tolist() == [18]
    close(np.concatenate(parts, axis=1)[0], twin_run(twin, tokens[0]))


@pytest.mark.parametrize("with_prefix", [False, True])
def test_rows_padded_on_the_right_decode_as_each_does_alone(tiny_pair, rng, with_prefix):
    model, twin = tiny_pair
    prefix = random_prefix(rng, model.config, 8) if with_prefix else None
    lengths, steps = [3, 11, 7], 4
    rows = [random_tokens(rng, model.config, length + steps) for length in lengths]
    padded = random_tokens(rng, model.config, 3, 11)  # padding may hold any ids
    for row, length in enumerate(lengths):
        padded[row, :length] = rows[row][:length]
    segment_ids = (np.arange(11) < np.array(lengths)[:, None]).astype(np.int32)
    cache = empty_cache(model.config, 3, 16, jnp.float32)
    first, cache, _ = run(model, padded, segment_ids=segment_ids, prefix=prefix, cache=cache)
    later = []
    for step in range(steps):
        tokens = np.array([[rows[row][lengths[row] + step]] for row in range(3)])
        found, cache, _ = run(model, tokens, prefix=prefix, cache=cache)
        later.append(np.asarray(found)[:, 0])
    assert cache.lengths.tolist() == [length + steps for length in lengths]
    slots = {} if prefix is None else {"keys": prefix.keys, "values": prefix.values}
    for row, length in enumerate(lengths):
        expected = twin_run(twin, rows[row], **slots)
        close(first[row, :length], expected[:length])
        close([found[row] for found in later], expected[length:])


def test_a_cache_row_as_a_prefix_stands_for_its_tokens(tiny_pair, rng):
    model, twin = tiny_pair
    rows = random_tokens(rng, model.config, 2, 12)
    _, cache, _ = run(model, rows, cache=empty_cache(model.config, 2, 16, jnp.float32))
    tokens = random_tokens(rng, model.config, 5)
    found, _, _ = run(model, tokens[None], prefix=row_as_prefix(cache, 1, 9))
    close(found[0], twin_run(twin, np.concatenate([rows[1, :9], tokens]))[9:])


def test_taps_are_the_rotated_queries_and_keys_and_the_values_of_every_layer(tiny_pair, rng):
    model, twin = tiny_pair
    config = model.config
    tokens = random_tokens(rng, config, 2, 9)
    _, _, taps = run(model, tokens, taps=("queries", "keys", "values"))
    shape = (config.num_layers, 2, 9, config.num_kv_heads, config.head_dim)
    assert taps["keys"].shape == taps["values"].shape == shape
    assert taps["queries"].shape == (config.num_layers, 2, 9, config.num_heads, config.head_dim)

    projected = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out, i=i: projected.update({i: out}))
        for i, layer in enumerate(twin.model.layers)
    ]
    out = twin(torch.tensor(tokens, dtype=torch.long), use_cache=True)
    for hook in hooks:
        hook.remove()
    positions = torch.arange(9)[None]
    cos, sin = twin.model.rotary_emb(projected[0], positions)
    for layer in range(config.num_layers):
        cached = out.past_key_values.layers[layer]
        close(taps["keys"][layer], cached.keys.transpose(1, 2))
        close(taps["values"][layer], cached.values.transpose(1, 2))
        queries = projected[layer].view(2, 9, config.num_heads, config.head_dim)
        half = config.head_dim // 2
        rotated = torch.cat([-queries[..., half:], queries[..., :half]], dim=-1)
        close(taps["queries"][layer], queries * cos[:, :, None] + rotated * sin[:, :, None])
    assert run(model, tokens, taps=("values",))[2].keys() == {"values"}


def test_rematerialisation_changes_no_gradient(tiny_pair, rng):
    model = tiny_pair.model
    tokens = jnp.asarray(random_tokens(rng, model.config, 2, 10))
    positions, segment_ids = jnp.tile(jnp.arange(10), (2, 1)), jnp.ones((2, 10), jnp.int32)
    prefix = random_prefix(rng, model.config, 5)
    weight = rng.standard_normal((2, 10, model.config.vocab_size)).astype(np.float32)

    def gradient(remat):
        def total(keys, values):
            hidden, _, _ = Decoder(model.config, remat=remat).apply(
                {"params": model.params},
                tokens,
                positions,
                segment_ids,
                prefix=prefix.replace(keys=keys, values=values),
            )
            return jnp.sum(jax.nn.log_softmax(lm_logits(model.params, model.config, hidden)) * weight)

        return jax.jit(jax.grad(total, argnums=(0, 1)))(prefix.keys, prefix.values)

    for found, expected in zip(gradient(True), gradient(False), strict=True):
        scale = np.abs(expected).max()
        assert scale > 1e-2
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)


def test_bfloat16_computes_in_bfloat16_and_is_close_to_float32(tmp_path, rng):
    model, twin = make_pair(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params) if leaf.ndim == 3} == {jnp.dtype(jnp.bfloat16)}
    assert model.params["embedding"].dtype == model.dtype == jnp.bfloat16
    tokens = random_tokens(rng, model.config, 60)
    prefix = random_prefix(rng, model.config, 8)
    found, _, taps = run(model, tokens[None], prefix=prefix, taps=("keys",))
    assert taps["keys"].dtype == jnp.bfloat16 and found.dtype == jnp.float32
    expected = torch.log_softmax(twin_run(twin, tokens, keys=prefix.keys, values=prefix.values), dim=-1)
    ours = torch.log_softmax(torch.from_numpy(np.array(found[0])), dim=-1)
    divergence = (expected.exp() * (expected - ours)).sum(-1)
    assert 0 < divergence.mean() < 0.01


PERTURBED = {
    "rope_base": {"rope_base": 5000.0},
    "norm_eps": {"norm_eps": 0.1},
    "num_heads and head_dim": {"num_heads": 8, "head_dim": 8, "num_kv_heads": 4},
    "num_kv_heads": {"num_kv_heads": 1},
    "head_dim alone": {"head_dim": 32},
    "d_ff": {"d_ff": 40},
    "num_layers": {"num_layers": 2},
    "tie_embeddings": {"tie_embeddings": False},
    "d_model": {"d_model": 48},
}


@pytest.mark.parametrize("overrides", PERTURBED.values(), ids=PERTURBED.keys())
def test_every_config_field_moves_the_logits_as_in_transformers(tiny_pair, tmp_path, rng, overrides):
    model, twin = make_pair(tmp_path, **overrides)
    expected = tiny_config(**overrides)
    # The file keeps it as a float32.
    assert model.config.norm_eps == pytest.approx(expected.norm_eps)
    assert dataclasses.replace(model.config, norm_eps=expected.norm_eps) == expected
    tokens = random_tokens(rng, model.config, 30)
    found = np.asarray(run(model, tokens[None])[0][0])
    close(found, twin_run(twin, tokens))
    before = np.asarray(run(tiny_pair.model, tokens[None])[0][0])
    assert np.abs(found - before).max() > 1e-2


@pytest.mark.parametrize(
    "overrides",
    [
        {"period": tiny_config(rope_base=5000.0).period},
        {"norm_eps": 0.1},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32},
    ],
)
def test_with_the_same_weights_a_constant_alone_moves_the_logits_as_in_transformers(tiny_pair, rng, overrides):
    """The weights' shapes stay, so nothing but the constant can be the reason."""
    model = tiny_pair.model
    config = dataclasses.replace(model.config, **overrides)
    twin = twin_of(random_weights(tiny_config(), seed=0), config)
    tokens = random_tokens(rng, config, 30)
    found = np.asarray(run(dataclasses.replace(model, config=config), tokens[None])[0][0])
    close(found, twin_run(twin, tokens))
    assert np.abs(found - np.asarray(run(model, tokens[None])[0][0])).max() > 1e-2


def test_the_fingerprint_tells_configs_and_tokenizers_apart(tiny_pair):
    config = tiny_pair.model.config
    assert config.fingerprint() == dataclasses.replace(config).fingerprint()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            other = not value
        elif value is None:
            other = 1.0
        else:
            other = value * 2 or 1.0
        if field.name == "period":
            other = tiny_config(rope_base=731.0).period
        assert dataclasses.replace(config, **{field.name: other}).fingerprint() != config.fingerprint(), field.name
    assert tiny_pair.model.fingerprint != config.fingerprint()


def test_the_abstract_parameters_are_those_that_init_makes(tiny_pair):
    abstract = abstract_params(tiny_pair.model.config)
    assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(
        lambda leaf: leaf.shape, tiny_pair.model.params
    )
