"""The engine against one full forward pass per request, whatever else it does at the same time."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import saved_family
from peers import torch
from tiny import at_position, make_pair, random_prefix, random_tokens, twin_run

from cartridges_jax import sampling
from cartridges_jax.cartridge import pad_slots
from cartridges_jax.errors import UserError
from cartridges_jax.models import cache
from cartridges_jax.sampling import Engine, Request, Sampling, buckets, decoding, reading

# Closer logits than these are a tie that rounding may break either way.
TIE = 1e-4


def full_logits(twin, tokens, prefix):
    """One forward pass: by transformers, or by ours without an engine where `twin` is our model."""
    if not isinstance(twin, torch.nn.Module):
        return sampling.logits(twin, tokens, prefix)
    if prefix is None:
        return twin_run(twin, tokens).numpy()
    start = int(prefix.next_position)
    return twin_run(twin, tokens, keys=prefix.keys, values=prefix.values, start=start).numpy()


def assert_greedy(twin, request, prefix, token_ids):
    """Every token is the most likely one after all before it; returns how many were ties."""
    logits = full_logits(twin, [*request.prompt, *token_ids], prefix)[len(request.prompt) - 1 : -1]
    best = logits.max(axis=-1)
    chosen = logits[np.arange(len(token_ids)), token_ids]
    np.testing.assert_array_less(best - chosen, TIE)
    return int(np.sum(logits.argmax(axis=-1) != token_ids))


def assert_ended_rightly(request, token_ids, stop_reason):
    assert not set(token_ids[:-1]) & set(request.stop_ids)
    if stop_reason == "stop":
        assert token_ids[-1] in request.stop_ids
    else:
        assert (
            stop_reason == "length" and len(token_ids) == request.max_tokens and token_ids[-1] not in request.stop_ids
        )


def random_request(rng, config, prefix=None, **fields):
    prompt = random_tokens(rng, config, int(rng.choice([1, 3, 9, 15, 20, 31]))).tolist()
    stops = rng.choice(config.vocab_size, int(rng.integers(0, 30)), replace=False).tolist()
    return Request(prompt, int(rng.integers(1, 30)), prefix, stop_ids=stops, **fields)


class Served:
    """What an engine's events add up to."""

    def __init__(self, engine):
        self.engine = engine
        self.tokens, self.reasons, self.tops = {}, {}, {}

    def step(self):
        events = self.engine.step()
        assert len({event.request_id for event in events}) == len(events)
        for event in events:
            assert event.request_id not in self.reasons
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            self.tops.setdefault(event.request_id, []).append((event.top_ids, event.top_logprobs))
            if event.stop_reason:
                self.reasons[event.request_id] = event.stop_reason
        return events

    def finish(self):
        while self.engine.busy:
            self.step()
        return self


@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_request_is_answered_as_if_it_were_alone_in_any_interleaving(tiny_pair, rng, lookahead):
    tiny_model, twin = tiny_pair
    config = tiny_model.config
    engine = Engine(tiny_model, num_slots=8, lookahead=lookahead, steps_per_dispatch=4, tokens_per_read=64)
    # Two that are padded, one that is not, one whose positions run ahead of its slots.
    prefixes = [random_prefix(rng, config, size) for size in (5, 40, 64)]
    prefixes.append(
        at_position(random_prefix(rng, config, 20), 90).replace(
            positions=jnp.asarray(np.sort(rng.choice(90, 20, replace=False)), jnp.int32)
        )
    )
    handles = [None, *(engine.add_prefix(prefix) for prefix in prefixes)]
    served, asked, cancelled = Served(engine), {}, set()
    while len(asked) < 200 or engine.busy:
        for _ in range(int(rng.poisson(1.0)) if len(asked) < 200 else 0):
            which = int(rng.integers(len(handles)))
            request = random_request(rng, config, handles[which])
            asked[engine.submit(request)] = (request, which)
        if asked and rng.random() < 0.1:
            victim = int(rng.choice(list(asked)))
            was_over = victim in served.reasons or victim in cancelled
            assert engine.cancel(victim) == (not was_over)
            if not was_over:
                cancelled.add(victim)
                served.reasons[victim] = "cancelled"
        served.step()
    assert set(served.reasons) == set(asked)
    ties = checked = 0
    for request_id, (request, which) in asked.items():
        token_ids = served.tokens.get(request_id, [])
        if request_id not in cancelled:
            assert_ended_rightly(request, token_ids, served.reasons[request_id])
        if token_ids:
            ties += assert_greedy(twin, request, None if which == 0 else prefixes[which - 1], token_ids)
            checked += len(token_ids)
    print(f"{checked} tokens, {ties} ties, {len(cancelled)} cancelled")
    assert checked > 600 and ties < checked / 100


def test_windows_reach_as_far_into_a_padded_prefix_as_without_an_engine(rng, tmp_path):
    """Gemma 3: layers with a window of 8 and one without, and two after the last whole period."""
    model, _ = saved_family("gemma3", tmp_path)
    prefix = random_prefix(rng, model.config, 11)
    engine = Engine(model, num_slots=4)
    handle = engine.add_prefix(prefix)
    requests = [Request(random_tokens(rng, model.config, length).tolist(), 14, handle) for length in (19, 2, 17, 18)]
    for request, generation in zip(requests, engine.run(requests)):
        assert assert_greedy(model, request, prefix, generation.token_ids) == 0


def test_padding_a_prefix_changes_nothing_but_rounding(tiny_model, rng):
    prefix = random_prefix(rng, tiny_model.config, 37)
    padded = pad_slots(prefix, 256)
    assert padded.num_slots == 256
    prompt = random_tokens(rng, tiny_model.config, 9).tolist()
    np.testing.assert_allclose(
        sampling.logits(tiny_model, prompt, padded),
        sampling.logits(tiny_model, prompt, prefix),
        rtol=0,
        atol=2e-5,
    )


def test_draws_depend_on_seed_and_stream_and_not_on_neighbours(tiny_model, rng):
    config = tiny_model.config
    prompt = random_tokens(rng, config, 6).tolist()
    settings = [Sampling(1.2, top_p=0.9), Sampling(0.8, top_k=5)]
    mine = [Request(prompt, 10, sampling=setting, seed=7, stream=3) for setting in settings]
    alone = [Engine(tiny_model).run([request])[0].token_ids for request in mine]
    others = [
        random_request(rng, config, sampling=setting, seed=int(rng.integers(99)), top_logprobs=2)
        for setting in (Sampling(1.0), Sampling(1.0, top_k=20, top_p=0.8), sampling.GREEDY)
    ]
    together = Engine(tiny_model, num_slots=5).run([*others, *mine])[len(others) :]
    assert [generation.token_ids for generation in together] == alone
    for change in ({"stream": 4}, {"seed": 8}):
        (other,) = Engine(tiny_model).run([dataclasses.replace(mine[0], **change)])
        assert other.token_ids != alone[0]


def test_a_prompt_of_several_chunks_grows_the_cache_while_others_decode(rng, tmp_path):
    model, twin = make_pair(tmp_path, context_length=1024)
    prompts = [random_tokens(rng, model.config, length).tolist() for length in (3, 2, 600, 250, 40)]
    requests = [Request(prompt, limit) for prompt, limit in zip(prompts, (100, 70, 5, 20, 90))]
    engine = Engine(model, num_slots=4)
    served = Served(engine)
    ids = [engine.submit(request) for request in requests]
    served.finish()
    for request_id, request in zip(ids, requests):
        assert len(served.tokens[request_id]) == request.max_tokens
        assert assert_greedy(twin, request, None, served.tokens[request_id]) == 0


def test_top_logprobs_are_those_of_one_full_forward(tiny_pair, rng):
    tiny_model, twin = tiny_pair
    prefix = random_prefix(rng, tiny_model.config, 9)
    engine = Engine(tiny_model, num_slots=3)
    handle = engine.add_prefix(prefix)
    requests = [random_request(rng, tiny_model.config, handle, top_logprobs=k) for k in (0, 3, 20, 7, 1)]
    for request, generation in zip(requests, engine.run(requests)):
        if not request.top_logprobs:
            assert generation.top_ids is None and generation.top_logprobs is None
            continue
        logits = full_logits(twin, [*request.prompt, *generation.token_ids], prefix)
        expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))[len(request.prompt) - 1 : -1]
        assert generation.top_ids.shape == (len(generation.token_ids), request.top_logprobs)
        best = -np.sort(-expected, axis=-1)[:, : request.top_logprobs]
        np.testing.assert_allclose(generation.top_logprobs, best, atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(expected, generation.top_ids, axis=-1), best, atol=2e-4)


def test_slots_are_refilled_so_that_no_request_waits_for_the_longest(tiny_model, rng):
    engine = Engine(tiny_model, num_slots=4)
    prompts = [random_tokens(rng, tiny_model.config, 8).tolist() for _ in range(13)]
    served = Served(engine)
    long = engine.submit(Request(prompts[0], 120))
    short = [engine.submit(Request(prompt, 8)) for prompt in prompts[1:]]
    while len(served.reasons) < len(short):
        served.step()
    assert set(served.reasons) == set(short)
    # Four rounds of three short ones: a read and a decode each, and not much more.
    assert engine.num_dispatches <= 12
    served.finish()
    assert len(served.tokens[long]) == 120


def test_cancelling_frees_the_slot_for_the_next_request(tiny_model, rng):
    engine = Engine(tiny_model, num_slots=1)
    prompts = [random_tokens(rng, tiny_model.config, 5).tolist() for _ in range(2)]
    served = Served(engine)
    first = engine.submit(Request(prompts[0], 400))
    second = engine.submit(Request(prompts[1], 4))
    for _ in range(4):
        served.step()
    assert 0 < len(served.tokens[first]) < 100 and second not in served.tokens
    assert engine.cancel(first) and not engine.cancel(first)
    served.finish()
    assert len(served.tokens[second]) == 4 and served.reasons == {second: "length"}
    assert engine.step() == [] and not engine.cancel(12345)


def test_new_prefixes_prompts_and_settings_of_like_size_compile_nothing(tiny_model, rng):
    config = tiny_model.config
    compiled = (reading.read_chunk, cache.put_rows, decoding.decode, decoding.resize)

    def serve():
        engine = Engine(tiny_model, num_slots=4)
        for _ in range(3):
            size = int(rng.integers(1, 65))
            prefix = at_position(random_prefix(rng, config, size), size + int(rng.integers(50)))
            handle = engine.add_prefix(prefix)
            prompts = [random_tokens(rng, config, int(rng.integers(1, 17))).tolist() for _ in range(4)]
            requests = [
                Request(
                    prompt,
                    8,
                    handle,
                    sampling=Sampling(float(rng.uniform(0.5, 2))),
                    seed=int(rng.integers(99)),
                    stop_ids=[288 + int(rng.integers(9))],
                    top_logprobs=int(rng.integers(1, 6)),
                )
                for prompt in prompts
            ]
            engine.run(requests)
            engine.drop_prefix(handle)

    serve()
    before = [program._cache_size() for program in compiled]
    serve()
    assert [program._cache_size() for program in compiled] == before


def test_a_dropped_prefix_serves_its_requests_to_the_end_and_is_freed(tiny_pair, rng):
    tiny_model, twin = tiny_pair
    engine = Engine(tiny_model, num_slots=2)
    prefix = random_prefix(rng, tiny_model.config, 64)
    handle = engine.add_prefix(prefix)
    keys = weakref.ref(jax.tree.leaves(engine._residents[handle].prefix.keys)[0])
    request = Request(random_tokens(rng, tiny_model.config, 4).tolist(), 20, handle)
    served = Served(engine)
    request_id = engine.submit(request)
    served.step()
    engine.drop_prefix(handle)
    with pytest.raises(UserError, match="not held"):
        engine.submit(request)
    served.finish()
    assert_greedy(twin, request, prefix, served.tokens[request_id])
    engine.step()
    gc.collect()
    assert keys() is None


def test_what_an_engine_cannot_serve_is_refused_and_leaves_it_as_it_was(tiny_model, rng):
    engine = Engine(tiny_model, num_slots=2, max_tokens_per_slot=40)
    elsewhere = Engine(tiny_model).add_prefix(random_prefix(rng, tiny_model.config, 3))
    ahead = engine.add_prefix(at_position(random_prefix(rng, tiny_model.config, 3), 490))
    for request, complaint in (
        (Request([1, 2], 5, elsewhere), "not held"),
        (Request([], 5), "no tokens"),
        (Request([288], 5), "token id 288"),
        (Request([1], 0), "max_tokens=0"),
        (Request([1] * 30, 11), "30 tokens .* 11 to generate exceed the 40"),
        (Request([1] * 20, 10, ahead), "490 prefix positions"),
        (Request([1], 5, top_logprobs=289), "top_logprobs=289"),
    ):
        with pytest.raises(UserError, match=complaint):
            engine.submit(request)
    assert not engine.busy
    with pytest.raises(UserError, match="token id 288"):
        engine.run([Request([1], 5), Request([1, 288], 5)])
    assert not engine.busy
    (generation,) = engine.run([Request([1] * 30, 10)])
    assert len(generation.token_ids) == 10


def test_sizes_hold_what_they_are_for_and_a_batch_that_waits_to_shrink_can():
    for number in range(1, 400):
        rows = buckets.row_bucket(number)
        smaller = buckets.smaller_bucket(rows)
        assert rows >= number and 2 * smaller <= rows
        # Decoding stops early with `smaller` rows left: a batch of that size must exist, or the engine stalls.
        assert smaller == 0 or buckets.row_bucket(smaller) == smaller
        read = buckets.read_rows(number)
        assert 1 <= read and number >= 0.75 * read
        assert buckets.slot_bucket(number) >= number and buckets.prompt_bucket(number) >= number
        assert buckets.prefix_bucket(number) >= number and buckets.top_bucket(number) >= number


def test_what_progress_raises_ends_the_run_and_its_requests(tiny_model):
    engine = Engine(tiny_model, num_slots=1)

    def stop(finished):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run([Request([1], 50), Request([2], 50)], stop)
    assert not engine.busy
    assert len(engine.run([Request([3], 3)])[0].token_ids) == 3
