"""Makes a small model from nothing: a Qwen3-shaped Hugging Face folder with a tokenizer trained on the task's text."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_rlvr.config.schema import ScratchModelConfig
from megatron_rlvr.trainer.warm_cache import keep_first
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping

PAD, EOS = "<|pad|>", "<|end|>"


def make_model(out: Path, config: ScratchModelConfig, *, texts: Iterable[str], seed: int) -> None:
    """Writes the folder with random weights, unless it is there; it appears whole or not at all.

    Args:
        texts: prompts and answers of the task; the tokenizer learns its pieces from them, digits stay single.
    """
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        vocab_size = _write_tokenizer(partial, texts, config)
        fields = hf_config(config, vocab_size)
        (partial / "config.json").write_text(json.dumps(fields, indent=2))
        (partial / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0}))
        save_file(_random_weights(ModelShape.from_hf(fields), seed), partial / "model.safetensors", {"format": "pt"})
        keep_first(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tokenizer(folder: Path, texts: Iterable[str], config: ScratchModelConfig) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD})
    )
    return tokenizer.get_vocab_size()


def hf_config(config: ScratchModelConfig, vocab_size: int) -> dict[str, object]:
    """The config.json of such a model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def _random_weights(shape: ModelShape, seed: int) -> dict[str, torch.Tensor]:
    """Normal(0, 0.02), projections back into the residual stream scaled by 1/sqrt(2 layers), norms one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in Mapping(shape, layout=Layout(), naming="local").hf_tensors().items():
        if len(size) == 1:
            tensors[name] = torch.ones(size)
            continue
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * shape.num_layers) if into_residual else 0.02
        tensors[name] = torch.randn(size, generator=generator) * std
    return tensors
