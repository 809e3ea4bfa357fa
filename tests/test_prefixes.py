"""Prefixes by name, each against an independent construction: transformers' cache, NumPy, or the saved cartridge."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from peers import torch
from tiny import random_prefix

from cartridges_jax import sampling
from cartridges_jax.checkpoint import CartridgeMetadata, DocumentSource, save_cartridge
from cartridges_jax.corpus import Corpus, Document, tokenize_corpus
from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.config import default_config, from_config_dict
from cartridges_jax.prefixes import (
    PREFIXES,
    check_initial_prefix,
    check_prefix_name,
    make_initial_prefix,
    make_prefix,
    prefix_fingerprint,
    prefix_title,
    register,
)
from cartridges_jax.prefixes.first_tokens import first_tokens
from cartridges_jax.prefixes.random_vectors import SAMPLE_TOKENS
from cartridges_jax.prefixes.summary import REQUEST
from cartridges_jax.prefixes.unrelated_text import shipped_text, unrelated_tokens

TEXT = "the cat and the hat of the other thing " * 5
MEMBERS = ["none", "first_tokens", "whole_text", "unrelated_text", "random_vectors", "summary"]


def corpus_of(model, *texts):
    documents = [Document(f"part {number}", text.strip()) for number, text in enumerate(texts or (TEXT,))]
    return tokenize_corpus(Corpus(tuple(documents)), model.tokenizer)


def make(name, model, *texts, num_slots=24, seed=0, room=0):
    return make_prefix(name, model, corpus_of(model, *texts), num_slots, np.random.default_rng(seed), room=room)


def assert_holds(prefix, twin, token_ids):
    """The prefix is transformers' cache of these tokens, at positions 0..P-1."""
    assert (prefix.num_slots, int(prefix.next_position)) == (len(token_ids), len(token_ids))
    np.testing.assert_array_equal(prefix.positions, np.arange(len(token_ids)))
    layers = twin(torch.tensor([token_ids]), use_cache=True).past_key_values.layers
    for layer, cached in enumerate(layers):
        np.testing.assert_allclose(prefix.keys[layer], cached.keys[0], atol=1e-4)
        np.testing.assert_allclose(prefix.values[layer], cached.values[0], atol=1e-4)


@pytest.fixture
def registered():
    """Undoes what a test registers."""
    before = dict(PREFIXES)
    yield
    PREFIXES.clear()
    PREFIXES.update(before)


def save(directory, model, prefix):
    metadata = CartridgeMetadata.of(
        prefix,
        model=model,
        learning_mask=np.arange(prefix.num_slots) > 0,
        documents=[DocumentSource("a book", "ab" * 32, 1234)],
        step=1,
        config={},
    )
    save_cartridge(directory, prefix, metadata)
    return f"pretrained:{directory}"


# The registry


def test_an_initialiser_of_ones_own_is_registered_in_a_few_lines_and_used_by_name(tiny_pair, registered):
    model, twin = tiny_pair

    @register("last_tokens", title="The last tokens")
    def make_last_tokens(model, corpus, num_slots, rng, *, room=0):
        return sampling.prefill(model, corpus.documents[-1].token_ids[-num_slots:].tolist())

    check_prefix_name("last_tokens")
    assert prefix_title("last_tokens") == "The last tokens"
    assert_holds(make("last_tokens", model), twin, model.tokenizer.encode(TEXT.strip())[-24:])
    prefix = make_initial_prefix("last_tokens", model, corpus_of(model), 24, np.random.default_rng(0))
    assert prefix.num_slots == 24


def test_an_unknown_name_is_refused_and_the_names_are_listed():
    with pytest.raises(
        UserError, match=r"'last_token'.*first_tokens, none, pretrained:DIR.*summary\[:TOKENS\]"
    ) as caught:
        check_prefix_name("last_token")
    assert all(name in str(caught.value) for name in MEMBERS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first_tokens:5", "takes no argument, leave out ':5'"),
        ("pretrained", "lacks its argument: write pretrained:DIR"),
        ("pretrained:", "lacks its argument"),
        ("pretrained:no/such/directory", "no/such/directory is not a cartridge"),
        ("summary:", "lacks its argument"),
        ("summary:few", "give a number of tokens, 8 or more"),
        ("summary:-20", "give a number of tokens"),
        ("summary:3", "8 or more"),
    ],
)
def test_a_bad_argument_is_refused_without_a_model(name, message):
    with pytest.raises(UserError, match=message):
        check_prefix_name(name)


def test_every_member_has_a_title_that_names_its_argument():
    assert len({prefix_title(name) for name in MEMBERS}) == len(MEMBERS)
    assert prefix_title("summary:256").endswith("(256)")


def test_a_name_with_a_colon_is_not_registered():
    with pytest.raises(ValueError, match="without a colon"):
        register("a:b", title="")


def test_a_config_with_an_unknown_initial_prefix_is_refused_before_a_model_is_loaded():
    config = default_config()
    assert config.cartridge.init == "first_tokens"
    config.cartridge.init = "last_words"
    with pytest.raises(UserError, match="no prefix 'last_words'"):
        from_config_dict(config)


@pytest.mark.parametrize("name", MEMBERS)
def test_equal_generators_give_equal_prefixes(tiny_model, name):
    first, second = (make(name, tiny_model, num_slots=64, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.keys, second.keys)
    np.testing.assert_array_equal(first.values, second.values)


# No context


def test_no_context_is_the_templates_default_beginning(tiny_pair):
    model, twin = tiny_pair
    user = [{"role": "user", "content": "x"}]
    whole = model.chat.render(user, add_generation_prompt=True).token_ids
    after = model.chat.render_continuation(user).token_ids
    assert "helpful AI assistant" in model.tokenizer.decode(whole[: -len(after)])
    assert_holds(make("none", model), twin, whole[: -len(after)])


def test_no_context_after_a_template_without_a_beginning_is_no_prefix(tiny_model):
    class Chat:
        def default_head(self):
            return []

    model = dataclasses.replace(tiny_model, chat=Chat())
    assert make("none", model) is None
    with pytest.raises(UserError, match="gives 0 slots"):
        make_initial_prefix("none", model, corpus_of(model), 24, np.random.default_rng(0))


# First tokens


def test_the_first_p_tokens_keep_the_end_of_the_system_message_last(tiny_model):
    rendered = tiny_model.chat.system_prefix(TEXT)
    end = rendered.spans[0][1]
    closing = rendered.token_ids[end:]
    assert tiny_model.tokenizer.decode(closing, skip_control=False) == "<|im_end|>\n"
    found = first_tokens(tiny_model, TEXT, 24)
    assert len(found) == 24
    assert found[: 24 - len(closing)] == rendered.token_ids[: 24 - len(closing)]
    assert found[24 - len(closing) :] == closing


def test_first_tokens_hold_transformers_keys_and_values(tiny_pair):
    model, twin = tiny_pair
    assert_holds(make("first_tokens", model), twin, first_tokens(model, TEXT.strip(), 24))


def test_first_tokens_of_two_documents_begin_with_the_first_ones_name(tiny_pair):
    model, twin = tiny_pair
    expected = first_tokens(model, f"part 0\n\n{TEXT.strip()}\n\npart 1\n\nother words", 24)
    assert_holds(make("first_tokens", model, TEXT, "other words"), twin, expected)


def test_a_cartridge_not_smaller_than_its_document_is_refused(tiny_model):
    text = "the cat and the hat " * 8
    length = len(tiny_model.chat.system_prefix(text).token_ids)
    assert len(first_tokens(tiny_model, text, length - 1)) == length - 1
    with pytest.raises(UserError, match=f"fills {length} tokens"):
        first_tokens(tiny_model, text, length)
    with pytest.raises(UserError, match="choose fewer slots"):
        check_initial_prefix("first_tokens", tiny_model, corpus_of(tiny_model, text), length + 1)


def test_a_cartridge_without_room_for_content_is_refused_and_the_named_size_works(tiny_model):
    text = "the cat and the hat " * 8
    with pytest.raises(UserError, match="choose at least") as caught:
        first_tokens(tiny_model, text, 3)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    assert len(first_tokens(tiny_model, text, smallest)) == smallest
    with pytest.raises(UserError, match="choose at least"):
        first_tokens(tiny_model, text, smallest - 1)


# The whole text


def test_the_whole_text_is_read_whole_where_it_fits(tiny_pair):
    model, twin = tiny_pair
    assert_holds(make("whole_text", model, room=100), twin, model.chat.system_prefix(TEXT.strip()).token_ids)


def test_a_text_beyond_the_context_is_cut_at_its_end_so_that_the_room_stays_free(tiny_pair):
    model, twin = tiny_pair
    long = (TEXT * 10).strip()
    rendered = model.chat.system_prefix(long)
    closing = rendered.token_ids[rendered.spans[0][1] :]
    kept = model.config.context_length - 100 - len(closing)
    assert_holds(make("whole_text", model, long, room=100), twin, rendered.token_ids[:kept] + closing)
    with pytest.raises(UserError, match="leaves no room for the text"):
        make("whole_text", model, long, room=model.config.context_length - 8)


def test_the_whole_text_initialises_only_a_cartridge_of_its_size(tiny_model):
    corpus, rng = corpus_of(tiny_model), np.random.default_rng(0)
    length = len(tiny_model.chat.system_prefix(TEXT.strip()).token_ids)
    assert make_initial_prefix("whole_text", tiny_model, corpus, length, rng).num_slots == length
    with pytest.raises(UserError, match=f"fills {length} slots and the cartridge has {length - 1}"):
        check_initial_prefix("whole_text", tiny_model, corpus, length - 1)


# Unrelated text


def test_unrelated_text_is_the_shipped_one_with_the_end_of_the_system_message_last(tiny_pair):
    model, twin = tiny_pair
    tokens = unrelated_tokens(model, 40)
    decoded = model.tokenizer.decode(tokens, skip_control=False)
    assert decoded.startswith("<|im_start|>system\n# A Year in the Kitchen") and decoded.endswith("<|im_end|>\n")
    assert_holds(make("unrelated_text", model, num_slots=40), twin, tokens)


def test_the_unrelated_text_fills_two_thousand_slots_with_words_and_repeats_beyond_its_end(tiny_model):
    # A published vocabulary has fewer than 1.1 words per token of English.
    assert len(shipped_text().split()) > 1800
    length = len(tiny_model.chat.system_prefix(shipped_text()).token_ids)
    tokens = unrelated_tokens(tiny_model, length + 1000)
    assert len(tokens) == length + 1000
    assert tiny_model.tokenizer.decode(tokens).count("# A Year in the Kitchen Garden") == 2


# Random vectors


def test_random_vectors_have_the_mean_and_deviation_of_the_models_own_in_every_head(tiny_pair):
    model, twin = tiny_pair
    prefix = make("random_vectors", model, num_slots=4000)
    assert prefix.keys.shape == (3, 2, 4000, 16) and prefix.keys.dtype == model.dtype
    assert int(prefix.next_position) == 4000
    np.testing.assert_array_equal(prefix.positions, np.arange(4000))
    layers = twin(torch.tensor([unrelated_tokens(model, SAMPLE_TOKENS)]), use_cache=True).past_key_values.layers
    for layer, cached in enumerate(layers):
        for head in range(2):
            for drawn, own in ((prefix.keys, cached.keys), (prefix.values, cached.values)):
                own, drawn = own[0, head, 1:].detach().numpy(), np.asarray(drawn[layer, head])
                assert abs(drawn.mean() - own.mean()) < 0.02 * own.std()
                assert drawn.std() == pytest.approx(own.std(), rel=0.02)
                # Normal: 68 % within one deviation.
                assert np.mean(np.abs(drawn - drawn.mean()) < drawn.std()) == pytest.approx(0.683, abs=0.01)


def test_random_vectors_differ_by_their_generator_only(tiny_model):
    one, other = (make("random_vectors", tiny_model, seed=seed) for seed in (1, 2))
    assert np.mean(np.isclose(one.keys, other.keys)) < 0.01 and np.mean(np.isclose(one.values, other.values)) < 0.01
    same_seed = make("random_vectors", tiny_model, "another text of other words", seed=1)
    np.testing.assert_array_equal(one.keys, same_seed.keys)


def test_no_random_vectors_are_refused(tiny_model):
    with pytest.raises(UserError, match="num_slots=0"):
        make("random_vectors", tiny_model, num_slots=0)


# Summaries


def summary_of(model, twin, text, budget):
    """transformers' greedy answer to the request for a summary of one text."""
    request = [{"role": "user", "content": REQUEST.format(words=budget * 3 // 4)}]
    prompt = model.chat.system_prefix(text).token_ids + model.chat.render_continuation(request).token_ids
    written = twin.generate(
        torch.tensor([prompt]), max_new_tokens=budget, do_sample=False, eos_token_id=sorted(model.chat.stop_ids)
    )
    return model.tokenizer.decode(written[0, len(prompt) :].tolist()).strip()


def frame_of(model):
    return len(model.chat.system_prefix("").token_ids)


def as_system_message(model, text, budget):
    """Cut to `budget` tokens of content."""
    rendered = model.chat.system_prefix(text)
    begin, end = rendered.spans[0]
    return rendered.token_ids[: min(end, begin + budget)] + rendered.token_ids[end:]


def test_a_summary_is_the_models_greedy_answer_as_a_system_message(tiny_pair):
    model, twin = tiny_pair
    summary = summary_of(model, twin, TEXT.strip(), 30)
    assert summary
    prefix = make("summary:30", model)
    assert_holds(prefix, twin, as_system_message(model, summary, 30))
    assert prefix.num_slots <= 30 + frame_of(model)


def test_without_an_argument_a_summary_fills_at_most_the_slots(tiny_model):
    frame = frame_of(tiny_model)
    for num_slots in (frame + 8, frame + 20):
        assert frame < make("summary", tiny_model, num_slots=num_slots).num_slots <= num_slots
    with pytest.raises(UserError, match=f"choose at least {frame + 8}"):
        make("summary", tiny_model, num_slots=frame + 7)


def test_a_corpus_beyond_the_context_is_summarised_in_parts_of_every_document(tiny_model, monkeypatch):
    texts = [" ".join(f"Shed {n} has {n} tins." for n in range(30)), "A short one about boats. " * 8]
    asked, budgets = [], []
    prefill, generate = sampling.prefill, sampling.generate_tokens

    def noting_prefill(model, token_ids, *args):
        asked.append(model.tokenizer.decode(token_ids))
        return prefill(model, token_ids, *args)

    def noting_generate(*args, max_tokens):
        budgets.append(max_tokens)
        return generate(*args, max_tokens=max_tokens)

    monkeypatch.setattr(sampling, "prefill", noting_prefill)
    monkeypatch.setattr(sampling, "generate_tokens", noting_generate)
    prefix = make("summary:80", tiny_model, *texts)
    parts = asked[:-1]
    assert len(parts) == len(budgets) > 2
    assert all(f"part {0 if 'Shed' in part else 1}\n\n" in part for part in parts)
    seen = "".join(part.split("part 0\n\n")[1].rstrip("\n") for part in parts if "Shed" in part)
    assert seen.replace(" ", "") == texts[0].replace(" ", "")
    assert sum(budgets) <= 80 and prefix.num_slots <= 80 + frame_of(tiny_model)
    with pytest.raises(UserError, match="8 tokens are too few"):
        make("summary:8", tiny_model, *texts)


def test_a_summary_larger_than_the_cartridge_is_refused_before_it_is_written(tiny_model):
    with pytest.raises(UserError, match=r"a summary of 100 tokens fills \d+ slots and the cartridge has 64"):
        check_initial_prefix("summary:100", tiny_model, corpus_of(tiny_model), 64)
    check_initial_prefix("summary:20", tiny_model, corpus_of(tiny_model), 64)


# Pretrained cartridges


def test_a_pretrained_cartridge_comes_back_bit_for_bit(tiny_model, tmp_path, rng):
    saved = random_prefix(rng, tiny_model.config, 12)
    name = save(tmp_path / "kept", tiny_model, saved)
    for prefix in (
        make(name, tiny_model),
        make_initial_prefix(name, tiny_model, corpus_of(tiny_model), 24, np.random.default_rng(0)),
    ):
        assert int(prefix.next_position) == int(saved.next_position)
        for field in ("keys", "values", "positions"):
            np.testing.assert_array_equal(getattr(prefix, field), getattr(saved, field))


def test_a_pretrained_cartridge_of_another_model_or_too_large_is_refused(tiny_model, tmp_path, rng):
    other = dataclasses.replace(tiny_model, config=dataclasses.replace(tiny_model.config, norm_eps=0.5))
    name = save(tmp_path / "others", other, random_prefix(rng, tiny_model.config, 12))
    with pytest.raises(UserError, match="this cartridge was trained for"):
        make(name, tiny_model)
    name = save(tmp_path / "large", tiny_model, random_prefix(rng, tiny_model.config, 25))
    with pytest.raises(UserError, match="large fills 25 slots and the cartridge has 24"):
        check_initial_prefix(name, tiny_model, corpus_of(tiny_model), 24)


def test_the_fingerprint_changes_with_the_pretrained_cartridge(tiny_model, tmp_path, rng):
    name = save(tmp_path / "kept", tiny_model, random_prefix(rng, tiny_model.config, 12))
    before = prefix_fingerprint(name)
    save(tmp_path / "kept", tiny_model, random_prefix(rng, tiny_model.config, 12))
    assert before != prefix_fingerprint(name) != ""
    assert prefix_fingerprint("first_tokens") == prefix_fingerprint("summary:20") == ""


# Initial prefixes


def test_an_initial_prefix_with_nothing_left_to_train_is_refused(tiny_model, registered):
    @register("short", title="Two tokens")
    def make_short(model, corpus, num_slots, rng, *, room=0):
        return sampling.prefill(model, [5, 6])

    arguments = ("short", tiny_model, corpus_of(tiny_model), 24, np.random.default_rng(0))
    assert make_initial_prefix(*arguments, num_frozen=1).num_slots == 2
    with pytest.raises(UserError, match="gives 2 slots, of which 2 are frozen"):
        make_initial_prefix(*arguments, num_frozen=2)
