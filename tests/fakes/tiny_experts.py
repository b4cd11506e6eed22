"""A random Qwen3-MoE of four layers and four experts, as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fakes.tiny_qwen3 import VOCAB_SIZE, write_byte_tokenizer

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "torch_dtype": "float32",
}
"""Feed-forward sizes are whole multiples of 32 on two ranks: what a CPU server does not pad."""


def write_tiny_experts(folder: Path, *, seed: int = 0) -> Path:
    """Writes config, tokenizer and fp32 safetensors; returns ``folder``."""
    import torch
    from safetensors.torch import save_file

    from megatron_rlvr.weights.hf_config import ModelShape
    from megatron_rlvr.weights.layout import Layout
    from megatron_rlvr.weights.mapping import Mapping

    folder.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    generator = torch.Generator().manual_seed(seed)
    scales = {"model.embed_tokens.weight": 8.0, "lm_head.weight": 2.0}
    tensors = {}
    for name, shape in Mapping(ModelShape.from_hf(CONFIG), layout=Layout(), naming="local").hf_tensors().items():
        drawn = torch.randn(shape, generator=generator)
        scale = scales.get(name, 1.0)
        tensors[name] = 1.0 + 0.1 * drawn if len(shape) == 1 else scale * drawn / shape[-1] ** 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
