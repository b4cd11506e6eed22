"""The verifier that fits the problem's source."""

from __future__ import annotations

from megatron_rlvr.reward.math import verify_math
from megatron_rlvr.reward.reasoning_gym import verify_reasoning_gym
from megatron_rlvr.reward.verifiers import VERIFIERS
from megatron_rlvr.types import Prompt


@VERIFIERS.register("auto")
def verify_by_source(response_text: str, prompt: Prompt) -> float:
    """reasoning-gym's scoring for its problems, mathematical equivalence for rows of files."""
    verifier = verify_reasoning_gym if "reasoning_gym" in prompt.metadata else verify_math
    return verifier(response_text, prompt)
