"""Exact rational levels and order-independent sums.

A rank or a count that flips with the last bit of a float makes a run depend on its layout; here every such
number is an integer or a `Fraction`, and every sum that decides something is exact.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

# A finite double is an integer multiple of 2**-1074 below 2**1024; in units of 2**-1074 a sum of 2**62 of them
# needs 2098 + 62 bits.
UNIT_EXPONENT = -1074
LIMB_BITS = 32
NUM_LIMBS = 68


def parse_level(value: str | int | float | Fraction, *, name: str) -> Fraction:
    """An exact rational from a decimal string, ``p/q``, an int, a Fraction or a float.

    A float counts as its shortest decimal (``0.28`` is 7/25), not as its binary value (spec A2).

    Raises:
        TypeError: neither a string nor a number.
        ValueError: the string is no number, or the float is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Fraction):
        raise TypeError(f"{name} must be a number or a string like '0.4' or '2/5', got {value!r}")
    try:
        return Fraction(repr(float(value))) if isinstance(value, float) else Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name} must be a number or a string like '0.4' or '2/5', got {value!r}") from None


def parse_quantile_level(value: str | int | float | Fraction) -> Fraction:
    """The quantile level K as an exact rational in (0, 1).

    Raises:
        TypeError, ValueError: not a number, or outside (0, 1).
    """
    level = parse_level(value, name="K")
    if not 0 < level < 1:
        raise ValueError(f"K must be in (0, 1), got {value!r}")
    return level


def parse_ratio(value: str | int | float | Fraction) -> Fraction:
    """The share of tokens to select as an exact rational in (0, 1].

    Raises:
        TypeError, ValueError: not a number, or outside (0, 1].
    """
    ratio = parse_level(value, name="ratio")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {value!r}")
    return ratio


def quantile_rank(level: Fraction, size: int) -> int:
    """m = ceil(K * G) in exact arithmetic, within [1, G]: the baseline is the m-th smallest reward (spec A2)."""
    return min(max(math.ceil(level * size), 1), size)


def selection_count(ratio: Fraction, num_tokens: int) -> int:
    """n = max(1, floor(ratio * N)), or 0 where there are no tokens (spec B5)."""
    return max(1, math.floor(ratio * num_tokens)) if num_tokens else 0


def exact_sum_limbs(values_T: torch.Tensor) -> torch.Tensor:
    """The exact sum of finite doubles as a fixed-point number.

    Args:
        values_T: float64 [T], all finite, T below 2**31.

    Returns:
        int64 [NUM_LIMBS] on the CPU; the sum is ``sum(limb[i] * 2**(32 i)) * 2**-1074``. Limbs of several ranks
        add up to the limbs of the joint sum, whatever the order.
    """
    mantissa_T, exponent_T = torch.frexp(values_T)
    integer_T = (mantissa_T * 2.0**53).to(torch.int64)
    # Subnormals: frexp normalises them, so that low bits of the 53 are zero and the shift below may be negative.
    shift_T = exponent_T.to(torch.int64) - 53 - UNIT_EXPONENT
    integer_T = torch.where(shift_T < 0, integer_T >> (-shift_T).clamp(0, 62), integer_T)
    shift_T = shift_T.clamp_min(0)
    limb_T, bit_T = shift_T // LIMB_BITS, shift_T % LIMB_BITS
    # Three 32-bit pieces of integer << bit (at most 53 + 31 bits), with the sign on every piece.
    sign_T, magnitude_T = integer_T.sign(), integer_T.abs()
    low_mask = (1 << LIMB_BITS) - 1
    low_T = (magnitude_T & low_mask) << bit_T
    high_T = ((magnitude_T >> LIMB_BITS) << bit_T) + (low_T >> LIMB_BITS)
    limbs = torch.zeros(NUM_LIMBS, dtype=torch.int64, device=values_T.device)
    limbs.index_add_(0, limb_T, sign_T * (low_T & low_mask))
    limbs.index_add_(0, limb_T + 1, sign_T * (high_T & low_mask))
    limbs.index_add_(0, limb_T + 2, sign_T * (high_T >> LIMB_BITS))
    return limbs.cpu()


def limbs_to_fraction(limbs: torch.Tensor) -> Fraction:
    """The number that `exact_sum_limbs` (or a sum of several) stands for."""
    total = sum(limb << (LIMB_BITS * index) for index, limb in enumerate(limbs.tolist()))
    return Fraction(total, 1 << -UNIT_EXPONENT)
