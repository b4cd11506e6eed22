"""Carriers that flow through one training step.

Letters: T packed tokens, S sequences, V vocabulary, P prompts, G responses of a prompt, N responses.
Everything up to `RolloutGroup` is numpy, so that the rollout process never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Stateful(Protocol):
    """Something whose state belongs into a checkpoint: controllers, monitors, windows of metrics.

    The state pickles and holds plain Python and numpy values only; every rank holds the same.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class FinishReason(str, Enum):
    """Why the engine stopped a response."""

    stop = "stop"
    length = "length"
    abort = "abort"


class VerifierStatus(str, Enum):
    """What became of one verification; anything but `ok` is counted and reported, never silently 0."""

    ok = "ok"
    unparsable = "unparsable"
    timeout = "timeout"
    crash = "crash"


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One problem.

    Example:
        >>> Prompt(uid="train/7", text="2+2=", input_ids=np.array([4, 9], np.int32), answer="4",
        ...        data_source="chain_sum", metadata={})
    """

    uid: str
    """Stable name: split and index within it, e.g. ``train/7``."""
    text: str
    """The text after the template, as tokenised."""
    input_ids: np.ndarray
    """int32 [L] token ids."""
    answer: Any
    """Reference answer as the verifier wants it."""
    data_source: str
    """Family or file tag; metrics are split by it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else the verifier needs (for reasoning-gym the whole entry). Must pickle."""


@dataclass(kw_only=True, slots=True)
class Score:
    """Verdict on one response."""

    correctness: float
    """1.0 right, 0.0 wrong (after the threshold); the gate of QAE and dynamic sampling."""
    reward: float
    """Raw reward before overlong shaping."""
    status: VerifierStatus = VerifierStatus.ok
    detail: str = ""
    """Reason when the status is not ok."""


@dataclass(kw_only=True, slots=True)
class Rollout:
    """One sampled response with its verdict."""

    response_ids: np.ndarray
    """int32 [R] sampled token ids, end-of-sequence included when sampled."""
    rollout_logprobs: np.ndarray
    """float32 [R] nats, the engine's log-probs at sampling (tempered)."""
    text: str
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int, int]]
    """(policy_version, start, end) spans of response tokens, end exclusive; one span when no sync fell within."""
    correctness: float = 0.0
    """1.0 or 0.0."""
    reward: float = 0.0
    """Raw reward, without the overlong penalty."""
    penalty: float = 0.0
    """Overlong penalty <= 0 on the +-1 scale (0 when off)."""
    verifier_status: VerifierStatus = VerifierStatus.ok

    @property
    def valid(self) -> bool:
        """Whether the response counts in its group: finished by itself or by length, and scored."""
        return self.finish_reason is not FinishReason.abort and len(self.response_ids) > 0


@dataclass(kw_only=True, slots=True)
class RolloutGroup:
    """G responses to one prompt."""

    prompt: Prompt
    rollouts: list[Rollout]
    index: int
    """Position in the data order (counts prompts drawn since the start of the run)."""

    @property
    def mixed(self) -> bool:
        """Whether some valid responses are right and some wrong (0 < n1 < G_eff)."""
        right = {rollout.correctness > 0.5 for rollout in self.rollouts if rollout.valid}
        return len(right) == 2


@dataclass(kw_only=True, slots=True)
class RolloutBatch:
    """What the rollout process hands to the trainer for one step."""

    groups: list[RolloutGroup]
    metrics: dict[str, float]
    """Accounting: ``rollout/groups_generated``, ``rollout/groups_accepted``, ``rollout/aborted``,
    ``verifier/unparsable``, ``verifier/timeout``, ``verifier/crash``, ``time/generate_s``, ``time/reward_s``."""


@dataclass(kw_only=True, slots=True)
class EvalBatch:
    """Answers to the held-out problems, one group a problem, in the fixed order of the validation set."""

    groups: list[RolloutGroup]
    metrics: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Mean correctness over problems of the mean over samples (pass@1)."""
        rates = [float(np.mean([r.correctness for r in group.rollouts])) for group in self.groups]
        return float(np.mean(rates)) if rates else float("nan")


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """Packed sequences of one data-parallel rank, token t predicting ``targets_T[t]``.

    A sequence of prompt length L and response length R takes L + R tokens; its last R + 1 .. last 2 positions
    (those whose target is a response token) carry ``loss_mask_T``. It is one segment, or, where responses share a
    prompt, the common segment of L - 1 tokens and one of its own of R + 1 (see `data.packing`).
    """

    tokens_T: torch.Tensor
    """int64 [T] input ids; padding at the end, if any, forms a sequence of its own."""
    position_ids_T: torch.Tensor
    """int64 [T] position inside its sequence."""
    cu_seqlens: torch.Tensor
    """int32 [S+1] segment borders in tokens, a segment of padding included."""
    prefixes: list[int]
    """[S] index of the earlier segment whose tokens come before a segment's own in its sequence, -1: none."""
    max_seqlen: int
    """Tokens of the longest sequence."""
    targets_T: torch.Tensor
    """int64 [T] next token inside the sequence, 0 where there is none."""
    loss_mask_T: torch.Tensor
    """bool [T], true where the target is a sampled response token."""
    advantages_T: torch.Tensor
    """float32 [T], the response's advantage on its masked positions, 0 elsewhere."""
    weights_T: torch.Tensor
    """float32 [T] aggregation weight of a token's loss: the loss is sum(loss_T * weights_T) over the whole
    optimizer step on all ranks (global denominators are inside)."""
    rollout_logprobs_T: torch.Tensor
    """float32 [T] nats, on masked positions."""
    trajectory_T: torch.Tensor
    """int64 [T] index of the response in the optimizer step's canonical order, -1 on padding."""
    response_position_T: torch.Tensor
    """int64 [T] index of the target inside its response, -1 where not masked."""
    sources: list[str]
    """Data source of every segment but the padding, in packing order; metrics are split by it."""
    regimes: list[str]
    """``hard``, ``easy`` or ``degenerate`` (spec A1) of every segment's group, empty where nobody told."""
    old_logprobs_T: torch.Tensor | None = None
    """float32 [T] nats, the trainer's log-probs before the first update of this rollout batch."""
    ref_logprobs_T: torch.Tensor | None = None
    """float32 [T] nats under the frozen reference model."""
    selected_T: torch.Tensor | None = None
    """bool [T] tokens picked by Clip-Cov or KL-Cov."""

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.numel())

    @property
    def num_shared_tokens(self) -> int:
        """Tokens that the packing saves: a shared segment once for each segment that continues it, but the first."""
        lengths_S = self.cu_seqlens.diff().tolist()
        return sum(
            lengths_S[prefix] * (self.prefixes.count(prefix) - 1) for prefix in set(self.prefixes) if prefix >= 0
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMeta:
    """Name, dtype and shape of one Hugging Face tensor inside a bucket."""

    name: str
    dtype: str
    """Torch name without the prefix, e.g. ``bfloat16``."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineAddress:
    """One running server process."""

    id: str
    """The same over restarts of the server."""
    url: str
    num_ranks: int
    """Engine ranks that join a weight-update group."""
    restarts: int
    """Another number under the same `id` is another process, with the weights that it was started with."""


class EngineError(RuntimeError):
    """A server refused, failed or did not answer in time.

    Args:
        url: the server that is to blame, where it is known.
    """

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url


class EngineSilentError(EngineError):
    """A server took a request and did not answer in time."""
