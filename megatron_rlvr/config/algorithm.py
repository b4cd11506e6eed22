"""Advantages and losses."""

from dataclasses import dataclass, field
from enum import Enum

from megatron_rlvr.config.control import KScheduleConfig, SourceLevel


class Quantile(Enum):
    inf = "inf"
    linear = "linear"


class Std(Enum):
    sample = "sample"
    population = "population"
    none = "none"


class GateOn(Enum):
    correctness = "correctness"
    reward = "reward"


class QaeMask(Enum):
    """Which (regime, sign) pairs keep their advantage (spec A7)."""

    qae = "qae"
    pos_mask = "pos_mask"
    neg_mask = "neg_mask"
    none = "none"


class CovScope(Enum):
    minibatch = "minibatch"
    micro = "micro"


class CovLogp(Enum):
    old = "old"
    current = "current"


class KlKind(Enum):
    abs = "abs"
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    estimator: str = "qae"
    """qae, grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, psr, nsr, w_reinforce, gpg, opo, or a path
    ``pkg.mod:obj``."""
    K: str = "0.4"
    """Quantile level of QAE in (0, 1), a decimal or ``p/q``."""
    quantile: Quantile = Quantile.inf
    std: Std = Std.sample
    eps: float = 1e-6
    gate_on: GateOn = GateOn.correctness
    penalty_additive: bool = True
    mask: QaeMask = QaeMask.qae
    K_schedule: KScheduleConfig = field(default_factory=KScheduleConfig)
    K_by_source: list[SourceLevel] = field(default_factory=list)
    """Levels of data sources that have their own; the others take `K` and its schedule."""
    K_dither: bool = False
    """Draw each group's rank from floor(K G) and the next, so that its mean is K G."""
    gate_memory: str = "0"
    """Share in [0, 1) of a prompt's earlier counts of right and wrong that its next gate still counts; "0" gates each
    group on itself alone. Smooths the flips of small groups on prompts that come back."""
    positive_weight: float = 0.1
    """w_reinforce: advantage of right answers; wrong ones have -1."""


@dataclass(kw_only=True, slots=True)
class ClipCovConfig:
    ratio: str = "2e-4"
    lower: float = 1.0
    """Bounds of the covariance of tokens that may be drawn, both exclusive."""
    upper: float = 5.0
    relative_bounds: bool = False
    """Bounds count in means of the positive covariances of the optimizer step instead of in nats, free of the scale of
    advantages."""
    eps_low: float = 1.0
    eps_high: float = 1.0


@dataclass(kw_only=True, slots=True)
class KlCovConfig:
    ratio: str = "2e-3"
    beta: float = 1.0
    kl: KlKind = KlKind.abs
    skip_zero_advantage: bool = False
    """Never select a token of zero advantage (a deviation from the paper, whose penalty falls on them too); they still
    count in N and in the means."""


@dataclass(kw_only=True, slots=True)
class GspoConfig:
    eps_low: float = 3e-4
    eps_high: float = 4e-4


@dataclass(kw_only=True, slots=True)
class CispoConfig:
    eps_low: float = 1.0
    """1: no lower bound of the weight."""
    eps_high: float = 0.28


class RatioLevel(Enum):
    """Over what the ratio pi_old / pi_engine of the trainer's and the engine's probabilities is taken."""

    none = "none"
    token = "token"
    sequence = "sequence"
    """Product over the response."""
    geometric = "geometric"
    """Geometric mean over the response."""


@dataclass(kw_only=True, slots=True)
class MismatchConfig:
    """Corrections of the trainer-engine mismatch; constants to the gradient, denominators stay those of all tokens.

    weight=token is truncated importance sampling, reject alone masks, both together are masked importance sampling.
    """

    weight: RatioLevel = RatioLevel.none
    """Multiply the loss by min(ratio, cap)."""
    cap: float | None = 2.0
    """null: no truncation (with `reject`, which then bounds the ratio)."""
    reject: RatioLevel = RatioLevel.none
    """Take tokens (or whole responses) out whose ratio is outside [lower, upper]."""
    lower: float = 0.5
    upper: float = 2.0


@dataclass(kw_only=True, slots=True)
class LossConfig:
    name: str = "ppo"
    """ppo, clip_cov, kl_cov, gspo, cispo, or a path ``pkg.mod:obj``."""
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None
    """c > 1 bounds the loss of negative advantages; null is off."""
    logratio_clamp: float = 20.0
    aggregation: str = "token-mean"
    """token-mean, seq-mean-token-sum, seq-mean-token-mean or seq-mean-token-sum-norm, with global denominators."""
    clip_cov: ClipCovConfig = field(default_factory=ClipCovConfig)
    kl_cov: KlCovConfig = field(default_factory=KlCovConfig)
    gspo: GspoConfig = field(default_factory=GspoConfig)
    cispo: CispoConfig = field(default_factory=CispoConfig)
    cov_mass: float | None = None
    """Select as many tokens as the largest covariances need to hold this share of all positive covariance, instead of
    a share of the tokens; free of the scale of advantages. `ratio` of the method then is the upper bound."""
    cov_scope: CovScope = CovScope.minibatch
    cov_logp: CovLogp = CovLogp.old
    kl_coef: float = 0.0
    """KL to the frozen reference model."""
    kl_kind: KlKind = KlKind.k3
    entropy_coef: float = 0.0
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
