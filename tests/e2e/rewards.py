"""Rewards that tests give by path."""

from __future__ import annotations

from megatron_rlvr.types import Prompt


def share_of_low_bytes(response_text: str, prompt: Prompt) -> float:
    """In [0, 1]; differs between nearly all responses of random weights."""
    return sum(ord(character) < 100 for character in response_text) / max(1, len(response_text))
