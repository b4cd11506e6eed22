"""Reads the answer of SGLang's /generate, 0.5.17 to 0.5.23."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from megatron_rlvr.types import FinishReason

UNSYNCED_VERSION = "default"
"""What a server calls the weights it was launched with."""


class MalformedAnswerError(Exception):
    """The body is not what /generate answers."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One response as the engine gave it.

    Example:
        >>> Sample(output_ids=np.array([5, 1], np.int32), logprobs=np.array([-0.1, -0.7], np.float32), text="4",
        ...        finish_reason=FinishReason.stop, weight_versions=[(3, 0, 2)], prompt_tokens=2, cached_tokens=0)
    """

    output_ids: np.ndarray
    """int32 [R] sampled token ids."""
    logprobs: np.ndarray
    """float32 [R] nats, of the tempered distribution, not renormalised for top-p and top-k."""
    text: str
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int, int]]
    """(policy_version, start, end) spans that cover the R tokens; one empty span when R is 0."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens found in the server's prefix cache."""
    retries: int = 0
    """Attempts that failed before this one."""
    aborts: int = 0
    """Attempts that were aborted by the server before this one."""


def parse_version(version: str) -> int:
    """The policy version in a server's ``weight_version``; 0 for the weights it was launched with.

    Raises:
        MalformedAnswerError: neither.
    """
    if version == UNSYNCED_VERSION:
        return 0
    try:
        return int(version)
    except (ValueError, TypeError):
        raise MalformedAnswerError(f"weight_version must be a policy version, got {version!r}") from None


def parse_answer(body: bytes) -> Sample:
    """The response in the body of a /generate answer to one prompt with ``return_logprob``.

    Raises:
        MalformedAnswerError: not JSON, a field is missing, or a log-prob is not a number.
    """
    try:
        answer = orjson.loads(body)
        meta = answer["meta_info"]
        entries = meta["output_token_logprobs"]
        logprobs, ids = ([], []) if not entries else tuple(zip(*entries, strict=True))[:2]
        output_ids = np.array(ids, dtype=np.int32)
        logprobs_R = np.array(logprobs, dtype=np.float32)
        finish_reason = FinishReason(meta["finish_reason"]["type"])
        if meta["completion_tokens"] != len(output_ids):
            raise MalformedAnswerError(f"{meta['completion_tokens']} tokens have {len(output_ids)} log-probs")
        if not np.isfinite(logprobs_R).all():
            raise MalformedAnswerError("a sampled token has no finite log-prob")
        return Sample(
            output_ids=output_ids,
            logprobs=logprobs_R,
            text=answer["text"],
            finish_reason=finish_reason,
            weight_versions=_spans(meta, len(output_ids)),
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
        )
    except KeyError as error:
        raise MalformedAnswerError(f"it has no {error}") from error
    except (ValueError, TypeError) as error:
        raise MalformedAnswerError(str(error)) from error


def _spans(meta: dict[str, Any], length: int) -> list[tuple[int, int, int]]:
    """Spans over exactly ``length`` tokens; up to 0.5.20 only the version at the end is known, and stands for all."""
    if "weight_versions" not in meta:
        return [(parse_version(meta["weight_version"]), 0, length)]
    spans: list[tuple[int, int, int]] = []
    for span in meta["weight_versions"]:
        start = spans[-1][2] if spans else 0
        end = min(span["end"], length)
        if end > start or not spans:
            spans.append((parse_version(span["version"]), start, end))
    if not spans:
        return [(parse_version(meta["weight_version"]), 0, length)]
    version, start, _ = spans[-1]
    spans[-1] = (version, start, length)
    return spans
