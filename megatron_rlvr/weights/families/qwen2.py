"""Qwen2 and Qwen2.5: biases on q, k and v, none elsewhere."""

from __future__ import annotations

from megatron_rlvr.weights.family import Family
from megatron_rlvr.weights.rules import ATTENTION, DENSE_MLP, EMBEDDING_AND_HEAD, QKV_BIAS

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rules=EMBEDDING_AND_HEAD + ATTENTION + QKV_BIAS + DENSE_MLP,
    qkv_bias=True,
    optional={"head_dim": None, "rope_scaling": None},
    fixed={"use_sliding_window": (False,), "use_mrope": (False,)},
    # Windows are unused while use_sliding_window is false (Qwen2Config.__post_init__ drops them).
    ignored=frozenset({"sliding_window", "max_window_layers"}),
)
