"""Soft overlong punishment (DAPO, arXiv:2503.14476, equation 13)."""

from __future__ import annotations


def overlong_penalty(length: int, *, max_length: int, buffer: int, factor: float = 1.0) -> float:
    """``min(-(length - (max_length - buffer)) / buffer * factor, 0)``, on the +-1 reward scale.

    Zero up to ``max_length - buffer``, then linear down to ``-factor`` at `max_length`; a longer response would go on
    falling, so the engine's response limit must not exceed `max_length`.

    Args:
        length: response tokens.
        max_length: tokens at which the full penalty is reached.
        buffer: tokens over which it grows, in 1..max_length.
        factor: size of the full penalty, >= 0.

    Raises:
        ValueError: an argument out of range.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"reward.overlong.buffer must be in 1..max_length = {max_length}, got {buffer}")
    if factor < 0:
        raise ValueError(f"reward.overlong.factor must be at least 0, got {factor}")
    return min(-(length - (max_length - buffer)) / buffer * factor, 0.0)
