"""Advantages of scored responses, float64 on the CPU (spec A and E4).

Letters: N responses in all, G valid responses of one group.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

from megatron_rlvr.ops.advantage_options import AdvantageOptions
from megatron_rlvr.ops.backend import register
from megatron_rlvr.ops.exact import quantile_rank

WHITENING_EPS = 1e-8

# QAE_MASKS[mask][regime][sign]: whether wrong (0) and right (1) responses keep their advantage of magnitude 1/s.
QAE_MASKS = {
    "qae": {"hard": (False, True), "easy": (True, False)},
    "pos_mask": {"hard": (True, True), "easy": (True, False)},
    "neg_mask": {"hard": (False, True), "easy": (True, True)},
    "none": {"hard": (True, True), "easy": (True, True)},
}


@register("group_advantages", backend="reference")
def group_advantages(
    rewards_N: np.ndarray, group_sizes: list[int], *, estimator: str, options: AdvantageOptions
) -> np.ndarray:
    """See `megatron_rlvr.ops.group_advantages`; arguments are checked, ``options`` complete.

    Args:
        rewards_N: float64 [N].

    Returns:
        float64 [N], 0 for invalid responses.
    """
    valid_N = options.valid_N if options.valid_N is not None else np.ones(len(rewards_N), dtype=bool)
    advantages_N = np.zeros(len(rewards_N))
    levels = options.level_of_groups(len(group_sizes))
    for group, level in zip(_groups(group_sizes, valid_N), levels, strict=True):
        advantages_N[group] = _one_group(rewards_N, group, estimator, options, level)
    if estimator in ("reinforce_pp", "reinforce_pp_baseline"):
        assert options.lengths_N is not None, "the face checks that lengths are given"
        return _whiten(advantages_N, options.lengths_N, valid_N)
    if estimator == "gpg":
        # B / number of non-zero rewards over the batch, so that zero-reward responses do not shrink the step.
        return advantages_N * (valid_N.sum() / max(1, np.count_nonzero(rewards_N[valid_N])))
    return advantages_N


def _groups(group_sizes: list[int], valid_N: np.ndarray) -> list[np.ndarray]:
    """Indices of each group's valid responses."""
    borders = np.concatenate([[0], np.cumsum(group_sizes, dtype=np.int64)])
    return [start + np.flatnonzero(valid_N[start:stop]) for start, stop in itertools.pairwise(borders)]


def _one_group(
    rewards_N: np.ndarray, group: np.ndarray, estimator: str, options: AdvantageOptions, level: Fraction
) -> np.ndarray:
    rewards_G = rewards_N[group]
    # Estimators without a group baseline.
    if estimator in ("psr", "reinforce_pp"):
        return rewards_G
    if estimator == "nsr":
        return rewards_G - 1.0
    if estimator == "w_reinforce":
        return np.where(rewards_G == 1.0, options.positive_weight, -1.0)
    if estimator == "qae":
        return _qae(rewards_N, group, options, level)
    size = len(group)
    # Explicit zeros: the rounding of a mean of equal rewards over a tiny std would leak advantages (spec A5).
    if size < 2 or rewards_G.max() == rewards_G.min():
        return np.zeros(size)
    centred_G = rewards_G - rewards_G.mean()
    if estimator == "grpo":
        return centred_G / (_spread(rewards_G, options.std) + options.eps)
    if estimator == "rloo":
        return centred_G * (size / (size - 1))
    if estimator == "opo":
        assert options.lengths_N is not None, "the face checks that lengths are given"
        lengths_G = options.lengths_N[group]
        return rewards_G - (lengths_G * rewards_G).sum() / max(1, lengths_G.sum())
    assert estimator in ("dr_grpo", "gpg", "reinforce_pp_baseline"), f"unknown estimator {estimator}"
    return centred_G


def _qae(rewards_N: np.ndarray, group: np.ndarray, options: AdvantageOptions, level: Fraction) -> np.ndarray:
    """(x - b_K) / (std + eps), x the correctness or the reward (spec A1-A5, A7, A9)."""
    by_correctness = options.gate_on == "correctness"
    gate_N = options.correctness_N if by_correctness else rewards_N
    assert gate_N is not None, "the face derives or demands the correctness"
    values_G = gate_N[group]
    if len(group) < 2 or values_G.max() == values_G.min():
        return np.zeros(len(group))
    scale = 1.0 if options.std == "none" else _spread(values_G, options.std) + options.eps
    if options.mask == "qae":
        advantages_G = (values_G - quantile_baseline(values_G, level, options.quantile)) / scale
    else:
        advantages_G = _masked_signs(values_G, options.mask, level) / scale
    if by_correctness and options.penalty_N is not None and options.penalty_additive:
        # The penalty is on the +-1 scale, the correctness on 0/1: half of it (spec A9).
        advantages_G = advantages_G + options.penalty_N[group] / (2.0 * scale)
    return advantages_G


def quantile_baseline(values_G: np.ndarray, level: Fraction, quantile: str) -> float:
    """b_K: the smallest x with F(x) >= K (``inf``), or linear interpolation at K (G - 1) (``linear``)."""
    ordered_G = np.sort(values_G)
    size = len(ordered_G)
    if quantile == "inf":
        return float(ordered_G[quantile_rank(level, size) - 1])
    position = level * (size - 1)
    below = math.floor(position)
    low, high = ordered_G[below], ordered_G[min(below + 1, size - 1)]
    return float(low + float(position - below) * (high - low))


def _masked_signs(values_G: np.ndarray, mask: str, level: Fraction) -> np.ndarray:
    """+-(gap between the two values) by the table of `QAE_MASKS`."""
    low, high = values_G.min(), values_G.max()
    if not np.isin(values_G, (low, high)).all():
        raise ValueError(f"mask must be 'qae' where a group has more than two distinct rewards, got {mask!r}")
    num_wrong = int((values_G == low).sum())
    regime = "hard" if num_wrong >= quantile_rank(level, len(values_G)) else "easy"
    keep_wrong, keep_right = QAE_MASKS[mask][regime]
    return np.where(values_G == high, (high - low) * keep_right, (low - high) * keep_wrong)


def _spread(values_G: np.ndarray, std: str) -> float:
    return float(np.std(values_G, ddof=1 if std == "sample" else 0))


def _whiten(values_N: np.ndarray, lengths_N: np.ndarray, valid_N: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(unbiased var + 1e-8) over the tokens of all valid responses (spec E4)."""
    weights_N = np.where(valid_N, lengths_N, 0).astype(np.float64)
    num_tokens = weights_N.sum()
    counted_N = values_N[weights_N > 0]
    if num_tokens < 2 or counted_N.max() == counted_N.min():
        return np.zeros(len(values_N))
    mean = (weights_N * values_N).sum() / num_tokens
    variance = (weights_N * (values_N - mean) ** 2).sum() / (num_tokens - 1)
    return np.where(valid_N, (values_N - mean) / math.sqrt(variance + WHITENING_EPS), 0.0)
