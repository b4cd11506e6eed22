"""Qwen3 dense: no biases, RMSNorm on the heads of queries and keys."""

from __future__ import annotations

from megatron_rlvr.weights.family import Family
from megatron_rlvr.weights.rules import ATTENTION, DENSE_MLP, EMBEDDING_AND_HEAD, QK_NORM

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=EMBEDDING_AND_HEAD + ATTENTION + QK_NORM + DENSE_MLP,
    qk_norm=True,
    optional={"rope_scaling": None},
    fixed={"use_sliding_window": (False,), "attention_bias": (False,)},
    # Windows are unused while use_sliding_window is false (Qwen3Config.__post_init__ drops them).
    ignored=frozenset({"sliding_window", "max_window_layers"}),
)
