"""The tasks: problems and how answers are scored."""

from dataclasses import dataclass, field
from typing import Any

MISSING = "???"


@dataclass(kw_only=True, slots=True)
class ReasoningGymSpec:
    name: str = MISSING
    """Family, e.g. ``chain_sum``."""
    weight: float = 1.0
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the family's own config."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    reasoning_gym: list[ReasoningGymSpec] = field(default_factory=list)
    jsonl: list[str] = field(default_factory=list)
    """Files with ``prompt`` or ``messages``, ``answer``, optional ``data_source``."""
    seed: int = 0
    """Seed of problem generation and of the train/validation split."""
    train_size: int = 20000
    """reasoning-gym problems to draw from."""
    val_size: int = 128
    """Held-out problems; from JSONL this many rows are split off by seed."""
    system_prompt: str | None = None
    prompt_template: str | None = None
    """With ``{prompt}``; plain text around the problem, before the chat template if one is used."""
    chat_template: bool = False
    """Apply the tokenizer's chat template."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""


@dataclass(kw_only=True, slots=True)
class OverlongConfig:
    """Soft overlong punishment of DAPO: min(-(len - (max_length - buffer)) / buffer * factor, 0)."""

    enabled: bool = False
    max_length: int = 20480
    buffer: int = 4096
    factor: float = 1.0


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    verifier: str = "auto"
    """``auto``: reasoning-gym's own scoring for its families, ``math`` for JSONL rows. Or ``math``,
    ``exact``, or a path ``pkg.mod:obj`` of a callable (response_text, prompt) -> float."""
    threshold: float = 0.999
    """A reward at or above it counts as correct."""
    binary: bool = True
    """Use the correctness (0 or 1) as the reward instead of the raw score."""
    num_workers: int = 2
    timeout_s: float = 10.0
    """Hard wall-clock limit of one verification."""
    memory_limit_mb: int = 2048
    """Address space one verification may take, beyond what the loaded verifier has; MiB."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
