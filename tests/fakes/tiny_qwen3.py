"""A random two-layer Qwen3 with a byte tokenizer, as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def write_tiny_qwen3(folder: Path, *, seed: int = 0, tie_embeddings: bool = False, num_layers: int = 2) -> Path:
    """Writes config, tokenizer and fp32 safetensors (hidden 64, 4 heads, 2 key-value heads); returns ``folder``.

    Weights are drawn so that the logits are far from uniform: a wrong tensor shows in the log-probs.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(folder)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": num_layers,
        "initializer_range": 0.02,
        "tie_word_embeddings": tie_embeddings,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def norm(width: int) -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(width, generator=generator)

    tensors = {"model.embed_tokens.weight": draw(VOCAB_SIZE, 64) * 8.0, "model.norm.weight": norm(64)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(64),
            prefix + "post_attention_layernorm.weight": norm(64),
            prefix + "self_attn.q_proj.weight": draw(64, 64),
            prefix + "self_attn.k_proj.weight": draw(32, 64),
            prefix + "self_attn.v_proj.weight": draw(32, 64),
            prefix + "self_attn.o_proj.weight": draw(64, 64),
            prefix + "self_attn.q_norm.weight": norm(16),
            prefix + "self_attn.k_norm.weight": norm(16),
            prefix + "mlp.gate_proj.weight": draw(128, 64),
            prefix + "mlp.up_proj.weight": draw(128, 64),
            prefix + "mlp.down_proj.weight": draw(64, 128),
        }
    if not tie_embeddings:
        tensors["lm_head.weight"] = draw(VOCAB_SIZE, 64) * 2.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with one token per byte and Qwen's special tokens after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
