"""The faces of the ops: argument checks, then the backend's implementation.

Letters: T packed tokens, V vocabulary columns of this rank's shard, N responses.
"""

from megatron_rlvr.ops import reference  # noqa: F401 - registers the reference implementations
from megatron_rlvr.ops.backend import get_backend, set_backend
from megatron_rlvr.ops.bucket import pack_bucket, unpack_bucket
from megatron_rlvr.ops.chunked_head import chunked_logprob_entropy, real_columns
from megatron_rlvr.ops.covariance import TokenCovariance
from megatron_rlvr.ops.faces import (
    aggregated_policy_loss,
    group_advantages,
    policy_loss,
    ratio_clipped,
    select_tokens,
    token_covariance,
    vocab_parallel_logprob_entropy,
)
from megatron_rlvr.ops.order_statistics import TopShare, top_shares
from megatron_rlvr.ops.vocab_moments import VocabMoments, vocab_parallel_moments

__all__ = [
    "TokenCovariance",
    "TopShare",
    "VocabMoments",
    "aggregated_policy_loss",
    "chunked_logprob_entropy",
    "get_backend",
    "group_advantages",
    "pack_bucket",
    "policy_loss",
    "ratio_clipped",
    "real_columns",
    "select_tokens",
    "set_backend",
    "token_covariance",
    "top_shares",
    "unpack_bucket",
    "vocab_parallel_logprob_entropy",
    "vocab_parallel_moments",
]
