"""Thresholds and means of the largest values of all ranks, exact and without gathering the values.

Radix selection on order-preserving 32-bit keys: four rounds of 256-bin counts, all-reduced. The same on every rank and
for every split of the values over ranks (means up to the order of additions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist

BITS = 8
ROUNDS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TopShare:
    """The largest values, by share.

    Example:
        >>> [top] = top_shares(torch.arange(1000.0), [Fraction(1, 50)])
        >>> top.threshold, top.mean, top.count
        (980.0, 989.5, 20)
    """

    threshold: float
    """The smallest of them, which is the (1 - share) quantile by rank; rounded to float32. NaN without values."""
    mean: float
    """Of them, each rounded to float32. NaN without values."""
    count: int
    """How many they are: floor(share N), at least 1 (0 without values)."""


def top_shares(
    values_N: torch.Tensor, shares: Sequence[Fraction], *, group: dist.ProcessGroup | None = None
) -> list[TopShare]:
    """The largest ``floor(share N)`` values for every share, N over all ranks of ``group``.

    Args:
        values_N: float [N of this rank], finite; may be empty on some ranks.
        shares: each in (0, 1].
        group: ranks that hold the other values; None where these are all. Collective over it.

    Raises:
        ValueError: a share out of range, or a value that is not finite.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"shares must be in (0, 1], got {share}")
    if values_N.ndim != 1 or not bool(torch.isfinite(values_N).all()):
        raise ValueError(f"values_N must be one-dimensional and finite, got {list(values_N.shape)} values")
    single_N = values_N.detach().float()
    keys_N, order = _keys(single_N).sort()
    sorted_N = single_N[order].double()
    device = values_N.device
    total = int(_sum(torch.tensor([len(sorted_N)], device=device), group))
    if total == 0:
        return [TopShare(threshold=math.nan, mean=math.nan, count=0) for _ in shares]
    wanted_S = torch.tensor([max(1, math.floor(share * total)) for share in shares], device=device)
    threshold_S, left_S = _select(keys_N, wanted_S, group)
    above_S = torch.searchsorted(keys_N, threshold_S, right=True)
    sums_S = torch.stack([sorted_N[int(first) :].sum() for first in above_S])
    value_S = _values(threshold_S).double()
    mean_S = (_sum(sums_S, group) + left_S * value_S) / wanted_S
    return [
        TopShare(threshold=float(value), mean=float(mean), count=int(count))
        for value, mean, count in zip(value_S, mean_S, wanted_S, strict=True)
    ]


def _select(
    keys_N: torch.Tensor, wanted_S: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key of the n-th largest for every n of ``wanted_S``, and how many with that key are among the n."""
    prefix_S, left_S = torch.zeros_like(wanted_S), wanted_S.clone()
    for shift in range(BITS * (ROUNDS - 1), -1, -BITS):
        borders = torch.arange((1 << BITS) + 1, device=keys_N.device) << shift
        places_SB = torch.searchsorted(keys_N, (prefix_S[:, None] + borders).flatten()).view(len(wanted_S), -1)
        counts_SB = _sum(places_SB.diff(dim=1), group)
        # From the highest bin down: how many lie in a bin or above it.
        at_least_SB = counts_SB.flip(1).cumsum(1).flip(1)
        bin_S = (at_least_SB >= left_S[:, None]).sum(1) - 1
        rows = torch.arange(len(wanted_S), device=keys_N.device)
        left_S = left_S - (at_least_SB[rows, bin_S] - counts_SB[rows, bin_S])
        prefix_S = prefix_S + (bin_S << shift)
    return prefix_S, left_S


def _keys(single_N: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2^32) in the order of the float32 values; -0.0 counts as +0.0."""
    bits_N = (single_N + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits_N < 0, -1 - (bits_N & 0x7FFFFFFF), bits_N) + (1 << 31)


def _values(keys_S: torch.Tensor) -> torch.Tensor:
    """float32 values of keys."""
    signed_S = keys_S - (1 << 31)
    # What _keys made of a negative value's bits, undone: its lower 31 bits are -1 - signed.
    magnitude_S = torch.where(signed_S < 0, -1 - signed_S, signed_S)
    value_S = magnitude_S.to(torch.int32).view(torch.float32)
    return torch.where(signed_S < 0, -value_S, value_S)


def _sum(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None:
        values = values.contiguous()
        dist.all_reduce(values, group=group)
    return values
