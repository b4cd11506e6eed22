"""Exact match of the extracted answer."""

from __future__ import annotations

from megatron_rlvr.reward.answer import extract_answer
from megatron_rlvr.reward.verifiers import VERIFIERS
from megatron_rlvr.types import Prompt


@VERIFIERS.register("exact")
def verify_exact(response_text: str, prompt: Prompt) -> float:
    """1.0 if the extracted answer equals the reference character by character (outer white space aside), else 0.0."""
    return float(extract_answer(response_text) == str(prompt.answer).strip())
