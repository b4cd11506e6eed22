"""Verifiers by name. A verifier is a callable ``(response_text, prompt) -> float``, higher is better.

It runs in the main thread of a worker process of `VerifierPool`. It raises `UnparsableError` for a response without a
readable answer; any other exception counts as a crash.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megatron_rlvr.registry import Registry
from megatron_rlvr.types import Prompt

Verifier = Callable[[str, Prompt], float]

VERIFIERS: Registry[Verifier] = Registry("reward.verifier")

_MODULES = {
    "auto": "megatron_rlvr.reward.auto",
    "exact": "megatron_rlvr.reward.exact",
    "math": "megatron_rlvr.reward.math",
    "reasoning_gym": "megatron_rlvr.reward.reasoning_gym",
}
"""Imported when asked for: math-verify and reasoning-gym take a second, and only the workers need them."""


def check_verifier_name(name: str) -> None:
    """Refuses what cannot be a verifier, without importing one.

    Raises:
        ValueError: neither a known name nor a path ``pkg.mod:obj``.
    """
    if name not in _MODULES and name not in VERIFIERS and ":" not in name:
        raise ValueError(f"reward.verifier must be one of {sorted(_MODULES)} or a path 'pkg.mod:obj', got {name!r}")


def load_verifier(name: str) -> Verifier:
    """The verifier called `name`, or the callable at a dotted path.

    Raises:
        ValueError: unknown name, a path that cannot be imported, or an object that is no callable.
    """
    check_verifier_name(name)
    if name in _MODULES:
        importlib.import_module(_MODULES[name])
    verifier = VERIFIERS.get(name)
    if not callable(verifier):
        raise ValueError(f"reward.verifier {name!r} must be a callable (response_text, prompt) -> float")
    return verifier
