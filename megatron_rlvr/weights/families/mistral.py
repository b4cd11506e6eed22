"""Mistral 7B v0.2 and later: the Llama architecture; v0.1's sliding window is refused."""

from __future__ import annotations

from megatron_rlvr.weights.family import Family
from megatron_rlvr.weights.rules import ATTENTION, DENSE_MLP, EMBEDDING_AND_HEAD

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rules=EMBEDDING_AND_HEAD + ATTENTION + DENSE_MLP,
    optional={"head_dim": None, "rope_scaling": None, "sliding_window": 4096},
    fixed={"sliding_window": (None,)},
)
