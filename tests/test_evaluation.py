"""The measures, against float64 on full logits, and what they must be by definition. The model is a tiny one."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import random_prefix, random_tokens

from cartridges_jax import sampling
from cartridges_jax.corpus import Corpus, tokenize_corpus
from cartridges_jax.corpus.questions import Question
from cartridges_jax.data.schema import Conversation, Message, TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.conditions import Condition, conditions, icl_tokens
from cartridges_jax.evaluation.evaluate import EvaluationSettings, evaluate
from cartridges_jax.evaluation.scoring import Scored, answer_hidden, token_kl, token_nll
from cartridges_jax.prefixes.first_tokens import initialise_from_first_tokens

DOCUMENT = Corpus.from_text(
    " ".join(f"Shed {n} holds {n * 7} tins of paint and a broom." for n in range(1, 9)), "sheds"
)


def corpus_of(model, corpus=DOCUMENT):
    return tokenize_corpus(corpus, model.tokenizer)


QUESTIONS = [
    Question("What is in shed 3?", ("21 tins of paint", "paint")),
    Question("Where is the broom?", ("In every shed.",)),
    Question("How many tins are in shed 8?", ("56",)),
]
SETTINGS = EvaluationSettings(max_answer_tokens=10, max_questions=0)
NUM_SLOTS = 20


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def prompt_of(model, question):
    return model.chat.render_continuation([{"role": "user", "content": question}]).token_ids


def answer_logprobs(model, prefix, item):
    """[len(answer), V] float64, from one plain forward pass."""
    logits = sampling.logits(model, item.prompt_ids + item.answer_ids, prefix)
    return log_softmax(logits)[len(item.prompt_ids) - 1 : -1]


@pytest.fixture(scope="module")
def heldout(tiny_model):
    """Three conversations as self-study keeps them."""
    whole = sampling.prefill(tiny_model, tiny_model.chat.system_prefix(DOCUMENT.text).token_ids)
    made = []
    for number, text in enumerate(("Tell me of shed 1.", "And what of shed 2?", "Paint, where?")):
        (answer,) = sampling.generate_tokens(
            tiny_model,
            [prompt_of(tiny_model, text)],
            whole,
            max_tokens=9,
            seed=number,
            top_logprobs=3,
            sampling=sampling.Sampling(1.0),
        )
        top = TopLogprobs.from_dense(answer.top_ids, answer.top_logprobs)
        content = tiny_model.tokenizer.decode(answer.token_ids)
        made.append(Conversation([Message("user", text, []), Message("assistant", content, answer.token_ids, top)], {}))
    return made


@pytest.fixture(scope="module")
def fronts(tiny_model):
    """The four conditions with a cartridge that was never trained."""
    untrained = initialise_from_first_tokens(tiny_model, DOCUMENT.text, NUM_SLOTS)
    found, cut = conditions(tiny_model, corpus_of(tiny_model), untrained, room=80)
    assert cut == 0
    return found


@pytest.fixture(scope="module")
def measured(tiny_model, fronts, heldout):
    return evaluate(tiny_model, fronts, QUESTIONS, heldout, SETTINGS)


def prefix_of(fronts, name):
    return next(condition.prefix for condition in fronts if condition.name == name)


# Scores of given answers


@pytest.mark.parametrize("with_prefix", [False, True])
def test_the_nll_of_every_token_is_that_of_full_logits_in_float64(tiny_model, rng, with_prefix):
    prefix = random_prefix(rng, tiny_model.config, 7) if with_prefix else None
    items = [
        Scored(random_tokens(rng, tiny_model.config, m).tolist(), random_tokens(rng, tiny_model.config, n).tolist())
        for m, n in ((5, 9), (1, 1), (20, 14), (3, 30))
    ]
    found = token_nll(tiny_model, answer_hidden(tiny_model, prefix, items), items)
    expected = [
        -answer_logprobs(tiny_model, prefix, item)[np.arange(len(item.answer_ids)), item.answer_ids] for item in items
    ]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4, atol=1e-4)


def test_the_kl_of_every_token_is_that_of_full_logits_in_float64(tiny_model, rng):
    teacher, student = random_prefix(rng, tiny_model.config, 11), random_prefix(rng, tiny_model.config, 4)
    items = [
        Scored(random_tokens(rng, tiny_model.config, 6).tolist(), random_tokens(rng, tiny_model.config, n).tolist())
        for n in (12, 2, 25)
    ]
    found = token_kl(tiny_model, *(answer_hidden(tiny_model, prefix, items) for prefix in (teacher, student)))
    expected = []
    for item in items:
        p, q = (answer_logprobs(tiny_model, prefix, item) for prefix in (teacher, student))
        expected.append((np.exp(p) * (p - q)).sum(-1))
    assert np.concatenate(expected).max() > 0.01
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=2e-3, atol=1e-4)


def test_many_items_are_scored_as_each_is_alone(tiny_model, rng):
    """More than a batch, of lengths that are sorted inside."""
    items = [
        Scored(
            random_tokens(rng, tiny_model.config, int(m)).tolist(), random_tokens(rng, tiny_model.config, 3).tolist()
        )
        for m in rng.integers(1, 40, 21)
    ]
    together = answer_hidden(tiny_model, None, items)
    alone = np.concatenate([answer_hidden(tiny_model, None, [item]) for item in items[:3] + items[-3:]])
    np.testing.assert_allclose(np.concatenate([together[:9], together[-9:]]), alone, atol=1e-4)


def test_an_item_that_exceeds_the_context_is_refused(tiny_model):
    with pytest.raises(UserError, match="context of 512"):
        answer_hidden(tiny_model, None, [Scored([1] * 500, [2] * 13)])


# The conditions


def test_the_whole_document_has_no_divergence_from_itself(measured):
    assert measured.conditions["icl"]["teacher_kl"] == measured.conditions["icl"]["heldout_kl"] == 0
    assert measured.conditions["none"]["teacher_kl"] > 1e-3


def test_an_untrained_cartridge_measures_what_the_first_tokens_do(measured):
    truncated, cartridge = measured.conditions["truncated"], measured.conditions["cartridge"]
    assert truncated == pytest.approx(cartridge)
    assert cartridge["prefix_tokens"] == NUM_SLOTS and cartridge["kv_bytes"] == 2 * 3 * 2 * NUM_SLOTS * 16 * 4
    assert measured.closed["kl_closed"] == pytest.approx(measured.closed["kl_closed_truncated"])


@pytest.mark.parametrize("name", ["none", "truncated", "icl", "cartridge"])
def test_the_judge_scores_the_greedy_answers_of_each_condition(tiny_model, fronts, measured, name):
    judge, own = prefix_of(fronts, "icl"), []
    for question in QUESTIONS:
        prompt = prompt_of(tiny_model, question.question)
        (answer,) = sampling.generate_tokens(tiny_model, [prompt], prefix_of(fronts, name), max_tokens=10)
        item = Scored(prompt, answer.token_ids)
        own.append(-answer_logprobs(tiny_model, judge, item)[np.arange(len(item.answer_ids)), item.answer_ids])
    assert measured.conditions[name]["own_nll"] == pytest.approx(np.concatenate(own).mean(), rel=1e-3)


@pytest.mark.parametrize("name", ["none", "cartridge"])
def test_the_divergence_is_measured_on_the_judges_greedy_answers_and_on_held_out_ones(
    tiny_model, fronts, heldout, measured, name
):
    judge = prefix_of(fronts, "icl")
    prompts = [prompt_of(tiny_model, question.question) for question in QUESTIONS]
    judged = [
        Scored(prompt, sampling.generate_tokens(tiny_model, [prompt], judge, max_tokens=10)[0].token_ids)
        for prompt in prompts
    ]
    kept_out = [Scored(prompt_of(tiny_model, c.messages[0].content), c.messages[1].token_ids) for c in heldout]
    for measure, items in (("teacher_kl", judged), ("heldout_kl", kept_out)):
        divergences = []
        for item in items:
            p, q = (answer_logprobs(tiny_model, prefix, item) for prefix in (judge, prefix_of(fronts, name)))
            divergences.append((np.exp(p) * (p - q)).sum(-1))
        assert measured.conditions[name][measure] == pytest.approx(np.concatenate(divergences).mean(), rel=1e-3)


def test_the_reference_answers_likelihood_is_a_mean_over_their_tokens(tiny_model, fronts, measured):
    items = [Scored(prompt_of(tiny_model, q.question), tiny_model.tokenizer.encode(q.answers[0])) for q in QUESTIONS]
    for name in ("icl", "none"):
        expected = [
            -answer_logprobs(tiny_model, prefix_of(fronts, name), item)[
                np.arange(len(item.answer_ids)), item.answer_ids
            ]
            for item in items
        ]
        assert measured.conditions[name]["answer_nll"] == pytest.approx(np.concatenate(expected).mean(), rel=1e-3)


def test_the_fractions_closed_follow_from_the_measures(measured):
    kl = {name: values["teacher_kl"] for name, values in measured.conditions.items()}
    assert measured.closed["kl_closed"] == pytest.approx(1 - kl["cartridge"] / kl["none"])
    nll = {name: values["answer_nll"] for name, values in measured.conditions.items()}
    if nll["none"] > nll["icl"]:
        expected = (nll["none"] - nll["cartridge"]) / (nll["none"] - nll["icl"])
        assert measured.closed["gap_closed"] == pytest.approx(expected)
    else:
        assert measured.closed["gap_closed"] is None and "no better" in measured.reasons["gap_closed"]


def test_the_judge_put_in_the_cartridges_place_closes_everything(tiny_model, fronts, heldout):
    judge = prefix_of(fronts, "icl")
    perfect = [Condition(c.name, judge if c.name == "cartridge" else c.prefix) for c in fronts]
    found = evaluate(tiny_model, perfect, QUESTIONS, heldout, SETTINGS)
    assert found.closed["kl_closed"] == pytest.approx(1.0, abs=1e-5)
    assert found.conditions["cartridge"]["own_nll"] == pytest.approx(found.conditions["icl"]["own_nll"], rel=1e-5)


def test_what_each_condition_answered_is_kept_beside_the_references(tiny_model, fronts, measured):
    assert [answer["question"] for answer in measured.answers] == [question.question for question in QUESTIONS]
    assert measured.answers[0]["references"] == ["21 tins of paint", "paint"]
    prompt = prompt_of(tiny_model, QUESTIONS[1].question)
    (answer,) = sampling.generate_tokens(tiny_model, [prompt], prefix_of(fronts, "none"), max_tokens=10)
    assert measured.answers[1]["none"] == tiny_model.tokenizer.decode(answer.token_ids).strip()


def test_the_order_of_the_questions_does_not_matter(tiny_model, fronts, heldout, measured):
    again = evaluate(tiny_model, fronts, QUESTIONS[::-1], heldout[::-1], SETTINGS)
    for name, values in measured.conditions.items():
        assert again.conditions[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


# What is missing


def test_without_questions_held_out_ones_are_answered_and_human_measures_have_reasons(tiny_model, fronts, heldout):
    found = evaluate(tiny_model, fronts, [], heldout, SETTINGS)
    for name, values in found.conditions.items():
        for measure in ("answer_nll", "teacher_kl", "f1", "exact_match"):
            assert values[measure] is None
            assert "no human questions" in found.reasons[f"conditions.{name}.{measure}"]
        assert values["heldout_kl"] is not None and values["own_nll"] is not None
    kl = {name: values["heldout_kl"] for name, values in found.conditions.items()}
    assert found.closed["kl_closed"] == pytest.approx(1 - kl["cartridge"] / kl["none"])
    assert found.closed["gap_closed"] is None and "no human questions" in found.reasons["gap_closed"]
    assert [answer["question"] for answer in found.answers] == [c.messages[0].content for c in heldout]


def test_without_held_out_conversations_their_divergence_has_a_reason(tiny_model, fronts):
    found = evaluate(tiny_model, fronts, QUESTIONS[:1], [], SETTINGS)
    assert found.conditions["cartridge"]["heldout_kl"] is None
    assert "held out" in found.reasons["conditions.cartridge.heldout_kl"]
    assert found.closed["kl_closed"] is not None


def test_with_nothing_to_measure_on_the_remedy_is_named(tiny_model, fronts):
    with pytest.raises(UserError, match="give questions, or hold conversations out"):
        evaluate(tiny_model, fronts, [], [], SETTINGS)


def test_every_value_is_a_number_or_has_a_reason(measured):
    for name, values in measured.conditions.items():
        for measure, value in values.items():
            assert (value is None) == (f"conditions.{name}.{measure}" in measured.reasons)


def test_progress_ends_at_its_total_and_never_goes_back(tiny_model, fronts, heldout):
    told = []
    evaluate(tiny_model, fronts, QUESTIONS[:2], heldout[:1], SETTINGS, on_progress=lambda *at: told.append(at))
    assert told[-1][0] == told[-1][1] and len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# Documents beyond the context


def test_a_document_beyond_the_context_is_cut_at_its_end_and_the_cut_is_told(tiny_model):
    text = DOCUMENT.text * 4
    whole = tiny_model.chat.system_prefix(text)
    tokens, cut = icl_tokens(tiny_model, corpus_of(tiny_model, Corpus.from_text(text, "long")), room=70)
    assert cut == len(whole.token_ids) + 70 - 512 > 0 and len(tokens) == 512 - 70
    closing = whole.token_ids[whole.spans[0][1] :]
    assert tokens == whole.token_ids[: len(tokens) - len(closing)] + closing
    found, told = conditions(
        tiny_model,
        corpus_of(tiny_model, Corpus.from_text(text, "long")),
        initialise_from_first_tokens(tiny_model, text, NUM_SLOTS),
        room=70,
    )
    assert told == cut and prefix_of(found, "icl").num_slots == 512 - 70


def test_a_document_that_fits_is_not_cut(tiny_model):
    tokens, cut = icl_tokens(tiny_model, corpus_of(tiny_model), room=70)
    assert cut == 0 and tokens == tiny_model.chat.system_prefix(DOCUMENT.text).token_ids
