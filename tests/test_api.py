"""The public calls, as the README uses them. The model is a tiny one."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from tiny import CHAT_TEMPLATE, random_prefix, random_tokens, run, write_tiny_gguf

import cartridges_jax as cj
from cartridges_jax import sampling
from cartridges_jax.cartridge import KVPrefix
from cartridges_jax.checkpoint import CartridgeMetadata, DocumentSource, save_cartridge
from cartridges_jax.errors import UserError


def saved(model, prefix, directory):
    metadata = CartridgeMetadata.of(
        prefix,
        model=model,
        learning_mask=np.arange(prefix.num_slots) >= 1,
        documents=[DocumentSource("text", "0" * 64, 99)],
        step=1,
        config={},
    )
    save_cartridge(directory, prefix, metadata)
    return cj.load_cartridge(directory)


@pytest.fixture
def cartridge(tiny_model, rng, tmp_path):
    return saved(tiny_model, random_prefix(rng, tiny_model.config, 6), tmp_path / "cartridge")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The same shapes, another rotary base: a model that the cartridge was not trained for."""
    return cj.load_model(str(write_tiny_gguf(tmp_path_factory.mktemp("other") / "other.gguf", rope_base=5000.0)))


def test_every_public_name_can_be_imported_and_no_other():
    assert cj.__all__ == sorted(cj.__all__)
    assert all(callable(getattr(cj, name)) for name in cj.__all__)
    with pytest.raises(AttributeError, match="no_such_call"):
        _ = cj.no_such_call


def test_importing_the_package_does_not_start_jax():
    program = "import sys, cartridges_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_model_loads_from_a_file_and_from_its_directory(tiny_gguf, tiny_model):
    assert cj.load_model(str(tiny_gguf.parent)).fingerprint == cj.load_model(str(tiny_gguf)).fingerprint
    assert tiny_model.config.num_layers == 3
    with pytest.raises(UserError, match="float16"):
        cj.load_model(str(tiny_gguf), dtype="float16")


def test_a_text_is_answered_as_the_conversation_of_one_turn(tiny_model, cartridge):
    for prefix in (None, cartridge):
        one = cj.generate(tiny_model, ["Who keeps the key?"], prefix=prefix, max_tokens=9)
        turns = [[{"role": "user", "content": "Who keeps the key?"}]]
        assert one == cj.generate(tiny_model, turns, prefix=prefix, max_tokens=9)
        assert len(one) == 1 and isinstance(one[0], str)


def test_earlier_turns_count(tiny_model, cartridge):
    last = {"role": "user", "content": "And then?"}
    before = [{"role": "user", "content": "Begin."}, {"role": "assistant", "content": "Once upon a time"}]
    short, long = cj.generate(tiny_model, [[last], [*before, last]], prefix=cartridge, max_tokens=12)
    assert short != long


@pytest.mark.parametrize("front", ["cartridge", "prefix"])
def test_behind_a_prefix_the_turns_follow_without_a_system_message(tiny_model, cartridge, front):
    prefix = cartridge if front == "cartridge" else cartridge.prefix
    (found,) = cj.generate(tiny_model, ["What is it?"], prefix=prefix, max_tokens=10)
    turn = tiny_model.chat.render_continuation([{"role": "user", "content": "What is it?"}])
    (expected,) = sampling.generate_tokens(tiny_model, [turn.token_ids], cartridge.prefix, max_tokens=10)
    assert found == tiny_model.tokenizer.decode(expected.token_ids).strip()


def test_without_a_prefix_the_templates_default_stands_in_front(tiny_model):
    (found,) = cj.generate(tiny_model, ["What is it?"], max_tokens=10)
    whole = tiny_model.chat.render([{"role": "user", "content": "What is it?"}], add_generation_prompt=True)
    assert whole.token_ids[: len(tiny_model.chat.default_head())] == tiny_model.chat.default_head()
    (expected,) = sampling.generate_tokens(tiny_model, [whole.token_ids], max_tokens=10)
    assert found == tiny_model.tokenizer.decode(expected.token_ids).strip()


def test_the_seed_decides_what_is_drawn(tiny_model):
    draws = [cj.generate(tiny_model, ["Go on"] * 4, temperature=1.0, max_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 1
    greedy = cj.generate(tiny_model, ["Go on"], max_tokens=12)
    assert cj.generate(tiny_model, ["Go on"], temperature=1.0, top_k=1, max_tokens=12, seed=3) == greedy


def test_logits_are_those_of_a_plain_forward_pass(tiny_model, cartridge, rng):
    tokens = random_tokens(rng, tiny_model.config, 17)
    for prefix in (None, cartridge, cartridge.prefix):
        found = cj.logits(tiny_model, tokens.tolist(), prefix=prefix)
        assert found.shape == (17, tiny_model.config.vocab_size) and found.dtype == np.float32
        front = getattr(prefix, "prefix", prefix)
        expected, _, _ = run(tiny_model, tokens[None], prefix=front)
        np.testing.assert_allclose(found, expected[0], atol=2e-4)
        np.testing.assert_array_equal(found, sampling.logits(tiny_model, tokens.tolist(), front))


def test_a_prefilled_text_stands_for_its_tokens(tiny_model, cartridge, rng):
    first, second = (
        random_tokens(rng, tiny_model.config, 13).tolist(),
        random_tokens(rng, tiny_model.config, 9).tolist(),
    )
    whole = cj.logits(tiny_model, first + second)
    prefix = cj.prefill(tiny_model, first)
    assert isinstance(prefix, KVPrefix) and prefix.num_slots == 13
    np.testing.assert_allclose(cj.logits(tiny_model, second, prefix=prefix), whole[13:], atol=5e-4)
    behind = cj.prefill(tiny_model, first, prefix=cartridge)
    assert behind.num_slots == 6 + 13
    expected = cj.logits(tiny_model, first + second, prefix=cartridge)[13:]
    np.testing.assert_allclose(cj.logits(tiny_model, second, prefix=behind), expected, atol=5e-4)


def test_two_cartridges_become_one_prefix_in_order(tiny_model, cartridge, rng, tmp_path):
    other = saved(tiny_model, random_prefix(rng, tiny_model.config, 4), tmp_path / "other")
    for parts in ((cartridge, other), (cartridge.prefix, other), (cartridge, other.prefix)):
        both = cj.compose(*parts)
        assert isinstance(both, KVPrefix) and both.num_slots == 10 and both.next_position == 10
        np.testing.assert_array_equal(both.keys[:, :, :6], cartridge.prefix.keys)
        np.testing.assert_array_equal(both.keys[:, :, 6:], other.prefix.keys)
    assert cj.generate(tiny_model, ["Hello"], prefix=both, max_tokens=4)


def test_a_cartridge_of_another_model_is_refused_in_words(tiny_model, other_model, cartridge, rng, tmp_path):
    for call in (
        lambda: cj.generate(other_model, ["Hello"], prefix=cartridge, max_tokens=2),
        lambda: cj.logits(other_model, [1, 2], prefix=cartridge),
        lambda: cj.prefill(other_model, [1, 2], prefix=cartridge),
    ):
        with pytest.raises(UserError, match="this cartridge was trained for .*tiny.gguf"):
            call()
    foreign = saved(other_model, random_prefix(rng, other_model.config, 4), tmp_path / "foreign")
    with pytest.raises(UserError, match="different models cannot be composed"):
        cj.compose(cartridge, foreign)


def test_a_cartridge_of_other_weights_is_refused_unless_asked_for(tiny_model, cartridge, rng, tmp_path):
    from tiny import gguf_tensors, random_weights, tiny_config, write_gguf

    config = tiny_config()
    file = write_gguf(tmp_path / "other.gguf", config, gguf_tensors(random_weights(config, seed=5), config))
    other = cj.load_model(str(file))
    assert other.fingerprint == tiny_model.fingerprint
    foreign = saved(other, random_prefix(rng, other.config, 4), tmp_path / "foreign")
    for call in (
        lambda **allowed: cj.generate(other, ["Hello"], prefix=cartridge, max_tokens=2, **allowed),
        lambda **allowed: cj.logits(other, [1, 2], prefix=cartridge, **allowed),
        lambda **allowed: cj.prefill(other, [1, 2], prefix=cartridge, **allowed),
        lambda **allowed: cj.compose(cartridge, foreign, **allowed),
    ):
        with pytest.raises(UserError, match="weights.*allow_other_weights=True"):
            call()
        call(allow_other_weights=True)


def test_a_model_states_the_hashes_of_its_tokenizer_and_template(tiny_model, other_model):
    assert tiny_model.tokenizer_sha256 == other_model.tokenizer_sha256 == tiny_model.tokenizer.fingerprint
    assert tiny_model.chat_template_sha256 == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()


def test_what_the_context_does_not_hold_is_refused_in_words(tiny_model, cartridge):
    with pytest.raises(UserError, match="context of 512"):
        cj.generate(tiny_model, ["word " * 400], prefix=cartridge)
    with pytest.raises(UserError, match="no tokens"):
        cj.logits(tiny_model, [])


def test_no_prompts_give_no_answers(tiny_model):
    assert cj.generate(tiny_model, []) == []
