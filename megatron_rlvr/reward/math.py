"""Mathematical equivalence by math-verify.

math-verify's own limits rest on signal.alarm: they fail in threads and cannot interrupt a long computation in C. They
are off here; the wall-clock limit is the worker pool's.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from megatron_rlvr.reward.answer import UnparsableError, after_thinking, tagged_answer
from megatron_rlvr.reward.verifiers import VERIFIERS
from megatron_rlvr.types import Prompt

# It warns once in every process that its limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX_MARKS = ("$", "\\boxed", "\\(", "\\[")


@VERIFIERS.register("math")
def verify_math(response_text: str, prompt: Prompt) -> float:
    """1.0 if the response's last expression equals the reference, else 0.0.

    The expression is taken from the last ``<answer>`` tag if there is one, else found by math-verify (boxed first,
    then formulas and numbers from the end).

    Raises:
        UnparsableError: no expression in the response, or in the reference.
    """
    text = after_thinking(response_text)
    tagged = tagged_answer(text)
    try:
        found = parse(text if tagged is None else _as_latex(tagged), parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception as error:  # sympy and antlr fail in many ways on what a model writes
        raise UnparsableError(f"math-verify cannot parse the response: {type(error).__name__}: {error}") from error
    if not found:
        raise UnparsableError("math-verify finds no expression in the response")
    gold = _parse_reference(str(prompt.answer))
    if not gold:
        raise UnparsableError(f"math-verify cannot parse the reference answer {prompt.answer!r} of {prompt.uid}")
    if verify(gold, found, timeout_seconds=None, raise_on_error=True):
        return 1.0
    if all(isinstance(expression, str) for expression in found):  # only its text was left to compare
        raise UnparsableError(f"math-verify cannot parse the expression {found[0][:200]!r}")
    return 0.0


def _as_latex(answer: str) -> str:
    """Bare LaTeX in a box, so that all of it counts."""
    return answer if any(mark in answer for mark in _LATEX_MARKS) else f"\\boxed{{{answer}}}"


@lru_cache(maxsize=4096)
def _parse_reference(answer: str) -> list[Any]:
    return parse(_as_latex(answer), parsing_timeout=None, raise_on_error=True)
