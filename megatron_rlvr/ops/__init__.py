"""The faces of the ops: argument checks, then the backend's implementation.

Letters: T packed tokens, V vocabulary columns of this rank's shard, N responses.
"""

from megatron_rlvr.ops import reference  # noqa: F401 - registers the reference implementations
from megatron_rlvr.ops.backend import get_backend, set_backend
from megatron_rlvr.ops.covariance import TokenCovariance
from megatron_rlvr.ops.faces import (
    group_advantages,
    policy_loss,
    ratio_clipped,
    select_tokens,
    token_covariance,
    vocab_parallel_logprob_entropy,
)

__all__ = [
    "TokenCovariance",
    "get_backend",
    "group_advantages",
    "policy_loss",
    "ratio_clipped",
    "select_tokens",
    "set_backend",
    "token_covariance",
    "vocab_parallel_logprob_entropy",
]
