"""Prefill, decoding and token selection against transformers and plain NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch
from tiny import at_position, random_prefix, random_tokens, run, twin_run

from cartridges_jax import sampling
from cartridges_jax.errors import UserError
from cartridges_jax.sampling import GREEDY, Sampling, generate_tokens, prefill, reading
from cartridges_jax.sampling.prefill import CHUNK
from cartridges_jax.sampling.select import Choice, RowSampling, select_rows


def random_prompts(rng, config, lengths):
    return [random_tokens(rng, config, length).tolist() for length in lengths]


def greedy_in_torch(twin, prompt, num_tokens, **prefix):
    """Step by step, the whole text read again each time."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(twin_run(twin, tokens, **prefix)[-1].argmax()))
    return tokens[len(prompt) :]


# Decoding


@pytest.mark.parametrize("with_prefix", [False, True])
def test_greedy_tokens_of_unequal_prompts_are_those_of_transformers_one_by_one(tiny_pair, rng, with_prefix):
    model, twin = tiny_pair
    prompts = random_prompts(rng, model.config, [3, 19, 1, 8, 12])
    prefix = random_prefix(rng, model.config, 7) if with_prefix else None
    slots = {"keys": prefix.keys, "values": prefix.values} if with_prefix else {}
    found = generate_tokens(model, prompts, prefix, max_tokens=11, stop_ids=[])
    for prompt, generation in zip(prompts, found, strict=True):
        assert generation.token_ids == greedy_in_torch(twin, prompt, 11, **slots)
        assert generation.stop_reason == "length"


def test_a_batch_gives_what_each_prompt_gives_alone_whatever_the_others_do(tiny_model, rng):
    """Rows end at different steps, which takes rows out of the batch while others go on."""
    prompts = random_prompts(rng, tiny_model.config, [5, 14, 9, 3, 20, 2, 7])
    free = generate_tokens(tiny_model, prompts, max_tokens=30, stop_ids=[], top_logprobs=3)
    stops = {generation.token_ids[at] for generation, at in zip(free[:5], (0, 2, 5, 9, 17))}
    together = generate_tokens(tiny_model, prompts, max_tokens=30, stop_ids=stops, top_logprobs=3)
    assert len({len(generation.token_ids) for generation in together}) > 2
    for generation, unstopped in zip(together, free):
        expected = unstopped.token_ids
        ends = [i for i, token in enumerate(expected) if token in stops]
        assert generation.token_ids == (expected[: ends[0] + 1] if ends else expected)
        assert generation.stop_reason == ("stop" if ends else "length")
        count = len(generation.token_ids)
        np.testing.assert_array_equal(generation.top_ids, unstopped.top_ids[:count])
        np.testing.assert_allclose(generation.top_logprobs, unstopped.top_logprobs[:count], atol=1e-4)
    for at in (2, 4):
        (alone,) = generate_tokens(tiny_model, prompts[at : at + 1], max_tokens=30, stop_ids=stops, top_logprobs=3)
        assert alone.token_ids == together[at].token_ids
        np.testing.assert_allclose(alone.top_logprobs, together[at].top_logprobs, atol=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 8, 9])
def test_exactly_max_tokens_are_made_when_nothing_stops(tiny_model, rng, max_tokens):
    prompts = random_prompts(rng, tiny_model.config, [16, 4])
    longer = generate_tokens(tiny_model, prompts, max_tokens=17, stop_ids=[])
    for generation, reference in zip(generate_tokens(tiny_model, prompts, max_tokens=max_tokens, stop_ids=[]), longer):
        assert generation.token_ids == reference.token_ids[:max_tokens]


def test_a_stop_token_that_comes_after_max_tokens_is_not_seen(tiny_model, rng):
    prompts = random_prompts(rng, tiny_model.config, [6])
    (free,) = generate_tokens(tiny_model, prompts, max_tokens=8, stop_ids=[])
    at = next(i for i in range(7, 0, -1) if free.token_ids[i] not in free.token_ids[:i])
    late = free.token_ids[at]
    (cut,) = generate_tokens(tiny_model, prompts, max_tokens=at, stop_ids=[late])
    assert (cut.token_ids, cut.stop_reason) == (free.token_ids[:at], "length")
    (whole,) = generate_tokens(tiny_model, prompts, max_tokens=at + 1, stop_ids=[late])
    assert (whole.token_ids, whole.stop_reason) == (free.token_ids[: at + 1], "stop")


def test_the_chat_templates_stop_tokens_end_a_row_by_default(tiny_model, rng):
    end = tiny_model.chat.end_of_turn_id
    assert end in tiny_model.chat.stop_ids
    prompts = random_prompts(rng, tiny_model.config, [4])
    (free,) = generate_tokens(tiny_model, prompts, max_tokens=4, stop_ids=[])
    # The same model with two tokens' names exchanged: it now begins with the end of the turn.
    names = np.arange(tiny_model.config.vocab_size)
    names[[end, free.token_ids[0]]] = free.token_ids[0], end
    model = dataclasses.replace(
        tiny_model,
        params={**tiny_model.params, "lm_head": tiny_model.params["embedding"][names]},
        config=dataclasses.replace(tiny_model.config, tie_embeddings=False),
    )
    (ended,) = generate_tokens(model, prompts, max_tokens=4)
    assert (ended.token_ids, ended.stop_reason) == ([end], "stop")


def test_top_logprobs_are_those_of_one_full_forward_at_temperature_one(tiny_pair, rng):
    model, twin = tiny_pair
    prompts = random_prompts(rng, model.config, [6, 13])
    prefix = random_prefix(rng, model.config, 5)
    found = generate_tokens(
        model, prompts, prefix, max_tokens=10, sampling=Sampling(temperature=0.6), stop_ids=[], seed=3, top_logprobs=20
    )
    for prompt, generation in zip(prompts, found):
        assert generation.top_ids.shape == generation.top_logprobs.shape == (10, 20)
        text = prompt + generation.token_ids
        logits = twin_run(twin, text, keys=prefix.keys, values=prefix.values)
        expected = torch.log_softmax(logits.double(), dim=-1)[len(prompt) - 1 : -1].numpy()
        np.testing.assert_allclose(
            generation.top_logprobs, np.take_along_axis(expected, generation.top_ids, axis=-1), atol=2e-4
        )
        np.testing.assert_allclose(generation.top_logprobs, -np.sort(-expected, axis=-1)[:, :20], atol=2e-4)
    (without,) = generate_tokens(model, prompts[:1], max_tokens=2, stop_ids=[])
    assert without.top_ids is None and without.top_logprobs is None


def test_the_same_seed_draws_the_same_tokens_whatever_the_batch_size(tiny_model, rng):
    prompts = random_prompts(rng, tiny_model.config, [4, 9, 2, 7, 12])
    settings = {"max_tokens": 12, "sampling": Sampling(temperature=1.0, top_p=0.95), "seed": 11}
    whole = generate_tokens(tiny_model, prompts, **settings)
    for batch_size in (1, 3):
        again = generate_tokens(tiny_model, prompts, batch_size=batch_size, **settings)
        assert [g.token_ids for g in again] == [g.token_ids for g in whole]
    other = generate_tokens(tiny_model, prompts, **settings | {"seed": 12})
    assert [g.token_ids for g in other] != [g.token_ids for g in whole]


def test_equal_prompts_draw_differently_and_steps_draw_afresh(tiny_model, rng):
    prompt = random_prompts(rng, tiny_model.config, [4])[0]
    found = generate_tokens(tiny_model, [prompt] * 6, max_tokens=12, sampling=Sampling(temperature=3.0), stop_ids=[])
    assert len({tuple(generation.token_ids) for generation in found}) == 6
    assert all(len(set(generation.token_ids)) > 4 for generation in found)


def test_progress_counts_every_prompt_once(tiny_model, rng):
    finished = []
    prompts = random_prompts(rng, tiny_model.config, [3, 4, 5, 6, 7])
    generate_tokens(tiny_model, prompts, max_tokens=2, batch_size=2, on_progress=finished.append)
    assert sum(finished) == 5
    assert generate_tokens(tiny_model, [], max_tokens=2) == []


# Prefill


def test_prefill_after_a_prefix_equals_prefill_of_both(tiny_pair, rng):
    model, twin = tiny_pair
    first, second = random_prompts(rng, model.config, [23, 14])
    both, joined = prefill(model, first + second), prefill(model, second, prefill(model, first))
    assert joined.next_position == both.next_position == 37
    np.testing.assert_array_equal(joined.positions, np.arange(37))
    np.testing.assert_allclose(joined.keys, both.keys, atol=1e-4)
    np.testing.assert_allclose(joined.values, both.values, atol=1e-4)
    for layer, cached in enumerate(twin(torch.tensor([first + second]), use_cache=True).past_key_values.layers):
        np.testing.assert_allclose(both.keys[layer], cached.keys[0], atol=1e-4)
        np.testing.assert_allclose(both.values[layer], cached.values[0], atol=1e-4)


def test_reading_after_a_thinned_prefix_continues_at_its_next_position(tiny_pair, rng):
    model, twin = tiny_pair
    thinned = at_position(random_prefix(rng, model.config, 6), 40).replace(
        positions=jnp.asarray([0, 3, 4, 9, 20, 31], jnp.int32)
    )
    tokens = random_tokens(rng, model.config, 12).tolist()
    joined = prefill(model, tokens, thinned)
    np.testing.assert_array_equal(joined.positions, [0, 3, 4, 9, 20, 31, *range(40, 52)])
    assert (joined.num_slots, joined.next_position) == (18, 52)
    expected = twin_run(twin, tokens, keys=thinned.keys, values=thinned.values, start=40)
    np.testing.assert_allclose(sampling.logits(model, tokens, thinned), expected, rtol=0, atol=1e-4)
    later = random_tokens(rng, model.config, 5)
    found, _, _ = run(model, later[None], prefix=joined)
    expected = twin_run(twin, tokens + later.tolist(), keys=thinned.keys, values=thinned.values, start=40)[12:]
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-4)


def test_a_text_of_several_chunks_is_read_as_one(tiny_pair, rng):
    model, twin = tiny_pair
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, context_length=2048))
    tokens = random_tokens(rng, model.config, CHUNK + 70)
    found = sampling.logits(model, tokens.tolist())
    assert found.shape == (CHUNK + 70, model.config.vocab_size)
    np.testing.assert_allclose(found, twin_run(twin, tokens), rtol=0, atol=1e-3)


def test_reading_a_text_into_a_prefix_returns_the_cache_and_no_hidden_states(tiny_model, rng):
    tokens = random_tokens(rng, tiny_model.config, 1, 64)
    cache, ones = tiny_model.reading_cache(1, 64), np.ones((1, 64), np.int32)
    traced = reading.read_tokens.trace(tiny_model.config, tiny_model.params, None, cache, tokens, ones)
    sizes = [out.shape for out in jax.tree.leaves(traced.out_info)]
    assert sorted(sizes, key=len) == [(1,), cache.keys.shape, cache.values.shape]


@pytest.mark.parametrize(
    ("prompt", "complaint"), [([], "no tokens"), ([3, 288, 1], "token id 288"), ([3, -1], "token id -1")]
)
def test_ids_that_the_model_does_not_know_are_refused_by_value(tiny_model, prompt, complaint):
    assert tiny_model.config.vocab_size == 288
    for call in (
        lambda: prefill(tiny_model, prompt),
        lambda: sampling.logits(tiny_model, prompt),
        lambda: generate_tokens(tiny_model, [[1, 2], prompt], max_tokens=2),
    ):
        with pytest.raises(UserError, match=complaint):
            call()


def test_what_does_not_fit_the_context_is_refused_with_its_numbers(tiny_model, rng):
    context = tiny_model.config.context_length
    tokens = random_tokens(rng, tiny_model.config, context).tolist()
    prefix = at_position(random_prefix(rng, tiny_model.config, 4), 100)
    with pytest.raises(UserError, match=f"context of {context}"):
        prefill(tiny_model, [*tokens, 1])
    with pytest.raises(UserError, match=f"100 prefix positions .* {context - 99} tokens"):
        prefill(tiny_model, tokens[: context - 99], prefix)
    with pytest.raises(UserError, match="5 to generate"):
        generate_tokens(tiny_model, [tokens[: context - 4]], max_tokens=5)
    assert prefill(tiny_model, tokens[: context - 100], prefix).next_position == context


# Choosing tokens


def choose(logits, keys, settings):
    """One token per row, all rows with the same settings."""
    return np.asarray(select_rows(logits, keys, RowSampling.of([settings] * len(logits)), Choice.of([settings])))


def draws(rng, logits, settings, count=20_000):
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), count)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return choose(rows, keys, settings)


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x))
    return x / x.sum()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (Sampling(temperature=1.0), 6),
        (Sampling(temperature=0.6), 6),
        (Sampling(temperature=1.0, top_k=3), 3),
        (Sampling(temperature=1.0, top_k=1), 1),
        (Sampling(temperature=1.0, top_k=99), 6),
        (Sampling(temperature=1.0, top_p=0.75), 3),
        (Sampling(temperature=1.0, top_p=0.01), 1),
        (Sampling(temperature=2.0, top_k=4, top_p=0.9), None),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probability_says(rng, settings, kept):
    probability = np.array([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    order = rng.permutation(6)
    logits = np.log(probability)[order] + 5.0
    expected = softmax(logits / settings.temperature)
    if settings.top_k:
        expected[expected < np.sort(expected)[::-1][: settings.top_k].min()] = 0
        expected /= expected.sum()
    ranked = np.sort(expected)[::-1]
    inside = np.cumsum(ranked) - ranked < settings.top_p
    expected[expected < ranked[inside].min()] = 0
    expected /= expected.sum()
    assert kept is None or np.count_nonzero(expected) == kept
    count = 20_000
    found = np.bincount(draws(rng, logits, settings, count), minlength=6) / count
    # Five and a half standard deviations: one false alarm in millions of runs.
    np.testing.assert_array_less(np.abs(found - expected), 5.5 * np.sqrt(expected * (1 - expected) / count) + 1e-9)


def nucleus(logits, top_p):
    """The ids of the smallest set that reaches top_p, by a full sort in float64."""
    probability = softmax(logits)
    order = np.argsort(-probability)
    size = int(np.searchsorted(np.cumsum(probability[order]), top_p)) + 1
    return order[:size]


@pytest.mark.parametrize(
    ("vocab_size", "scale", "top_p"), [(60, 2.0, 0.9), (3000, 4.0, 0.9), (1500, 0.3, 0.9), (700, 0.05, 0.97)]
)
def test_the_nucleus_is_that_of_a_full_sort(rng, vocab_size, scale, top_p):
    """The last two are flat: their nucleus does not fit the candidates that are looked at first."""
    logits = (scale * rng.standard_normal(vocab_size)).astype(np.float32)
    if scale < 1:
        assert len(nucleus(logits, top_p)) > 512
    found = draws(rng, logits, Sampling(temperature=1.0, top_p=top_p), count=4000)
    # float32 sums know the border to a few millionths.
    assert set(found) <= set(nucleus(logits, top_p + 1e-5))
    expected = set(nucleus(logits, top_p - 1e-5))
    wanted = [i for i in expected if softmax(logits)[i] > 1e-2]
    assert set(wanted) <= set(found)
    if scale < 1:
        mass = softmax(logits)[list(expected)]
        chance = 1 - (1 - mass / mass.sum()) ** len(found)
        assert len(set(found)) > chance.sum() - 6 * np.sqrt((chance * (1 - chance)).sum()) - 2


def test_a_peaked_row_beside_a_flat_one_keeps_its_own_nucleus(rng):
    peaked = np.full(1000, -10.0, np.float32)
    peaked[[5, 6]] = [3.0, 2.0]
    flat = (0.05 * rng.standard_normal(1000)).astype(np.float32)
    rows = jnp.asarray(np.stack([peaked, flat] * 500))
    keys = jax.random.split(jax.random.key(0), 1000)
    found = choose(rows, keys, Sampling(temperature=1.0, top_p=0.9))
    assert set(found[::2]) == {5, 6}
    assert len(set(found[1::2])) > 300 and set(found[1::2]) <= set(nucleus(flat, 0.9 + 1e-5))


def test_greedy_takes_the_first_of_the_most_likely_tokens(rng):
    logits = rng.integers(-9, 9, (200, 30)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    np.testing.assert_array_equal(choose(jnp.asarray(logits), keys, GREEDY), logits.argmax(-1))
    logits[3, 5] = np.nan
    assert 0 <= choose(jnp.asarray(logits), keys, GREEDY)[3] < 30


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)
