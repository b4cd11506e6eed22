"""Qwen3-MoE: Qwen3 attention; routed experts in all layers or every n-th, an ordinary MLP in the others."""

from __future__ import annotations

from megatron_rlvr.weights.family import Family
from megatron_rlvr.weights.rules import ATTENTION, DENSE_MLP, EMBEDDING_AND_HEAD, MOE_MLP, QK_NORM

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rules=EMBEDDING_AND_HEAD + ATTENTION + QK_NORM + DENSE_MLP + MOE_MLP,
    qk_norm=True,
    moe=True,
    optional={
        "head_dim": None,
        "rope_scaling": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "router_aux_loss_coef": 0.001,
    },
    fixed={
        "use_sliding_window": (False,),
        "attention_bias": (False,),
        # The coder models state what this architecture always is.
        "qkv_bias": (False,),
        "use_qk_norm": (True,),
        "shared_expert_intermediate_size": (0, None),
    },
    # Windows are unused while use_sliding_window is false; router logits are an output, not a weight.
    ignored=frozenset({"sliding_window", "max_window_layers", "output_router_logits"}),
)
