"""Where the answer stands in a response."""

from __future__ import annotations

import re

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK_END = "</think>"
_BOXED = "\\boxed{"


class UnparsableError(ValueError):
    """Raised by a verifier that finds no answer it can read; counted as `VerifierStatus.unparsable`."""


def after_thinking(response_text: str) -> str:
    """The response without its thoughts: what follows the last ``</think>``, or all of it if there is none."""
    return response_text.rpartition(_THINK_END)[2]


def tagged_answer(text: str) -> str | None:
    """Content of the last ``<answer>...</answer>``, stripped; None without one."""
    found = _ANSWER_TAG.findall(text)
    return found[-1].strip() if found else None


def boxed_answer(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``, nested braces included, stripped; None without a complete one."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for position in range(begin, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:position].strip()
    return None


def extract_answer(response_text: str) -> str:
    """The answer of a response: of the text after its thoughts the last ``<answer>`` tag, else the last ``\\boxed{}``,
    else all of it; stripped.

    Raises:
        UnparsableError: nothing is left.
    """
    text = after_thinking(response_text)
    answer = tagged_answer(text)
    if answer is None:
        answer = boxed_answer(text)
    if answer is None:
        answer = text.strip()
    if not answer:
        raise UnparsableError("the response has no answer")
    return answer
