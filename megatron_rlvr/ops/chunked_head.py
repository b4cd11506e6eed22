"""Face of the chunked head: log-prob and entropy from hidden states, the logits never whole."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rlvr.ops.backend import implementation
from megatron_rlvr.ops.checks import INTEGER_DTYPES, LOGIT_DTYPES, check_positive, check_same_length, check_tensor


def chunked_logprob_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = 256 << 20,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`vocab_parallel_logprob_entropy` of hidden_TD @ weight_VD^T, without [T, V] ever existing.

    The logits of as many tokens as ``chunk_bytes`` hold are computed, read and dropped; backward computes them
    again and turns each chunk into its gradient in place. One all-gather for all chunks in forward; in backward one
    all-reduce of the hidden states' gradient, which is a sum over the vocabulary and so over the ranks.

    Args:
        hidden_TD: bf16, fp16, fp32 or fp64 [T, D], the same on all ranks of ``group``.
        weight_VD: [V, D] output weight of this rank's shard, same dtype.
        targets_T: int64 or int32 [T] ids in the whole vocabulary.
        temperature: divides the logits after the upcast to fp32.
        group: process group of the vocabulary shards, in rank order; None for an unsharded vocabulary.
        chunk_bytes: memory for logits at a time; at least one token's are always computed.
        vocab_size: real columns of the whole vocabulary; later ones are padding and take no part. None: all are real.

    Returns:
        log-probs and entropies in nats, fp32 [T] (fp64 for fp64 hidden states), differentiable in hidden_TD and
        weight_VD.

    Raises:
        TypeError, ValueError: bad type, shape, dtype, temperature or chunk_bytes; a target outside the vocabulary;
            a row of logits with NaN, +inf or nothing but -inf.
    """
    check_tensor(hidden_TD, name="hidden_TD", dims=2, dtypes=LOGIT_DTYPES)
    check_tensor(weight_VD, name="weight_VD", dims=2, dtypes=(hidden_TD.dtype,))
    check_tensor(targets_T, name="targets_T", dims=1, dtypes=INTEGER_DTYPES)
    check_same_length(hidden_TD.shape[0], targets_T=targets_T)
    if weight_VD.shape[1] != hidden_TD.shape[1]:
        raise ValueError(f"weight_VD must have {hidden_TD.shape[1]} columns like hidden_TD, got {weight_VD.shape[1]}")
    temperature = check_positive(temperature, name="temperature")
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be a positive integer, got {chunk_bytes!r}")
    return implementation("chunked_logprob_entropy")(
        hidden_TD,
        weight_VD,
        targets_T,
        temperature=temperature,
        group=group,
        chunk_bytes=chunk_bytes,
        num_real=real_columns(weight_VD.shape[0], vocab_size=vocab_size, group=group),
    )


def real_columns(width: int, *, vocab_size: int | None, group: dist.ProcessGroup | None) -> int:
    """Columns of this rank's shard of ``width`` that are not padding, where all shards are equally wide.

    Raises:
        ValueError: vocab_size is not within the shards.
    """
    if vocab_size is None:
        return width
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 0 < vocab_size <= ranks * width:
        raise ValueError(f"vocab_size must be an integer in (0, {ranks * width}], got {vocab_size!r}")
    return min(max(vocab_size - rank * width, 0), width)
