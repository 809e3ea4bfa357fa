"""config.json files as their publishers wrote them, and those that must be refused by name."""

from __future__ import annotations

import pytest

from cartridges_jax.errors import UserError
from cartridges_jax.models.config import LayerKind, shortest_period
from cartridges_jax.models.families import read_gguf_metadata, read_hugging_face_config
from cartridges_jax.rope import Rope

_USUAL = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "initializer_range": 0.02, "use_cache": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "model_type": "any",
}  # fmt: skip
LLAMA31_8B = {
    **_USUAL, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
SMOLLM2 = {
    **_USUAL, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
    "is_llama_config": True, "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-5, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}  # fmt: skip
MISTRAL_03 = {
    **_USUAL, "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 32768,
}  # fmt: skip
QWEN3_4B = {
    **_USUAL, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25_05B = {
    **_USUAL, "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GEMMA2_2B = {
    **_USUAL, "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA3_1B = {
    **_USUAL, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
    "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
GEMMA3_27B = {
    **_USUAL, "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "image_token_index": 262144, "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152},
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "sliding_window_pattern": 6,
    },
}  # fmt: skip
SMOLLM3 = {
    **_USUAL, "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip

GRANITE31_2B = {
    **_USUAL, "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 5000000.0,
    "tie_word_embeddings": True, "vocab_size": 49155,
}  # fmt: skip
GRANITE31_2B_GGUF = {
    "general.architecture": "granite", "granite.attention.head_count": 32, "granite.attention.head_count_kv": 8,
    "granite.attention.layer_norm_rms_epsilon": 1e-5, "granite.attention.scale": 0.015625,
    "granite.block_count": 40, "granite.context_length": 131072, "granite.embedding_length": 2048,
    "granite.embedding_scale": 12.0, "granite.feed_forward_length": 8192, "granite.logit_scale": 8.0,
    "granite.residual_scale": 0.22, "granite.rope.dimension_count": 64, "granite.rope.freq_base": 5000000.0,
    "granite.vocab_size": 49155,
}  # fmt: skip


# As the first release computed it.
FINGERPRINT_OF_SMOLLM2 = "2441a01b8b1be3a5c14fd22f84a31dae9e95404124f5c6011ff71dd2d6d8b09f"


def read(values):
    return read_hugging_face_config(values)[1]


def test_llama_31_stretches_slow_pairs_by_eight():
    config = read(LLAMA31_8B)
    (kind,) = config.period
    assert (config.num_layers, config.head_dim, config.num_kv_heads, config.tie_embeddings) == (32, 128, 8, False)
    assert kind.rope.base == 500_000 and len(kind.rope.factors) == 64
    assert kind.rope.factors[0] == 1 and kind.rope.factors[-1] == pytest.approx(8)


def test_published_files_are_read_as_their_models_are():
    assert read(SMOLLM2).head_dim == 64 and read(SMOLLM2).tie_embeddings
    assert read(MISTRAL_03).period == (LayerKind(Rope(1e6)),)
    assert read(QWEN3_4B).qk_norm and not read(QWEN3_4B).qkv_bias and read(QWEN3_4B).head_dim == 128
    assert read(QWEN25_05B).qkv_bias and not read(QWEN25_05B).o_bias
    # Set, and without effect: the model does not slide.
    assert read(QWEN25_05B).period == (LayerKind(Rope(1e6)),)
    assert read(SMOLLM3).period == (LayerKind(Rope(5e6)),) * 3 + (LayerKind(None),)


def test_gemmas_alternate():
    gemma2 = read(GEMMA2_2B)
    assert gemma2.period == (LayerKind(Rope(1e4), 4096), LayerKind(Rope(1e4)))
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.attention_scale) == (50, 30, 1 / 16)
    assert gemma2.post_norms and gemma2.embedding_scale == 48 and gemma2.activation == "gelu_tanh"
    gemma3 = read(GEMMA3_1B)
    assert gemma3.period == (LayerKind(Rope(1e4), 512),) * 5 + (LayerKind(Rope(1e6)),)
    assert gemma3.qk_norm and gemma3.attention_softcap == gemma3.logit_softcap == 0


def test_a_gemma_3_with_a_vision_part_is_read_without_it():
    config = read(GEMMA3_27B)
    assert config.period[0] == LayerKind(Rope(1e4), 1024)
    assert config.period[5] == LayerKind(Rope(1e6, (8.0,) * 64))
    assert config.attention_scale == pytest.approx(168**-0.5)
    # What its file leaves to the library's defaults.
    assert (config.vocab_size, config.context_length) == (262_208, 131_072)


def test_granite_divides_its_logits_in_either_format():
    config = read(GRANITE31_2B)
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (12, 0.22, 1 / 8)
    assert config.attention_scale == 1 / config.head_dim  # not its root
    assert config.period == (LayerKind(Rope(5e6)),) and config.tie_embeddings and not config.qkv_bias
    assert read_gguf_metadata(GRANITE31_2B_GGUF, tie_embeddings=True)[1] == config


def test_a_granite_gguf_that_leaves_positions_out_is_refused():
    assert read_gguf_metadata({**GRANITE31_2B_GGUF, "granite.rope.scaling.finetuned": True}, tie_embeddings=True)
    with pytest.raises(UserError, match="rope.scaling.finetuned=False"):
        read_gguf_metadata({**GRANITE31_2B_GGUF, "granite.rope.scaling.finetuned": False}, tie_embeddings=True)


def test_the_first_mistrals_window_holds_where_the_field_is_absent():
    values = {name: value for name, value in MISTRAL_03.items() if name != "sliding_window"}
    assert read(values).period[0].window == 4096


def test_the_shortest_period_may_be_cut_at_the_end():
    a, b = LayerKind(Rope(1.0)), LayerKind(Rope(2.0))
    assert shortest_period([a, a, a]) == (a,)
    assert shortest_period([a, b, a, b, a]) == (a, b)
    assert shortest_period([a, b, b]) == (a, b, b)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*mixture of experts"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM.*mixture of experts"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "Qwen3NextForCausalLM.*linear-attention"),
        ({"architectures": ["GraniteMoeForCausalLM"]}, "GraniteMoeForCausalLM.*mixture of experts"),
        ({"architectures": ["Gemma3nForConditionalGeneration"]}, "Gemma3n.*share keys and values"),
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM.*use one of LlamaForCausalLM"),
        ({"architectures": None}, "architecture None"),
        (LLAMA31_8B | {"rope_scaling": {"rope_type": "proportional"}}, "rope scaling 'proportional'"),
        (LLAMA31_8B | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}}, "alpha=1000.0"),
        (LLAMA31_8B | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale_x": 2}}, "mscale_x=2"),
        (LLAMA31_8B | {"rope_scaling": {**LLAMA31_8B["rope_scaling"], "beta_fast": 32}}, "beta_fast"),
        (
            LLAMA31_8B | {"partial_rotary_factor": 0.01},
            "partial_rotary_factor=0.01, which makes no even part of heads of width 128",
        ),
        (MISTRAL_03 | {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA31_8B | {"hidden_act": "relu"}, "hidden_act='relu'"),
        (LLAMA31_8B | {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        (LLAMA31_8B | {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (LLAMA31_8B | {"num_key_value_heads": [8] * 32}, "num_key_value_heads.*a number for every layer"),
        (LLAMA31_8B | {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({k: v for k, v in LLAMA31_8B.items() if k != "vocab_size"}, "lacks the field vocab_size"),
        (QWEN3_4B | {"layer_types": ["linear_attention"] * 36}, "linear_attention"),
        (QWEN3_4B | {"layer_types": ["full_attention"] * 3}, "3 layer_types for 36 layers"),
        (GEMMA3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, "2 no_rope_layers for 36 layers"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(values, complaint):
    with pytest.raises(UserError, match=complaint):
        read(values)


# Of the list and of published files; none changes the forward pass.
CHANGES_NOTHING = {
    "use_mrope": False, "tokenizer_class": "PreTrainedTokenizerFast", "max_sequence_length": 2048, "_commit_hash": "ab12",
    "do_sample": True, "temperature": 0.6, "max_length": 4096, "top_k": 50, "num_beams": 1, "use_bfloat16": True,
    "tie_encoder_decoder": False, "torchscript": False, "keys_to_ignore_at_inference": ["past_key_values"],
    "model_max_length": 4096, "use_return_dict": True, "gradient_checkpointing": True, "finetuning_task": "chat",
    "is_composition": False, "residual_multiplier": None, "embd_pdrop": 0.1, "resid_pdrop": 0.0, "hidden_dropout": 0.1,
    "bad_words_ids": [[5]], "sep_token_id": 7, "decoder_start_token_id": 1, "pruned_heads": {}, "task_specific_params": {},
    "quantization_config": None, "logits_scale": 1.0, "embedding_scale": 1, "num_experts": 0, "use_moe": False,
    "is_causal": True, "tokenizer_version": 3, "output_router_logits": False, "router_aux_loss_coef": 0.001,
    "num_nextn_predict_layers": 0, "unsloth_version": "2024.9", "num_labels": 2, "_attn_implementation": "sdpa",
    "rope_interleaved_dims": [], "initializer_cutoff_factor": 2.0, "transformers_weights": "model.safetensors",
}  # fmt: skip
# Neighbours of those that do, or may.
CHANGES_SOMETHING = {
    "use_mrope": True, "logits_scale": 0.5, "num_experts": 4, "is_causal": False, "pruned_heads": {"0": [1]},
    "use_qk_norm": True, "clip_qkv": 8.0, "embedding_scale": 2, "residual_multiplier": 0, "some_new_field": "on",
    "use_rope": False, "mup_width_multiplier": 1.5,
}  # fmt: skip
FAMILY_FILES = {
    "llama": LLAMA31_8B, "mistral": MISTRAL_03, "qwen2": QWEN25_05B, "qwen3": QWEN3_4B, "gemma2": GEMMA2_2B,
    "gemma3": GEMMA3_1B, "smollm3": SMOLLM3, "granite": GRANITE31_2B,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_FILES)
def test_fields_that_change_nothing_are_no_reason_to_refuse(family):
    values = FAMILY_FILES[family]
    added = {name: value for name, value in CHANGES_NOTHING.items() if name not in values}
    assert read({**values, **added}) == read(values)


@pytest.mark.parametrize("name", CHANGES_SOMETHING)
def test_a_field_that_changes_the_computation_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"config.json sets {name}="):
        read(LLAMA31_8B | {name: CHANGES_SOMETHING[name]})


def test_yarn_stretches_the_context_and_dynamic_does_not():
    """Qwen2.5's files say how to turn YaRN on; transformers leaves `dynamic` unscaled up to the stated context."""
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    config = read(QWEN25_05B | {"rope_scaling": yarn})
    assert config.context_length == 131_072
    assert config.period[0].rope.scale == pytest.approx(1.1386294) and config.period[0].rope.factors[-1] == 4
    plain = read(QWEN25_05B)
    assert read(QWEN25_05B | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}) == plain


def test_longrope_has_the_context_of_its_short_factors():
    longrope = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    values = {
        **MISTRAL_03, "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_scaling": longrope, "sliding_window": 262144,
    }  # fmt: skip
    config = read(values)
    assert config.context_length == 4096
    assert config.period[0].rope.scale == pytest.approx((1 + 5 / 12) ** 0.5)
    with pytest.raises(UserError, match="short_factor=.*48 positive numbers"):
        read({**values, "rope_scaling": {**longrope, "short_factor": [1.0] * 47}})


PHI4_MINI = {
    **_USUAL, "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0, "full_attn_mod": 1,
    "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144,
    "rope_scaling": {"long_factor": [4.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip
OLMO2_7B = {
    **_USUAL, "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
    "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip


def test_phi_4_mini_rotates_three_quarters_of_a_head():
    config = read(PHI4_MINI)
    (kind,) = config.period
    assert (kind.rope.width, len(kind.rope.factors), config.head_dim, kind.window) == (96, 48, 128, 262_144)
    assert config.tie_embeddings and config.context_length == 4096


def test_olmo_2_normalises_outputs_and_whole_queries():
    config = read(OLMO2_7B)
    assert config.qk_norm and config.qk_norm_joint and config.post_norms and not config.pre_norms
    assert config.period == (LayerKind(Rope(5e5)),) and not config.qkv_bias


LLAMA_GGUF = {
    name.replace("granite", "llama"): value for name, value in GRANITE31_2B_GGUF.items() if "scale" not in name
} | {"general.architecture": "llama"}  # fmt: skip


def test_old_gguf_keys_at_their_neutral_values_change_nothing():
    old = {
        "llama.tensor_data_layout": "Meta AI original pth", "llama.rope.scale_linear": 1.0, "llama.pooling_type": 0,
        "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "llama.expert_count": 0,
        "llama.attention.causal": True,
    }  # fmt: skip
    plain = read_gguf_metadata(LLAMA_GGUF, tie_embeddings=True)[1]
    assert read_gguf_metadata({**LLAMA_GGUF, **old}, tie_embeddings=True)[1] == plain
    for name, value in {"pooling_type": 1, "attention.causal": False, "expert_count": 8}.items():
        with pytest.raises(UserError, match=name):
            read_gguf_metadata({**LLAMA_GGUF, f"llama.{name}": value}, tie_embeddings=True)


def test_a_gguf_factor_without_a_kind_is_linear():
    """As in llama.cpp, also under the key's first name."""
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        config = read_gguf_metadata({**LLAMA_GGUF, f"llama.{key}": 4.0}, tie_embeddings=True)[1]
        assert config.period[0].rope.factors == (4.0,) * 32


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_key_value_heads": 5}, "32 attention heads for 5 key/value heads"),
        ({"num_attention_heads": 31}, "hidden_size=4096, which num_attention_heads=31 does not divide"),
        ({"num_attention_heads": 31, "head_dim": 128}, "31 attention heads for 8 key/value heads"),
        ({"head_dim": 127}, "heads of width 127"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"hidden_size": 4096.5}, "hidden_size=4096.5.*whole number"),
        ({"vocab_size": float("inf")}, "vocab_size=inf"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\], which is no JSON object"),
        ({"rope_theta": 1}, "rope_theta=1.0, which must be above 1"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"architectures": "Falcon"}, "architecture 'Falcon'"),
        ({"rope_scaling": {**LLAMA31_8B["rope_scaling"], "high_freq_factor": 1.0}}, "low_freq_factor=1.0"),
    ],
)
def test_damaged_values_are_one_line(change, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        read(LLAMA31_8B | change)
    assert "\n" not in str(error.value)


def test_fields_added_later_leave_the_fingerprints_of_older_models_alone():
    """Cartridges of the first release carry this one."""
    assert read(SMOLLM2).fingerprint() == FINGERPRINT_OF_SMOLLM2
