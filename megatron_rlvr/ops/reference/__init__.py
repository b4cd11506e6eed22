"""Plain PyTorch implementations of every op: the oracle of the native ones and the fallback without them."""

from megatron_rlvr.ops.reference import (
    bucket,
    chunked_head,
    group_advantages,
    policy_loss,
    token_selection,
    vocab_moments,
    vocab_parallel,
)

__all__ = [
    "bucket",
    "chunked_head",
    "group_advantages",
    "policy_loss",
    "token_selection",
    "vocab_moments",
    "vocab_parallel",
]
