"""Model files that are untidier than what transformers writes, and those that are refused in one line that helps."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_models import PUBLISHED, write
from safetensors.numpy import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from trained_tokenizers import sentence_piece_model  # noqa: F401

import cartridges_jax as cj
from cartridges_jax.errors import UserError
from cartridges_jax.models.families import read_gguf_metadata, read_hugging_face_config
from cartridges_jax.text.chat import ChatTemplate
from cartridges_jax.text.tokenizer import tokenizer_from_directory

UNTIED = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("untied") / "model"
    write(UNTIED, directory)
    return directory


@pytest.fixture
def directory(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        cj.load_model(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_lora_adapter_is_named_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "r": 8}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    message = refusal(tmp_path)
    assert "LoRA adapter for org/base" in message and "merge" in message
    # With the base's config beside it, as some trainers leave it, it is one all the same.
    (tmp_path / "config.json").write_text("{}")
    assert "LoRA adapter for org/base" in refusal(tmp_path)


def test_an_untied_model_without_a_head_names_the_field(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if name != "lm_head.weight"}, directory / "model.safetensors"
    )
    assert "tie_word_embeddings=false" in refusal(directory)
    edit(directory / "config.json", tie_word_embeddings=True)
    assert cj.load_model(str(directory)).config.tie_embeddings


@pytest.mark.parametrize("bad", [10**6, 0xFFFFFFFF, -1, "2", True, 1.5])
def test_an_end_outside_the_vocabulary_is_named_with_its_file(directory, bad):
    edit(directory / "generation_config.json", eos_token_id=[0, bad])
    message = refusal(directory)
    assert "generation_config.json: eos_token_id" in message and repr(bad) in message


def test_without_a_generation_config_the_ends_are_those_of_the_config(directory):
    (directory / "generation_config.json").unlink()
    ids = cj.load_model(str(directory)).tokenizer.control_tokens
    edit(directory / "config.json", eos_token_id=[ids["<|endoftext|>"], ids["<|im_start|>"]])
    stops = cj.load_model(str(directory)).chat.stop_ids
    assert stops == {ids["<|endoftext|>"], ids["<|im_start|>"], ids["<|im_end|>"]}


def test_heads_that_do_not_divide_are_one_line(directory):
    edit(directory / "config.json", num_key_value_heads=3)
    assert "14 attention heads for 3 key/value heads" in refusal(directory)


def test_tokens_beside_a_sentencepiece_model_are_read(sentence_piece_model, tmp_path):
    """A ChatML fine-tune of Llama 2, in the files of older versions: `<|im_start|>` is one token."""
    size = len(ModelProto.FromString(sentence_piece_model).pieces)
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece_model)
    added = {"<|user|>": size, "<|reply|>": size + 1, "ChatMark": size + 2, "<image>": size + 3}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps(
            {"bos_token": "<s>", "eos_token": {"content": "<|reply|>"}, "additional_special_tokens": ["ChatMark"]}
        )
    )
    tokenizer = tokenizer_from_directory(tmp_path, num_rows=size + 3)
    assert tokenizer.vocab_size == size + 3 and tokenizer.eos_id == size + 1
    assert tokenizer.encode("<|user|>", control=True) == [size]
    assert size + 2 in tokenizer.encode("a ChatMark", control=True)
    assert not {size, size + 1, size + 2} & set(tokenizer.encode("<|user|> <|reply|> ChatMark <image>"))
    template = "{% for m in messages %}{{ '<|user|>' + m.content + '<|reply|>' }}{% endfor %}"
    ids = ChatTemplate(template, tokenizer).render([{"role": "user", "content": "hi"}]).token_ids
    assert ids[0] == size and ids[-1] == size + 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": "7"}))
    with pytest.raises(UserError, match="added_tokens.json gives '<x>' the id '7'"):
        tokenizer_from_directory(tmp_path)


def tiny_gguf(path, **changes):
    """The file of a tiny Llama with changes to its tokenizer's metadata; None leaves a key out."""
    config = tiny.tiny_config()
    metadata = {k: v for k, v in {**tiny.tokenizer_metadata(), **changes}.items() if v is not None}
    return tiny.write_gguf(path, config, tiny.gguf_tensors(tiny.random_weights(config, 0), config), metadata)


@pytest.mark.parametrize("token_id", [0xFFFFFFFF, 10**6])
def test_a_gguf_that_numbers_a_token_outside_its_vocabulary_is_one_line(tmp_path, token_id):
    message = refusal(tiny_gguf(tmp_path / "model.gguf", eos_token_id=token_id))
    assert f"tokenizer.ggml.eos_token_id is {token_id}, outside the vocabulary" in message


def test_a_gguf_without_its_splitter_says_that_it_is_missing(tmp_path):
    assert "'tokenizer.ggml.pre' is missing" in refusal(tiny_gguf(tmp_path / "model.gguf", tokenizer_pre=None))


def test_every_end_that_a_gguf_numbers_ends_an_answer(tmp_path):
    model = cj.load_model(str(tiny_gguf(tmp_path / "model.gguf", eot_token_id=0)))
    assert 0 in model.chat.stop_ids and model.tokenizer.eos_id in model.chat.stop_ids


@pytest.mark.parametrize("kind", [31, 4, 99])
def test_a_quantisation_that_gguf_cannot_read_is_named_as_such(tmp_path, kind):
    path = tiny_gguf(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    name = b"output_norm.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    (num_axes,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at + 4 + 8 * num_axes, kind)
    path.write_bytes(data)
    message = refusal(path)
    assert f"unsupported quantisation (type {kind})" in message and "fetch it again" not in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
SMALL = st.sampled_from(
    [0, 1, 2, 3, -1, 0.5, 1.0, 1e30, "yarn", "dynamic", "linear", "longrope", "llama3", [], {}, True, None]
)
SCALING = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["yarn", "dynamic", "linear", "longrope", "llama3", "default"])},
    optional={name: SMALL for name in (
        "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "short_factor", "truncate",
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
    )},
)  # fmt: skip
PHI3 = {**PUBLISHED["mistralai/Mistral-7B-Instruct-v0.3"].config, "architectures": ["Phi3ForCausalLM"]}
OLMO2 = {**PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"].config, "architectures": ["Olmo2ForCausalLM"]}
CONFIGS = [*(model.config for model in PUBLISHED.values()), PHI3, OLMO2]
EXTRA = [
    "layer_types",
    "sliding_window",
    "rope_parameters",
    "partial_rotary_factor",
    "head_dim",
    "no_rope_layers",
    "text_config",
]


@settings(max_examples=1000, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_edit_of_a_config_is_read_or_refused_in_one_line(data):
    values = dict(data.draw(st.sampled_from(CONFIGS)))
    for name in data.draw(st.lists(st.sampled_from([*values, *EXTRA]), min_size=1, max_size=3)):
        values[name] = data.draw(SCALING if name.startswith("rope_") and name != "rope_theta" else SMALL | JSON)
    try:
        read_hugging_face_config(values)
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_edit_of_gguf_metadata_is_read_or_refused_in_one_line(data):
    values = {
        "general.architecture": "llama", "llama.attention.head_count": 32, "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.block_count": 40, "llama.context_length": 4096,
        "llama.embedding_length": 2048, "llama.feed_forward_length": 8192, "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 5e5, "llama.vocab_size": 49155, "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 1024, "llama.rope.scale_linear": 1.0,
    }  # fmt: skip
    for name in data.draw(st.lists(st.sampled_from(list(values)), min_size=1, max_size=3)):
        values[name] = data.draw(SMALL | JSON)
    try:
        read_gguf_metadata(values, tie_embeddings=True)
    except UserError as error:
        assert "\n" not in str(error)
