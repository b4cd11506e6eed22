"""config.json: both spellings of transformers, and an error for everything that is not implemented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.weights.hf_config import ModelShape

CONFIGS = Path(__file__).parents[3] / "configs" / "models"


def config(model: str, **changes: Any) -> dict[str, Any]:
    """A shipped config with fields changed, or removed where the value is `...`."""
    fields = json.loads((CONFIGS / f"{model}.json").read_text()) | changes
    return {name: value for name, value in fields.items() if value is not ...}


def test_fields_of_a_dense_model() -> None:
    shape = ModelShape.from_hf(CONFIGS / "qwen2.5-7b.json")
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == ("qwen2", 28, 3584, 18944)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.vocab_size) == (28, 4, 128, 152064)
    assert (shape.rms_eps, shape.rope_theta, shape.rope_scaling) == (1e-6, 1e6, None)
    assert (shape.qkv_bias, shape.qk_norm, shape.tie_embeddings) == (True, False, False)
    assert shape.max_position_embeddings == 131072
    assert shape.num_experts == 0
    assert not shape.is_moe_layer(0)


def test_fields_of_a_moe_model() -> None:
    shape = ModelShape.from_hf(config("qwen3-30b-a3b", mlp_only_layers=[3], decoder_sparse_step=2))
    assert (shape.num_experts, shape.num_experts_per_token, shape.moe_ffn_hidden_size) == (128, 8, 768)
    assert (shape.norm_topk_prob, shape.router_aux_loss_coef) == (True, 0.001)
    # Qwen3MoeDecoderLayer: experts in layers 1, 3, 5, ... but not in layer 3.
    assert [shape.is_moe_layer(i) for i in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-8b", "mistral-7b-v0.3", "qwen3-30b-a3b"])
def test_transformers_5_spelling_reads_the_same(model: str) -> None:
    old = config(model)
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    scaling = old.get("rope_scaling") or {"rope_type": "default"}
    new |= {"rope_parameters": {"rope_theta": old["rope_theta"], **scaling}, "dtype": "bfloat16"}
    if "num_experts" in new:
        new["num_local_experts"] = new.pop("num_experts")
    assert ModelShape.from_hf(new) == ModelShape.from_hf(old)


def test_fields_that_state_what_always_holds() -> None:
    extra = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert ModelShape.from_hf(config("qwen3-30b-a3b", **extra)) == ModelShape.from_hf(config("qwen3-30b-a3b"))


def test_old_llama_files_without_later_fields() -> None:
    fields = config("llama-3.1-8b", rope_theta=..., rope_scaling=..., num_key_value_heads=..., tie_word_embeddings=...)
    shape = ModelShape.from_hf(fields)
    assert (shape.rope_theta, shape.rope_scaling, shape.num_kv_heads, shape.tie_embeddings) == (1e4, None, 32, False)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("qwen3-8b", {"model_type": "gemma3"}, "model_type must be one of qwen2, qwen3, .* got 'gemma3'"),
        ("qwen3-8b", {"model_type": ...}, "model_type must be one of .* got None"),
        ("qwen3-8b", {"model_type": "llama"}, "architectures must be .*LlamaForCausalLM.* got .*Qwen3ForCausalLM"),
        ("qwen3-8b", {"architectures": ["Qwen3ForSequenceClassification"]}, "architectures must be"),
        ("qwen3-8b", {"use_sliding_window": True}, "use_sliding_window must be False"),
        ("qwen3-8b", {"attention_bias": True}, "attention_bias must be False"),
        ("qwen3-8b", {"hidden_act": "gelu"}, "hidden_act must be 'silu'.* got 'gelu'"),
        ("qwen3-8b", {"attention_dropout": 0.1}, "attention_dropout must be 0"),
        ("qwen3-8b", {"head_dim": ...}, "head_dim must be given for model_type 'qwen3'"),
        ("qwen3-8b", {"rope_theta": ...}, "rope_theta must be given"),
        ("qwen3-8b", {"hidden_size": ...}, "hidden_size must be given"),
        ("qwen3-8b", {"hidden_size": "4096"}, "hidden_size must be a positive integer, got '4096'"),
        ("qwen3-8b", {"hidden_size": 4096.0}, "hidden_size must be a positive integer, got 4096.0"),
        ("qwen3-8b", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ("qwen3-8b", {"num_key_value_heads": 5}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ("qwen3-8b", {"head_dim": 127}, "head_dim must be even"),
        ("qwen3-8b", {"rms_norm_eps": -1e-6}, "rms_norm_eps must be a positive number, got -1e-06"),
        ("qwen3-8b", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ("qwen3-8b", {"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
        ("qwen3-8b", {"attn_logit_softcapping": 30.0}, "field 'attn_logit_softcapping' is not known for model_type"),
        ("qwen3-8b", {"auto_map": {}}, "field 'auto_map' is not known"),
        ("qwen3-8b", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must all be"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be .* got 'yarn'"),
        ("qwen3-8b", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type must be .* got 'linear'"),
        ("qwen3-8b", {"rope_scaling": {"factor": 2.0}}, "rope_type must be .* got 'missing'"),
        ("qwen3-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of type llama3 must have factor, low"),
        ("qwen3-8b", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta .*1000000.* must agree"),
        ("qwen3-8b", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
        ("llama-3.1-8b", {"mlp_bias": True}, "mlp_bias must be False"),
        ("llama-3.1-8b", {"attention_bias": True}, "attention_bias must be False"),
        ("llama-3.1-8b", {"rope_interleaved": True}, "rope_interleaved must be False"),
        ("llama-3.1-8b", {"num_attention_heads": 24, "num_key_value_heads": 8}, "hidden_size must be a multiple of"),
        ("llama-3.1-8b", {"num_experts": 8}, "field 'num_experts' is not known"),
        ("mistral-7b-v0.3", {"sliding_window": 4096}, "sliding_window must be None"),
        ("mistral-7b-v0.3", {"sliding_window": ...}, "sliding_window must be None .* got 4096"),
        ("qwen2.5-7b", {"use_mrope": True}, "use_mrope must be False"),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, r"num_experts_per_tok must be at most num_experts \(128\)"),
        ("qwen3-30b-a3b", {"num_experts": ...}, "num_experts must be given"),
        ("qwen3-30b-a3b", {"num_local_experts": 64}, "num_local_experts .* must agree"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [48]}, "mlp_only_layers must be a list of layers below 48"),
        ("qwen3-30b-a3b", {"norm_topk_prob": ...}, "norm_topk_prob must be given"),
        ("qwen3-30b-a3b", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size must be 0 or None"),
        ("qwen3-30b-a3b", {"router_aux_loss_coef": -1}, "router_aux_loss_coef must be a number >= 0"),
    ],
)
def test_what_is_not_implemented_is_named(model: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape.from_hf(config(model, **changes))


def test_llama_3_scaling_must_make_sense() -> None:
    scaling = config("llama-3.1-8b")["rope_scaling"]
    with pytest.raises(ValueError, match="high_freq_factor > low_freq_factor"):
        ModelShape.from_hf(config("llama-3.1-8b", rope_scaling=scaling | {"high_freq_factor": 1.0}))
    with pytest.raises(ValueError, match="original_max_position_embeddings must be a positive integer"):
        ModelShape.from_hf(config("llama-3.1-8b", rope_scaling=scaling | {"original_max_position_embeddings": None}))


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        ModelShape.from_hf(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        ModelShape.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3",')
    with pytest.raises(ValueError, match=r"config.json must be JSON: .*line 1"):
        ModelShape.from_hf(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        ModelShape.from_hf(tmp_path)
