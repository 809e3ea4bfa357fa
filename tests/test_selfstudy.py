"""Self-study: the plan, A's messages, B's answers with their log-probabilities, the shards."""

from __future__ import annotations

import dataclasses
import types
from collections import Counter

import numpy as np
import pytest
from tiny_runs import DOCUMENT, config_of, contents, settings, talker_gguf, write_inputs  # noqa: F401

from cartridges_jax import sampling
from cartridges_jax.corpus import Corpus, tokenize_corpus
from cartridges_jax.data.conversations import read_shard
from cartridges_jax.errors import UserError
from cartridges_jax.models import load_model
from cartridges_jax.pipeline import run as pipeline
from cartridges_jax.selfstudy import local_teacher
from cartridges_jax.selfstudy.filters import degenerates, is_about
from cartridges_jax.selfstudy.plan import family_sequence, plan_batches
from cartridges_jax.selfstudy.seeds import FAMILIES
from cartridges_jax.selfstudy.settings import PAPER, SynthesisSettings
from cartridges_jax.selfstudy.shards import counts_path, read_batch
from cartridges_jax.selfstudy.streams import stream, stream_seed
from cartridges_jax.selfstudy.synthesis import synthesise

NAMES = list(FAMILIES)
DOCUMENT_ITSELF = Corpus.from_text(DOCUMENT, "doc")


@pytest.fixture(scope="module")
def talker(talker_gguf):
    return load_model(str(talker_gguf))


@pytest.fixture(scope="module")
def study_settings(talker_gguf, tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    return config_of(settings(talker_gguf, inputs)).study


@pytest.fixture(scope="module")
def studied(talker, study_settings, tmp_path_factory):
    """(conversations, directory, settings) of a study after chunks."""
    directory = tmp_path_factory.mktemp("studied")
    # Chunks of one length, which is compiled for once.
    chosen = dataclasses.replace(
        study_settings, teacher_context="chunk", conversations=14, chunk_min_tokens=100, chunk_max_tokens=100
    )
    return synthesise(talker, corpus_of(talker), directory, chosen, seed=5).conversations, directory, chosen


def corpus_of(model, corpus=DOCUMENT_ITSELF):
    return tokenize_corpus(corpus, model.tokenizer)


# The plan


def plan(model, corpus=DOCUMENT_ITSELF, **changes):
    values = {
        "num_batches": 4, "requests_per_batch": 10, "chunk_min_tokens": 60, "chunk_max_tokens": 90,
        "families": {"qa": 0.7, "generic": 0.3}, "seed": 3,
    }  # fmt: skip
    return plan_batches(corpus_of(model, corpus), **(values | changes))


def test_the_same_seed_plans_the_same_and_another_does_not(talker):
    assert plan(talker) == plan(talker)
    assert plan(talker) != plan(talker, seed=4)


def test_more_batches_begin_differently_but_each_batch_keeps_its_families(talker):
    for batch in plan(talker, num_batches=7):
        assert Counter(request.family for request in batch.requests) == {"qa": 7, "generic": 3}


@pytest.mark.parametrize("requests_per_batch", [5, 12, 17])
def test_no_sentence_is_asked_twice_before_every_one_was_asked(talker, requests_per_batch):
    """When every chunk is the whole document."""
    batches = plan(talker, requests_per_batch=requests_per_batch, chunk_min_tokens=5000, chunk_max_tokens=5000)
    sentences = corpus_of(talker).documents[0].sentences
    counts = Counter()
    for batch in batches:
        for request in batch.requests:
            counts[request.sentence_index] += 1
            assert request.sentence == sentences[request.sentence_index].text
            assert max(counts.values()) - min(counts[i] for i in range(len(sentences))) <= 1


def test_every_request_is_about_a_sentence_of_its_own_chunk(talker):
    ids, offsets = talker.tokenizer.encode_with_offsets(DOCUMENT.strip())
    for batch in plan(talker, num_batches=9):
        assert 60 <= batch.chunk.num_tokens <= 90
        assert batch.text == DOCUMENT.strip()[offsets[batch.chunk.start][0] : offsets[batch.chunk.end - 1][1]]
        assert all(request.sentence in batch.text for request in batch.requests)


def test_a_chunk_shorter_than_any_sentence_asks_about_the_one_it_cuts(talker):
    (batch,) = plan(talker, num_batches=1, chunk_min_tokens=3, chunk_max_tokens=3)
    assert len(batch.requests) == 10
    assert all(batch.text.strip() in request.sentence for request in batch.requests if len(batch.text.strip()) > 3)


def test_headings_are_never_asked_about(talker):
    assert all("sheds" not in s.text and "boats" not in s.text for s in corpus_of(talker).documents[0].sentences)
    with pytest.raises(UserError, match="no sentence to ask about"):
        plan(talker, Corpus.from_text("# A heading\n\n## Another one\n"))


@pytest.mark.parametrize("count", [1, 7, 10, 128])
def test_families_come_in_proportion_to_their_weights(count, rng):
    weights = {name: float(rng.uniform(0.1, 2)) for name in rng.permutation(NAMES)} | {"creative": 0.0}
    found = Counter(family_sequence(weights, count, np.random.default_rng(int(rng.integers(1 << 30)))))
    total = sum(weights.values())
    assert sum(found.values()) == count and found["creative"] == 0
    for name, weight in weights.items():
        assert abs(found[name] - count * weight / total) < 1 + 1e-9


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"poetry": 1.0}, "'poetry': choose among structuring, summarization"),
        ({"qa": -0.5, "generic": 1.0}, "qa has weight -0.5"), ({"qa": float("nan")}, "qa has weight nan"),
        ({"qa": 0.0}, "all seed families have weight 0"), ({}, "all seed families"),
    ],
)  # fmt: skip
def test_bad_families_are_named(weights, words):
    with pytest.raises(UserError, match=words):
        family_sequence(weights, 4, np.random.default_rng(0))


# The study


def test_the_stored_log_probabilities_are_those_of_one_forward_pass_of_the_teacher(talker, studied):
    """Chunk, question and answer read as one text, without prefix or cache."""
    conversations, _, chosen = studied
    text = DOCUMENT_ITSELF.text
    _, offsets = talker.tokenizer.encode_with_offsets(text)
    for conversation in conversations[::3]:
        user, assistant = conversation.messages
        begin, end = conversation.metadata["chunk_span"]
        chunk = text[offsets[begin][0] : offsets[end - 1][1]]
        prefix = talker.chat.system_prefix(chunk).token_ids
        prefix += talker.chat.render_continuation([{"role": "user", "content": user.content}]).token_ids
        logits = sampling.logits(talker, prefix + assistant.token_ids).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        expected = logprobs[len(prefix) - 1 : -1]
        ids, stored = assistant.top_logprobs.dense()
        assert ids.shape == (len(assistant.token_ids), chosen.top_logprobs)
        np.testing.assert_allclose(stored, np.take_along_axis(expected, ids, axis=-1), atol=5e-4)
        np.testing.assert_allclose(stored, -np.sort(-expected, axis=-1)[:, : chosen.top_logprobs], atol=5e-4)


def test_the_end_of_turn_is_a_target_where_the_answer_ended(talker, studied):
    stopped = [c for c in studied[0] if c.metadata["stop_reason"] == "stop"]
    cut = [c for c in studied[0] if c.metadata["stop_reason"] == "length"]
    assert stopped
    for conversation in stopped:
        answer = conversation.messages[1]
        assert answer.token_ids[-1] in talker.chat.stop_ids
        assert answer.top_logprobs.shape[0] == len(answer.token_ids)
        assert not set(answer.token_ids[:-1]) & talker.chat.stop_ids
    assert all(len(c.messages[1].token_ids) == studied[2].answer_max_tokens for c in cut)


def test_every_conversation_says_where_it_came_from(talker, studied):
    conversations, directory, chosen = studied
    sentences = corpus_of(talker).documents[0].sentences
    assert len(conversations) == 14 == len({c.metadata["id"] for c in conversations})
    assert len({c.messages[0].content for c in conversations}) == 14
    for conversation in conversations:
        user, assistant = conversation.messages
        sentence = sentences[conversation.metadata["sentence_index"]].text
        assert conversation.metadata["seed_prompt"] == sentence and is_about(user.content, sentence)
        assert conversation.metadata["teacher_context"] == "chunk" and conversation.metadata["document"] == "doc"
        assert (user.role, assistant.role) == ("user", "assistant")
        assert talker.tokenizer.decode(user.token_ids) == user.content
        assert talker.tokenizer.decode(assistant.token_ids) == assistant.content
        assert not degenerates(assistant.token_ids, assistant.content)
    on_disk = [c for path in sorted(directory.glob("*.parquet")) for c in read_shard(path)]
    assert [c.metadata["id"] for c in on_disk[:14]] == [c.metadata["id"] for c in conversations]


def test_the_same_seed_gives_the_same_shards_and_missing_ones_are_regenerated_the_same(talker, studied, tmp_path):
    _, directory, chosen = studied
    before = contents(directory)
    assert len(before) > 1
    synthesise(talker, corpus_of(talker), tmp_path, chosen, seed=5)
    assert contents(tmp_path) == before
    sorted(tmp_path.glob("*.parquet"))[1].unlink()
    synthesise(talker, corpus_of(talker), tmp_path, chosen, seed=5)
    assert contents(tmp_path) == before


def test_with_the_whole_document_in_context_the_teacher_answers_otherwise_than_with_a_chunk(talker, studied, tmp_path):
    _, _, chosen = studied
    whole = dataclasses.replace(chosen, teacher_context="document", conversations=4)
    (conversation, *_) = synthesise(talker, corpus_of(talker), tmp_path, whole, seed=5).conversations
    user, assistant = conversation.messages
    prefix = talker.chat.system_prefix(DOCUMENT_ITSELF.text).token_ids
    prefix += talker.chat.render_continuation([{"role": "user", "content": user.content}]).token_ids
    logits = sampling.logits(talker, prefix + assistant.token_ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids, stored = assistant.top_logprobs.dense()
    expected = np.take_along_axis(logprobs[len(prefix) - 1 : -1], ids, axis=-1)
    np.testing.assert_allclose(stored, expected, atol=5e-4)
    part = talker.chat.system_prefix(DOCUMENT_ITSELF.text[: len(DOCUMENT_ITSELF.text) // 2]).token_ids
    part += talker.chat.render_continuation([{"role": "user", "content": user.content}]).token_ids
    after_a_chunk = sampling.logits(talker, part + assistant.token_ids)[len(part) - 1 : -1]
    assert not np.allclose(np.take_along_axis(after_a_chunk, ids, axis=-1), expected, atol=5e-4)


def test_a_model_that_writes_nothing_usable_is_reported_after_a_bounded_effort(tiny_model, study_settings, tmp_path):
    """The random model ends no line with a question mark."""
    chosen = dataclasses.replace(study_settings, families={"qa": 1.0}, writer_max_tokens=3, conversations=12)
    with pytest.raises(UserError, match="kept only [0-2] of 12 .*(cut|question_mark) .*study.writer"):
        synthesise(tiny_model, corpus_of(tiny_model), tmp_path, chosen, seed=0)
    assert len(list(tmp_path.glob("*.parquet"))) == 4 * 2


def test_every_written_message_is_a_conversation_or_is_counted_with_the_reason(
    talker, studied, study_settings, tmp_path
):
    _, directory, chosen = studied
    study = synthesise(talker, corpus_of(talker), directory, chosen, seed=5)
    batches = len(list(directory.glob("*.parquet")))
    assert study.written == {"generic": batches * chosen.requests_per_batch}
    assert set(study.dropped["generic"]) <= {*chosen.filters, "cut", "empty", "too_long", "surplus"}
    assert study.written["generic"] == len(study.conversations) + sum(study.dropped["generic"].values())
    assert study.counts["conversations"] == study.counts["wanted"] == 14


def test_a_resumed_study_counts_what_an_uninterrupted_one_counts(talker, studied, tmp_path):
    _, directory, chosen = studied
    whole = synthesise(talker, corpus_of(talker), directory, chosen, seed=5)

    def stop_at_the_second_batch(done: int, wanted: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(talker, corpus_of(talker), tmp_path, chosen, seed=5, on_progress=stop_at_the_second_batch)
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    resumed = synthesise(talker, corpus_of(talker), tmp_path, chosen, seed=5)
    assert resumed.counts == whole.counts
    # A shard without its counts is regenerated, and damaged counts are named.
    counts_path(tmp_path, 0).unlink()
    assert synthesise(talker, corpus_of(talker), tmp_path, chosen, seed=5).counts == whole.counts
    counts_path(tmp_path, 0).write_text("{}")
    with pytest.raises(UserError, match="shard-00000.json is not a readable file of counts .* delete it and rerun"):
        read_batch(tmp_path, 0)


def test_a_message_that_reached_its_length_limit_is_no_prompt(talker, studied, tmp_path):
    chosen = dataclasses.replace(studied[2], filters=(), conversations=10, writer_max_tokens=6)
    study = synthesise(talker, corpus_of(talker), tmp_path, chosen, seed=5)
    cut = study.dropped["generic"]["cut"]
    assert cut > 0 and set(study.dropped["generic"]) <= {"cut", "empty", "too_long", "surplus"}
    # The kept ones ended before the limit; a higher limit cuts fewer.
    assert all(len(c.messages[0].token_ids) < 6 for c in study.conversations)
    longer = dataclasses.replace(chosen, writer_max_tokens=12)
    (tmp_path / "longer").mkdir()
    again = synthesise(talker, corpus_of(talker), tmp_path / "longer", longer, seed=5)
    assert again.dropped.get("generic", {}).get("cut", 0) / again.written["generic"] < cut / study.written["generic"]


def test_a_study_that_falls_short_says_so_with_its_drops(talker, studied, monkeypatch, tmp_path):
    monkeypatch.setattr("cartridges_jax.selfstudy.synthesis._SPARE", 1)
    said = []
    chosen = dataclasses.replace(studied[2], conversations=20, writer_max_tokens=6, filters=())
    study = synthesise(talker, corpus_of(talker), tmp_path, chosen, seed=5, warn=said.append)
    assert 5 <= len(study.conversations) < 20 == study.counts["wanted"]
    (line,) = said
    assert f"kept only {len(study.conversations)} of 20 conversations (20 messages written; dropped: " in line


def test_an_unresolved_number_of_conversations_is_refused(talker, study_settings, tmp_path):
    auto = dataclasses.replace(study_settings, conversations=0)
    auto.check()
    with pytest.raises(ValueError, match="conversations=0"):
        synthesise(talker, corpus_of(talker), tmp_path, auto, seed=5)


def test_the_streams_of_seeds_batches_and_purposes_do_not_coincide():
    keys = [
        (seed, batch, purpose, name)
        for seed in range(8)
        for batch in range(8)
        for purpose in range(3)
        for name in NAMES
    ]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= stream_seed(*key) < 2**31 for key in keys)
    one, other = (np.random.default_rng(stream(*key)).random(4) for key in ((0, 1, 2), (0, 2, 1)))
    assert not np.allclose(one, other)


def test_the_paper_drops_nothing_and_small_models_do():
    SynthesisSettings().check()
    PAPER.check()
    assert PAPER.filters == () and set(SynthesisSettings().filters) == {
        "length", "question_mark", "echo", "about", "duplicate", "repetition",
    }  # fmt: skip
    assert {name for name, weight in PAPER.families.items() if weight} == {
        "structuring", "summarization", "question", "use_case", "creative",
    }  # fmt: skip
    with pytest.raises(UserError, match="study.filters has 'taste': choose among length"):
        dataclasses.replace(PAPER, filters=("taste",)).check()


def test_no_evaluation_question_reaches_what_a_or_b_read(talker_gguf, tmp_path, monkeypatch):
    write_inputs(tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"question": "Zanzibar quokka?", "answers": ["Xylophone"]}\n')
    texts: list[str] = []

    def recording(function):
        def record(model, tokens, *args, **kwargs):
            for ids in tokens if tokens and not isinstance(tokens[0], int) else [tokens]:
                texts.append(model.tokenizer.decode(ids))
            return function(model, tokens, *args, **kwargs)

        return record

    spied = types.SimpleNamespace(
        generate_tokens=recording(sampling.generate_tokens),
        prefill=recording(sampling.prefill),
        Sampling=sampling.Sampling,
        Generation=sampling.Generation,
    )
    monkeypatch.setattr(local_teacher, "sampling", spied)

    def stop(*args, **kwargs):
        raise UserError("studied enough")

    monkeypatch.setattr(pipeline, "train", stop)
    values = settings(talker_gguf, tmp_path, study__conversations=4, heldout=1)
    with pytest.raises(UserError, match="studied enough"):
        pipeline.run(config_of(values), tmp_path / "run")
    assert len(texts) > 10 and any("Shed 4" in text for text in texts)
    assert not any("Zanzibar" in text or "Xylophone" in text for text in texts)
