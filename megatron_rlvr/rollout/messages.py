"""What the trainer and its rollout process say to each other, one pickled object a message.

The trainer sends `Command`s, one at a time; the rollout process answers each with any number of `Progress`, `Notice`,
`ServerTrouble` and `Heartbeat` messages and then one `Result` or `Failure`. This file imports nothing heavy: the
trainer needs no HTTP client for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from megatron_rlvr.config.schema import DataConfig, EvalConfig, RewardConfig, RolloutConfig


class RolloutError(RuntimeError):
    """Rollouts could not be generated; the message names the server or the process and the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are sampled."""

    temperature: float
    """0 is greedy; the log-probs of a greedy response are those at temperature 1."""
    top_p: float
    top_k: int
    """-1 is off."""
    max_tokens: int
    """Longest response, in tokens."""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceInfo:
    """What the rollout process found in its data."""

    num_train: int
    num_val: int
    num_dropped_prompts: int
    """Problems left out because their prompt is longer than ``data.max_prompt_tokens``."""
    eval_sets: dict[str, int]
    """Number of problems of every set of ``eval.sets``, by its key; a set with greedy answers beside sampled ones has
    two keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a step or an evaluation has come."""

    finished: int
    """Groups whose responses all have their verdict."""
    drawn: int
    """Groups begun so far; grows when dynamic sampling refills."""
    accepted: int
    """Groups that will enter a batch."""
    wanted: int
    """Groups the batch needs."""
    response_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """The process is at work, though there may be nothing to tell: sent every few seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """A warning of the rollout process, for the trainer's log; it stands in the process's own log as well."""

    text: str


class TroubleKind(str, Enum):
    """What is wrong with a server that the trainer can do something about."""

    stale = "stale"
    """It is up and holds other weights than the trainer's: a weight sync brings it back."""
    silent = "silent"
    """It takes requests and says nothing: its process has to be ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTrouble:
    """Told while responses are under way, and again while it lasts; `RolloutService.wait` hands it to the trainer."""

    url: str
    kind: TroubleKind
    reason: str
    at: float = field(default_factory=time.monotonic, compare=False)
    """Seconds of the clock that all processes of a machine share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Initialize:
    """First command: load the data, start the verifiers. Result: `ServiceInfo`, with the first state."""

    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig
    evaluation: EvalConfig
    tokenizer_path: str
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Connect:
    """Use these servers, each reached once before the answer. Result: None."""

    urls: tuple[str, ...]
    router_url: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class UseServers:
    """As `Connect` while responses are under way: taken up at once, and not answered."""

    urls: tuple[str, ...]
    router_url: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """Servers are held by a weight sync, or let go: taken up at once, and not answered."""

    held: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Result: `RolloutBatch`."""

    step: int
    policy_version: int
    """Completed optimizer steps of the weights the servers hold; a server that holds older ones is not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Result: `EvalBatch`."""

    policy_version: int
    max_problems: int | None = None
    """The first so many problems; None asks for all (of `eval.max_problems`)."""
    key: str | None = None
    """A set of `ServiceInfo.eval_sets`; None asks for the held-out problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadState:
    """Continue from the state of a checkpoint. Result: None."""

    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ping:
    """Result: the process id of the rollout process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Close:
    """Stop whatever is under way and exit. No answer but the end of the process."""


Command = Initialize | Connect | UseServers | Hold | Generate | Evaluate | LoadState | Ping | Close


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A command is done."""

    value: Any
    state: dict[str, Any] | None
    """State of data order and surplus groups after the command; None before `Initialize`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A command failed; the process lives on in the state before the command."""

    error: str
    """One line: what went wrong."""
    user_mistake: bool
    """Whether a setting, a data file or a checkpoint is to put right: a ValueError while loading them."""
    foreseen: bool
    """Whether the error says all there is to say, without the traceback."""
    traceback: str


Message = Progress | Heartbeat | Notice | ServerTrouble | Result | Failure
