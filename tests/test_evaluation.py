"""The measures, against float64 on full logits, and what they must be by definition. The model is a tiny one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import random_prefix, random_tokens
from tiny_texts import save_tokenizer

from cartridges_jax import sampling
from cartridges_jax.corpus import Corpus, tokenize_corpus
from cartridges_jax.corpus.questions import Question
from cartridges_jax.data.schema import Conversation, Message, TopLogprobs
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.conditions import CONDITIONS, Condition, make_conditions, tokens_cut
from cartridges_jax.evaluation.evaluate import EvaluationSettings, evaluate
from cartridges_jax.evaluation.measuring import longest_example, scored_reference
from cartridges_jax.evaluation.metrics import normalise_answer
from cartridges_jax.evaluation.results import write_answers
from cartridges_jax.evaluation.scoring import Scored, answer_hidden, token_kl, token_nll
from cartridges_jax.evaluation.tasks import Example, TaskInputs, make_tasks
from cartridges_jax.prefixes.first_tokens import initialise_from_first_tokens
from cartridges_jax.text.chat import ChatTemplate
from cartridges_jax.text.tokenizer import tokenizer_from_directory

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


def tasks_of(model, questions, heldout=()):
    return make_tasks(SETTINGS.tasks, TaskInputs(corpus_of(model), questions, heldout))


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
def prefixes(tiny_model):
    """The default conditions with a cartridge that was never trained."""
    untrained = initialise_from_first_tokens(tiny_model, DOCUMENT.text, NUM_SLOTS)
    return make_conditions(tiny_model, corpus_of(tiny_model), untrained, room=80)


@pytest.fixture(scope="module")
def measured(tiny_model, prefixes, heldout):
    return evaluate(tiny_model, prefixes, tasks_of(tiny_model, QUESTIONS, heldout), SETTINGS)


def prefix_of(prefixes, name):
    return next(condition.prefix for condition in prefixes if condition.name == name)


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
    assert measured.conditions["whole_text"]["teacher_kl"] == measured.conditions["whole_text"]["heldout_kl"] == 0
    assert measured.conditions["none"]["teacher_kl"] > 1e-3


def test_an_untrained_cartridge_measures_what_the_first_tokens_do(measured):
    first, cartridge = measured.conditions["first_tokens"], measured.conditions["cartridge"]
    assert first == pytest.approx(cartridge)
    assert cartridge["prefix_tokens"] == NUM_SLOTS and cartridge["kv_bytes"] == 2 * 3 * 2 * NUM_SLOTS * 16 * 4
    assert measured.headline["kl_closed"] == pytest.approx(first["kl_closed"])


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_judge_scores_the_greedy_answers_of_each_condition(tiny_model, prefixes, measured, name):
    judge, own = prefix_of(prefixes, "whole_text"), []
    for question in QUESTIONS:
        prompt = prompt_of(tiny_model, question.question)
        (answer,) = sampling.generate_tokens(tiny_model, [prompt], prefix_of(prefixes, name), max_tokens=10)
        item = Scored(prompt, answer.token_ids)
        own.append(-answer_logprobs(tiny_model, judge, item)[np.arange(len(item.answer_ids)), item.answer_ids])
    assert measured.conditions[name]["own_nll"] == pytest.approx(np.concatenate(own).mean(), rel=1e-3)


@pytest.mark.parametrize("name", ["none", "cartridge"])
def test_the_divergence_is_measured_on_the_judges_greedy_answers_and_on_held_out_ones(
    tiny_model, prefixes, heldout, measured, name
):
    judge = prefix_of(prefixes, "whole_text")
    prompts = [prompt_of(tiny_model, question.question) for question in QUESTIONS]
    judged = [
        Scored(prompt, sampling.generate_tokens(tiny_model, [prompt], judge, max_tokens=10)[0].token_ids)
        for prompt in prompts
    ]
    kept_out = [Scored(prompt_of(tiny_model, c.messages[0].content), c.messages[1].token_ids) for c in heldout]
    for measure, items in (("teacher_kl", judged), ("heldout_kl", kept_out)):
        divergences = []
        for item in items:
            p, q = (answer_logprobs(tiny_model, prefix, item) for prefix in (judge, prefix_of(prefixes, name)))
            divergences.append((np.exp(p) * (p - q)).sum(-1))
        assert measured.conditions[name][measure] == pytest.approx(np.concatenate(divergences).mean(), rel=1e-3)


def test_the_reference_answers_likelihood_is_a_mean_over_their_tokens_and_the_end_of_turn(
    tiny_model, prefixes, measured
):
    end = tiny_model.chat.end_of_turn_id
    items = [
        Scored(prompt_of(tiny_model, q.question), [*tiny_model.tokenizer.encode(q.answers[0]), end]) for q in QUESTIONS
    ]
    for name in ("whole_text", "none"):
        expected = [
            -answer_logprobs(tiny_model, prefix_of(prefixes, name), item)[
                np.arange(len(item.answer_ids)), item.answer_ids
            ]
            for item in items
        ]
        assert measured.conditions[name]["answer_nll"] == pytest.approx(np.concatenate(expected).mean(), rel=1e-3)


@pytest.mark.parametrize("family", ["llama2", "llama3.2", "qwen3", "mistral-v3", "gemma3", "smollm2", "granite3"])
def test_a_reference_is_scored_as_the_template_renders_it(tmp_path, family):
    """The answer's tokens are those of transformers' rendering of the whole conversation, up to the end of the turn."""
    theirs = save_tokenizer(family, tmp_path)
    tokenizer = tokenizer_from_directory(tmp_path)
    model = SimpleNamespace(tokenizer=tokenizer, chat=ChatTemplate.from_directory(tmp_path, tokenizer))
    user, assistant = {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the island."}
    item = scored_reference(model, Example("0", (user,), ("On the island.",)))
    system = {"role": "system", "content": "S"}
    rendered = theirs.apply_chat_template([system, user, assistant], return_dict=False)
    end = len(rendered) - rendered[::-1].index(model.chat.end_of_turn_id)
    assert rendered[:end][-len(item.answer_ids) :] == item.answer_ids
    assert item.prompt_ids == model.chat.render_continuation([user]).token_ids
    assert theirs.decode(item.answer_ids, skip_special_tokens=True).strip() == "On the island."


def test_the_fractions_closed_follow_from_the_measures(measured):
    kl = {name: values["teacher_kl"] for name, values in measured.conditions.items()}
    for name in CONDITIONS:
        assert measured.conditions[name]["kl_closed"] == pytest.approx(1 - kl[name] / kl["none"])
    assert measured.headline["kl_closed"] == measured.conditions["cartridge"]["kl_closed"]
    nll = {name: values["answer_nll"] for name, values in measured.conditions.items()}
    if nll["none"] > nll["whole_text"]:
        expected = (nll["none"] - nll["cartridge"]) / (nll["none"] - nll["whole_text"])
        assert measured.headline["gap_closed"] == pytest.approx(expected)
    else:
        assert measured.headline["gap_closed"] is None and "no better" in measured.reasons["gap_closed"]


def test_the_judge_put_in_the_cartridges_place_closes_everything(tiny_model, prefixes, heldout):
    judge = prefix_of(prefixes, "whole_text")
    perfect = [Condition(c.name, judge if c.name == "cartridge" else c.prefix) for c in prefixes]
    found = evaluate(tiny_model, perfect, tasks_of(tiny_model, QUESTIONS, heldout), SETTINGS)
    assert found.headline["kl_closed"] == pytest.approx(1.0, abs=1e-5)
    assert found.conditions["cartridge"]["own_nll"] == pytest.approx(
        found.conditions["whole_text"]["own_nll"], rel=1e-5
    )


def test_what_each_condition_answered_is_kept_beside_the_references(tiny_model, prefixes, measured):
    assert [answer["question"] for answer in measured.answers] == [question.question for question in QUESTIONS]
    assert measured.answers[0]["references"] == ["21 tins of paint", "paint"]
    prompt = prompt_of(tiny_model, QUESTIONS[1].question)
    (answer,) = sampling.generate_tokens(tiny_model, [prompt], prefix_of(prefixes, "none"), max_tokens=10)
    assert measured.answers[1]["answers"]["none"] == tiny_model.tokenizer.decode(answer.token_ids).strip()


def test_the_order_of_the_questions_does_not_matter(tiny_model, prefixes, heldout, measured):
    again = evaluate(tiny_model, prefixes, tasks_of(tiny_model, QUESTIONS[::-1], heldout[::-1]), SETTINGS)
    for name, values in measured.conditions.items():
        for measure, value in values.items():
            # Differences of likelihoods may be small, so what follows from them is compared less strictly.
            other = again.conditions[name][measure]
            assert other == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-3)), (name, measure)


# What is missing


def test_without_questions_held_out_ones_are_answered_and_human_measures_have_reasons(tiny_model, prefixes, heldout):
    found = evaluate(tiny_model, prefixes, tasks_of(tiny_model, [], heldout), SETTINGS)
    for name, values in found.conditions.items():
        for measure in ("answer_nll", "teacher_kl", "f1", "exact_match", "facts"):
            assert values[measure] is None
            assert "no human questions" in found.reasons[f"conditions.{name}.{measure}"]
        assert values["heldout_kl"] is not None and values["own_nll"] is not None
    kl = {name: values["heldout_kl"] for name, values in found.conditions.items()}
    assert found.headline["kl_closed"] == pytest.approx(1 - kl["cartridge"] / kl["none"])
    for name in ("gap_closed", "facts"):
        assert found.headline[name] is None and "no human questions" in found.reasons[name]
    assert [answer["question"] for answer in found.answers] == [c.messages[0].content for c in heldout]


def test_without_held_out_conversations_their_divergence_has_a_reason(tiny_model, prefixes):
    found = evaluate(tiny_model, prefixes, tasks_of(tiny_model, QUESTIONS[:1]), SETTINGS)
    assert found.conditions["cartridge"]["heldout_kl"] is None
    assert "held out" in found.reasons["conditions.cartridge.heldout_kl"]
    assert found.headline["kl_closed"] is not None


def test_with_nothing_to_measure_on_the_remedy_is_named(tiny_model, prefixes):
    with pytest.raises(UserError, match="give questions, or hold conversations out"):
        evaluate(tiny_model, prefixes, tasks_of(tiny_model, []), SETTINGS)


def test_every_value_is_a_number_or_has_a_reason(measured):
    for name, values in measured.conditions.items():
        for measure, value in values.items():
            assert (value is None) == (f"conditions.{name}.{measure}" in measured.reasons)


def test_progress_ends_at_its_total_and_never_goes_back(tiny_model, prefixes, heldout):
    told = []
    tasks = tasks_of(tiny_model, QUESTIONS[:2], heldout[:1])
    evaluate(tiny_model, prefixes, tasks, SETTINGS, on_progress=lambda *at: told.append(at))
    assert told[-1][0] == told[-1][1] and len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# What the rows of single examples say


def test_every_number_of_a_condition_follows_from_the_rows(prefixes, measured):
    for condition in prefixes:
        rows = [row for row in measured.rows if row["condition"] == condition.name]
        of_questions = [row for row in rows if row["task"] == "questions"]
        assert len(rows) == 6 and len(of_questions) == 3
        values = measured.conditions[condition.name]
        for measure, members in (("answer_nll", of_questions), ("teacher_kl", of_questions), ("heldout_kl", rows[3:])):
            total, tokens = (sum(row[f"{measure}_{part}"] for row in members) for part in ("sum", "tokens"))
            assert values[measure] == pytest.approx(total / tokens)
        assert values["facts"] == sum(
            any(f" {normalise_answer(a)} " in f" {normalise_answer(row['answer'])} " for a in row["references"])
            for row in of_questions
        )
        assert values["f1"] == pytest.approx(np.mean([row["scores"]["f1"] for row in of_questions]))


def test_a_fact_is_counted_where_an_answer_contains_a_reference(tiny_model, prefixes, measured):
    """References taken from what the cartridge itself writes: one contained, one not."""
    said = measured.answers[0]["answers"]["cartridge"]
    assert normalise_answer(said)
    questions = [Question(QUESTIONS[0].question, ("zyx", said)), Question(QUESTIONS[1].question, ("zyx",))]
    found = evaluate(tiny_model, prefixes, tasks_of(tiny_model, questions), SETTINGS)
    assert found.headline["facts"] == found.conditions["cartridge"]["facts"] == 1
    assert found.answers[0]["scores"]["cartridge"]["facts"] == 1.0
    assert found.answers[1]["scores"]["cartridge"]["facts"] == 0.0


def test_the_parquet_file_holds_a_row_for_every_example_and_condition(tmp_path, prefixes, measured):
    write_answers(tmp_path / "answers.parquet", measured.rows)
    rows = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert [path.name for path in tmp_path.iterdir()] == ["answers.parquet"]
    assert len(rows) == len(prefixes) * (len(QUESTIONS) + 3)
    first = next(row for row in rows if row["condition"] == "cartridge" and row["question"] == QUESTIONS[0].question)
    assert first["references"] == list(QUESTIONS[0].answers) and first["task"] == "questions"
    assert first["answer"] == measured.answers[0]["answers"]["cartridge"]
    assert first["heldout_kl_sum"] is None and first["answer_nll_tokens"] > 0
    assert {"f1", "exact_match", "facts"} <= set(first)
    kept_out = [row for row in rows if row["task"] == "heldout" and row["condition"] == "none"]
    assert [row["answer"] for row in kept_out] == [None] * 3 and all(row["heldout_kl_sum"] > 0 for row in kept_out)


# Documents beyond the context


def test_a_document_beyond_the_context_is_cut_at_its_end_and_the_cut_is_counted(tiny_model):
    text = DOCUMENT.text * 4
    long = corpus_of(tiny_model, Corpus.from_text(text, "long"))
    whole = tiny_model.chat.system_prefix(text)
    cut = tokens_cut(tiny_model, long, room=70)
    assert cut == len(whole.token_ids) + 70 - 512 > 0
    untrained = initialise_from_first_tokens(tiny_model, text, NUM_SLOTS)
    (found,) = make_conditions(tiny_model, long, untrained, ("whole_text",), room=70)
    end = whole.spans[0][1]
    expected = sampling.prefill(tiny_model, whole.token_ids[: end - cut] + whole.token_ids[end:])
    assert found.prefix_tokens == 512 - 70
    np.testing.assert_allclose(found.prefix.keys, expected.keys, atol=1e-5)


def test_a_document_that_fits_is_not_cut(tiny_model):
    assert tokens_cut(tiny_model, corpus_of(tiny_model), room=70) == 0


def test_the_longest_example_counts_prompts_references_and_given_answers(tiny_model, heldout):
    def prompt(text):
        return len(prompt_of(tiny_model, text))

    encode = tiny_model.tokenizer.encode
    question = Question("What?", ("paint and more " * 4,))
    expected = prompt("What?") + len(encode(question.answers[0])) + 1
    assert longest_example(tiny_model, tasks_of(tiny_model, [question]), 10) == expected
    assert longest_example(tiny_model, tasks_of(tiny_model, [question]), 200) == prompt("What?") + 200
    longest = max(prompt(c.messages[0].content) + len(c.messages[1].token_ids) for c in heldout)
    assert longest_example(tiny_model, tasks_of(tiny_model, [Question("?", ("a",))], heldout), 1) == longest
