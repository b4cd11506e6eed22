"""From token losses to one number, with denominators over the whole optimizer step (spec E2)."""

from __future__ import annotations

import numpy as np

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def token_weights(lengths_N: np.ndarray, aggregation: str, max_response_tokens: int) -> np.ndarray:
    """Weight of every token of a response, so that the loss is the sum of token loss times weight.

    Denominators run over all responses of the optimizer step, on all ranks, so that the loss does not depend on
    packing, micro-batches or ranks.

    Args:
        lengths_N: int [N] response tokens; a response without tokens has none to weigh and does not count.
        aggregation: ``token-mean`` (DAPO) 1 / sum of lengths; ``seq-mean-token-sum`` 1 / B; ``seq-mean-token-mean``
            (GRPO) 1 / (B length); ``seq-mean-token-sum-norm`` (Dr. GRPO) 1 / (max_response_tokens B); B responses
            with tokens.
        max_response_tokens: L_max, tokens.

    Returns:
        float64 [N]; 0 for responses without tokens.

    Raises:
        ValueError: unknown aggregation, negative length, or L_max below 1.
    """
    lengths = np.asarray(lengths_N, dtype=np.float64)
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"loss.aggregation must be one of {list(AGGREGATIONS)}, got {aggregation!r}")
    if (lengths < 0).any():
        raise ValueError(f"lengths_N must be 0 or above, got {lengths.min():.0f}")
    if max_response_tokens < 1:
        raise ValueError(f"max_response_tokens must be 1 or above, got {max_response_tokens}")
    counts_N = lengths > 0
    num_responses = int(counts_N.sum())
    if num_responses == 0:
        return np.zeros(len(lengths))
    if aggregation == "token-mean":
        weights_N = np.full(len(lengths), 1.0 / lengths.sum())
    elif aggregation == "seq-mean-token-sum":
        weights_N = np.full(len(lengths), 1.0 / num_responses)
    elif aggregation == "seq-mean-token-mean":
        weights_N = 1.0 / (num_responses * np.maximum(lengths, 1.0))
    else:
        weights_N = np.full(len(lengths), 1.0 / (max_response_tokens * num_responses))
    return np.where(counts_N, weights_N, 0.0)
