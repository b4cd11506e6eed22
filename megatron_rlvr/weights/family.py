"""What a family file states: its config fields and its rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.weights.rules import Rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One Hugging Face model family.

    Example:
        >>> Family(model_type="llama", architecture="LlamaForCausalLM", rules=(...), optional={"rope_theta": 10000.0})
    """

    model_type: str
    """``model_type`` in config.json."""
    architecture: str
    """The only entry allowed in ``architectures``."""
    rules: tuple[Rule, ...]
    qkv_bias: bool = False
    """q, k and v projections have biases."""
    qk_norm: bool = False
    """RMSNorm over the head dimension of queries and keys."""
    moe: bool = False
    optional: Mapping[str, Any] = field(default_factory=dict)
    """Fields that config.json may leave out, with the default of the Hugging Face config class."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields that may be present but only with one of these values, because nothing else is implemented."""
    ignored: frozenset[str] = frozenset()
    """Fields of this family that cannot change the function that the weights compute."""
