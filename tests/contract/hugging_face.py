"""The reference that a server's log-probs are held against: transformers' own model on the same folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

from megatron_rlvr.rollout import platform


def reference_logits(model: Path, ids: list[int]) -> np.ndarray:
    """float64 [T, V] logits, computed in fp32."""
    platform.declare_torchvision_ops()
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return policy(torch.tensor([ids])).logits[0].double().numpy()


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """float64 [T, V] nats."""
    shifted = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def continuation_logprobs(model: Path, prompt: list[int], continuation: list[int]) -> np.ndarray:
    """float64 [len(continuation)] log-probs of given tokens after a prompt."""
    ids = prompt + continuation
    return log_softmax(reference_logits(model, ids))[np.arange(len(prompt) - 1, len(ids) - 1), continuation]
