"""Teachers: the local model, teachers of one's own, and A, who writes with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_runs import DOCUMENT, config_of, settings, talker_gguf, write_inputs  # noqa: F401

from cartridges_jax import sampling
from cartridges_jax.corpus import Corpus, tokenize_corpus
from cartridges_jax.data.schema import TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.models import load_model
from cartridges_jax.selfstudy import TEACHERS, LocalTeacher, Reply, make_teacher, register, scoring
from cartridges_jax.selfstudy.seeds import FAMILIES
from cartridges_jax.selfstudy.settings import SynthesisSettings
from cartridges_jax.selfstudy.synthesis import _share_of, synthesise
from cartridges_jax.selfstudy.writer import Request, Writer

QUESTION = [{"role": "user", "content": "t and s?"}]


@pytest.fixture(scope="module")
def talker(talker_gguf):
    return load_model(str(talker_gguf))


@pytest.fixture(scope="module")
def corpus(talker):
    return tokenize_corpus(Corpus.from_text(DOCUMENT, "doc"), talker.tokenizer)


@pytest.fixture
def study_settings(talker_gguf, tmp_path):
    write_inputs(tmp_path)
    chosen = config_of(settings(talker_gguf, tmp_path)).study
    return dataclasses.replace(chosen, chunk_min_tokens=100, chunk_max_tokens=100, teacher_context="chunk")


@pytest.fixture
def echo():
    """A teacher that answers by a rule, registered as its users would; removed after the test."""

    @register("echo")
    class Echo:
        """Repeats the last words of the last message, which it is sure of."""

        def __init__(self, model, argument, heartbeat):
            self.name = "echo"
            self._model, self._num_words = model, int(argument or 2)

        def reply(self, context, conversations, *, max_tokens, temperature, top_logprobs=0, seed=0):
            return [self._one(messages, top_logprobs) for messages in conversations]

        def _one(self, messages, k):
            text = " ".join(messages[-1]["content"].split()[-self._num_words :])
            ids = [*self._model.tokenizer.encode(text), self._model.chat.end_of_turn_id]
            tokens = np.asarray(ids)[:, None] + np.arange(k)
            sure = np.log(np.full((len(ids), k), 1e-9)) + np.where(np.arange(k) == 0, -np.log(1e-9), 0.0)
            return Reply(text, ids, TopLogprobs.from_dense(tokens, sure), "stop")

    yield Echo
    del TEACHERS["echo"]


# Teachers of one's own


def test_a_teacher_of_ones_own_is_chosen_by_name_and_argument(echo, talker, corpus, study_settings, tmp_path):
    chosen = dataclasses.replace(study_settings, teacher="echo:1", writer="chat", filters=(), conversations=8)
    study = synthesise(talker, corpus, tmp_path, chosen, seed=1)
    assert len(study.conversations) == 8
    prompts = {prompt.split()[-1] for prompt in FAMILIES["generic"].instructions}
    for conversation in study.conversations:
        user, assistant = conversation.messages
        assert user.content in prompts and assistant.content == user.content
        assert conversation.metadata["teacher"] == "echo"
        assert assistant.token_ids[-1] == talker.chat.end_of_turn_id
        ids, logprobs = assistant.top_logprobs.dense()
        assert ids[:, 0].tolist() == assistant.token_ids and np.allclose(logprobs[:, 0], 0)


def test_a_capability_that_a_teacher_lacks_is_named_with_the_remedy(echo, talker, corpus, study_settings, tmp_path):
    chosen = dataclasses.replace(study_settings, teacher="echo")
    with pytest.raises(UserError, match="study.writer='completion' .* 'echo' cannot do: use study.writer=chat"):
        synthesise(talker, corpus, tmp_path, chosen, seed=1)
    scored = dataclasses.replace(chosen, writer="chat", score_user_messages=True)
    with pytest.raises(UserError, match="study.score_user_messages=True: the teacher 'echo' cannot score"):
        synthesise(talker, corpus, tmp_path, scored, seed=1)


def test_answers_without_log_probabilities_are_refused(echo, talker, corpus, study_settings, tmp_path):
    @register("bare")
    class Bare(echo):
        def _one(self, messages, k):
            return super()._one(messages, 2)._replace(top_logprobs=None)

    chosen = dataclasses.replace(study_settings, teacher="bare", writer="chat", filters=())
    try:
        with pytest.raises(UserError, match="study.teacher=bare: .* without log-probabilities"):
            synthesise(talker, corpus, tmp_path, chosen, seed=1)
    finally:
        del TEACHERS["bare"]


def test_an_unknown_teacher_is_refused_with_the_names_there_are(talker):
    with pytest.raises(UserError, match="study.teacher 'oracle:x': choose one of local"):
        dataclasses.replace(SynthesisSettings(), teacher="oracle:x").check()
    with pytest.raises(UserError, match="'local:x': the local teacher takes no argument"):
        make_teacher("local:x", talker)


# Processes


class Process:
    """A job's view of one of its processes."""

    def __init__(self, process: int, num_processes: int):
        self.process, self.num_processes = process, num_processes


class Shared:
    """A teacher that processes 0 and 1 hold together, and 2 and 3."""

    name = "shared"

    def process_groups(self):
        return [(0, 1), (2, 3)]

    def on_group(self, number):
        return f"group {number}"


def test_processes_that_share_a_teacher_make_a_batch_together_and_one_of_them_writes_it():
    shares = [_share_of(Shared(), Process(process, 4)) for process in range(4)]
    assert shares == [
        ("group 0", 0, 2, True), ("group 0", 0, 2, False), ("group 1", 1, 2, True), ("group 1", 1, 2, False),
    ]  # fmt: skip


def test_every_process_makes_batches_of_its_own_with_a_teacher_that_is_not_spread(echo, talker):
    teacher = make_teacher("echo", talker)
    assert [_share_of(teacher, Process(process, 3)) for process in range(3)] == [
        (teacher, process, 3, True) for process in range(3)
    ]


# The local teacher


def test_the_local_teacher_answers_as_the_sampler_does_after_the_context(talker):
    conversations = [QUESTION, [*QUESTION, {"role": "assistant", "content": "w and c"}, *QUESTION]]
    replies = LocalTeacher(talker).reply(DOCUMENT, conversations, max_tokens=8, temperature=0.0, top_logprobs=3)
    head = talker.chat.system_prefix(DOCUMENT).token_ids
    for messages, reply in zip(conversations, replies, strict=True):
        prompt = head + talker.chat.render_continuation(messages).token_ids
        # Greedy, by whole forward passes.
        ids: list[int] = []
        while len(ids) < 8 and not set(ids) & talker.chat.stop_ids:
            ids.append(int(sampling.logits(talker, prompt + ids)[-1].argmax()))
        assert reply.token_ids == ids and reply.text == talker.tokenizer.decode(ids)
        assert reply.stop_reason == ("stop" if ids[-1] in talker.chat.stop_ids else "length")
        assert reply.top_logprobs.shape == (len(ids), 3) and reply.top_logprobs.dense()[0][:, 0].tolist() == ids


def test_a_context_is_prefilled_once_and_shared(talker, monkeypatch):
    read = []

    def counting(model, token_ids, *args):
        read.append(len(token_ids))
        return prefill(model, token_ids, *args)

    prefill = sampling.prefill
    monkeypatch.setattr(sampling, "prefill", counting)
    teacher = LocalTeacher(talker)
    for context in (DOCUMENT[:60], DOCUMENT, DOCUMENT[:60], DOCUMENT):
        teacher.reply(context, [QUESTION, QUESTION], max_tokens=2, temperature=0.0)
    assert len(read) == 2
    assert teacher.reply(DOCUMENT[:50], [], max_tokens=2, temperature=0.0) == [] and len(read) == 2


def test_a_heartbeat_that_raises_ends_the_local_teachers_work(talker):
    def stop():
        raise KeyboardInterrupt

    teacher = make_teacher("local", talker, stop)
    with pytest.raises(KeyboardInterrupt):
        teacher.reply(DOCUMENT[:60], [QUESTION], max_tokens=2, temperature=0.0)
    with pytest.raises(KeyboardInterrupt):
        teacher.score(DOCUMENT[:60], [QUESTION], top_logprobs=2)


# Scoring what is already written


def one_at_a_time(model, token_ids, begin, end, k):
    """The k most likely tokens at token_ids[begin:end], from the logits of a whole forward pass."""
    logits = sampling.logits(model, token_ids).astype(np.float64)[begin - 1 : end - 1]
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= logits.max(-1, keepdims=True)
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logprobs, ids, axis=-1)


def messages_of(lengths):
    return [[{"role": "user", "content": " ".join(["t and s", "w c", "b f?"] * n)[: 5 * n]}] for n in lengths]


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_scores_of_many_messages_equal_those_of_one_at_a_time(talker, monkeypatch, tokens):
    """Long and short ones, in one batch, in several, and one row at a time."""
    monkeypatch.setattr(scoring, "_TOKENS", tokens)
    monkeypatch.setattr(scoring, "_PLACES", 24)
    conversations = messages_of([1, 9, 2, 3, 16, 1, 5])
    scores = LocalTeacher(talker).score(DOCUMENT, conversations, top_logprobs=5)
    head = talker.chat.system_prefix(DOCUMENT).token_ids
    for messages, score in zip(conversations, scores, strict=True):
        rendered = talker.chat.render_continuation(messages)
        begin, end = rendered.spans[-1]
        ids, logprobs = one_at_a_time(talker, head + rendered.token_ids, len(head) + begin, len(head) + end, 5)
        found_ids, found = score.dense()
        assert score.shape == (end - begin, 5)
        np.testing.assert_allclose(found, logprobs, atol=5e-4)
        # Where two tokens are all but equally likely, either may come first.
        distinct = np.abs(np.diff(logprobs, axis=-1, append=-np.inf)).min(-1) > 1e-3
        np.testing.assert_array_equal(found_ids[distinct], ids[distinct])


def test_a_message_that_directly_follows_the_system_message_is_scored_from_its_first_token(talker, monkeypatch):
    """As in templates that write the system message into the user's turn."""
    head, ids = talker.chat.system_prefix(DOCUMENT).token_ids, talker.tokenizer.encode("t and s?")
    rendered = dataclasses.replace(
        talker.chat.render_continuation(QUESTION), token_ids=[*ids, talker.chat.end_of_turn_id], spans=[(0, len(ids))]
    )
    monkeypatch.setattr(type(talker.chat), "render_continuation", lambda self, messages, **more: rendered)
    (score,) = LocalTeacher(talker).score(DOCUMENT, [QUESTION], top_logprobs=3)
    expected = one_at_a_time(talker, head + rendered.token_ids, len(head), len(head) + len(ids), 3)
    np.testing.assert_allclose(score.dense()[1], expected[1], atol=5e-4)


def test_a_study_stores_the_scores_of_the_messages_where_they_are_asked_for(talker, corpus, study_settings, tmp_path):
    chosen = dataclasses.replace(study_settings, score_user_messages=True, conversations=3)
    study = synthesise(talker, corpus, tmp_path, chosen, seed=1)
    for conversation in study.conversations:
        user = conversation.messages[0]
        assert user.top_logprobs.shape == (len(user.token_ids), chosen.top_logprobs)


# A, who writes with a teacher


def writer_of(model, style):
    chosen = dataclasses.replace(
        SynthesisSettings(), writer=style, writer_max_tokens=12, writer_temperature=1.0, writer_top_k=0
    )
    return Writer(LocalTeacher(model), chosen)


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_either_style_writes_messages_that_depend_on_seed_and_batch(talker, corpus, style):
    sentences = corpus.documents[0].sentences
    requests = [Request("generic", i, s.text, i) for i, s in enumerate(sentences)]
    author = writer_of(talker, style)
    written = author.write(requests, DOCUMENT, seed=0, batch=0)
    assert len(written) == len(requests)
    assert sum(len(message.text.split()) >= 2 and not message.is_cut for message in written) >= 4
    assert all("\n" not in message.text for message in written) or style == "chat"
    assert author.write(requests, DOCUMENT, seed=0, batch=0) == written
    assert written != author.write(requests, DOCUMENT, seed=1, batch=0)
    assert written != author.write(requests, DOCUMENT, seed=0, batch=1)


def test_the_chat_style_reads_the_chunk(talker):
    requests = [Request("generic", i, "x", 0) for i in range(8)]
    author = writer_of(talker, "chat")
    one, other = (author.write(requests, text, seed=0, batch=0) for text in (DOCUMENT[:60], DOCUMENT[60:120]))
    assert one != other


def test_the_completion_style_shows_the_examples_and_the_sentence(talker, monkeypatch):
    read = []

    class Recorder(LocalTeacher):
        def complete(self, head, prompts, **more):
            read.append((head, list(prompts)))
            return super().complete(head, prompts, **more)

    author = Writer(Recorder(talker), SynthesisSettings(writer_max_tokens=4))
    author.write([Request("qa", 1, "Shed 4 has t.", 0), Request("generic", 0, "Boat 2.", 1)], "", seed=0, batch=0)
    heads = {prompts[0]: head for head, prompts in read}
    assert set(heads) == {"Fact: Shed 4 has t.\nQuestion: What", "Fact: Boat 2.\nMessage:"}
    assert all(example in heads["Fact: Boat 2.\nMessage:"] for example in FAMILIES["generic"].pattern.examples[0])
