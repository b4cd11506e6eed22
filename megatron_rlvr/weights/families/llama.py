"""Llama 2, 3, 3.1, 3.2 and models of the same architecture (SmolLM2): no biases, Llama-3 rope scaling."""

from __future__ import annotations

from megatron_rlvr.weights.family import Family
from megatron_rlvr.weights.rules import ATTENTION, DENSE_MLP, EMBEDDING_AND_HEAD

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rules=EMBEDDING_AND_HEAD + ATTENTION + DENSE_MLP,
    optional={"head_dim": None, "rope_scaling": None, "rope_theta": 10000.0, "num_key_value_heads": None},
    fixed={"attention_bias": (False,), "mlp_bias": (False,), "rope_interleaved": (False,)},
    # pretraining_tp splits the same products; the others are notes of converters.
    ignored=frozenset({"pretraining_tp", "is_llama_config", "transformers.js_config"}),
)
