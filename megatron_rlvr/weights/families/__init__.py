"""Supported Hugging Face families by ``model_type``."""

from __future__ import annotations

from megatron_rlvr.weights.families import llama, mistral, qwen2, qwen3, qwen3_moe
from megatron_rlvr.weights.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (qwen2, qwen3, qwen3_moe, llama, mistral)
}
