"""Small real models of every family, and what transformers needs to import on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.rollout import platform

_SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {**_SMALL}),
    "qwen2_tied": ("Qwen2Config", {**_SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_SMALL, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_SMALL, **_MOE, "head_dim": 16}),
    "qwen3_moe_mixed": ("Qwen3MoeConfig", {**_SMALL, **_MOE, "head_dim": 16, "mlp_only_layers": [0, 5]}),
    "llama": ("LlamaConfig", {**_SMALL, "rope_parameters": _LLAMA3}),
    "llama_tied": ("LlamaConfig", {**_SMALL, "tie_word_embeddings": True, "num_key_value_heads": 8}),
    "mistral": ("MistralConfig", {**_SMALL, "sliding_window": None, "head_dim": 8}),
}


@pytest.fixture(scope="session")
def _torchvision_ops() -> None:
    """Lets transformers' model classes be imported beside a +cpu torch."""
    platform.declare_torchvision_ops()


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, _torchvision_ops: None
) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """Gives the folder that transformers saved a random model of a family in, and the tensors written there."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def make(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if name not in made:
            import transformers
            from safetensors.torch import load_file

            class_name, fields = FAMILY_CONFIGS[name]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**fields))
            with torch.no_grad():
                for parameter in model.parameters():
                    # Norms start at one and biases at zero: without this, swapped ones would look right.
                    parameter.normal_()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, load_file(folder / "model.safetensors")
        return made[name]

    return make
