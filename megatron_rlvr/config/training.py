"""The course of a run: steps, evaluation, warm start, logging."""

from dataclasses import dataclass
from enum import Enum


class Elision(Enum):
    """Responses with zero advantage in the update: left out where that is exact, never, or always."""

    auto = "auto"
    never = "never"
    always = "always"


class SharedPrompts(Enum):
    """A prompt's tokens in the update: once for all responses of its group where that is possible, never, or always."""

    auto = "auto"
    never = "never"
    always = "always"


class Console(Enum):
    auto = "auto"
    rich = "rich"
    plain = "plain"


class OpsBackend(Enum):
    native = "native"
    reference = "reference"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    enabled: bool = True
    """False: steps only generate rollouts (record them with rollout.record=true); there is no policy in the trainer."""
    steps: int = 100
    """Rollout steps."""
    seed: int = 0
    updates_per_rollout: int = 1
    """Optimizer steps per rollout batch; prompts_per_step must be divisible by it."""
    max_tokens_per_microbatch: int = 16384
    elide_zero_advantage: Elision = Elision.auto
    """A response whose advantage is exactly 0 has no gradient of its own. auto: it stays out of the update wherever the
    gradient remains that of the whole batch. always: refused where it does not; Clip-Cov and KL-Cov then take the
    engine's log-probs of such responses into their means instead of the trainer's."""
    elided_metrics_share: float = 0.1
    """Share of the elided responses that go through a forward pass without gradient for entropy and mismatch, weighted
    to stand for all of them. 1: all; 0: none, and those metrics are of the other responses alone."""
    share_prompts: SharedPrompts = SharedPrompts.auto
    """The responses of a group share one computation of their prompt, forward and backward: the same gradient, to
    rounding, for fewer tokens. auto: where attention is this project's (not transformer-engine's) and it pays; always:
    refused where it cannot be."""
    max_bad_updates: int = 5
    """Updates in a row whose loss or gradient is not finite (each is skipped and counted) before the run stops."""
    save_hf: bool = True
    """Write the trained policy as a Hugging Face folder at the end."""


@dataclass(kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised warm start on the same tasks, cached, before the reinforcement learning begins."""

    enabled: bool = False
    max_steps: int = 2000
    batch_size: int = 64
    lr: float = 2e-3
    target_accuracy: float = 0.25
    """Greedy accuracy on held-out problems at which it stops."""
    check_every: int = 50
    check_problems: int = 64
    cache_dir: str = "outputs/warm_start"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    console: Console = Console.auto
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str | None = None
    samples_per_step: int = 4
    """Rollouts written as text each step."""


@dataclass(kw_only=True, slots=True)
class OpsConfig:
    backend: OpsBackend = OpsBackend.native
