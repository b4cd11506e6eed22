"""First-order entropy dynamics of a softmax policy (spec C1, C2, A8; Cui et al. 2505.22617 section 3 and appendix E).

All is for one state with tabular logits: what a change of logits does to H = -sum pi log pi, in nats. Changes by an
update are per unit of its step size eta. Shapes: V actions, N responses of a group, T tokens. Log-probs are
normalised natural logarithms; an action of probability 0 has log-prob -inf and takes part in nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NORMALISATION_TOLERANCE = 1e-4
"""Largest |sum pi - 1| taken for rounding (float32 log-probs of a large vocabulary)."""


def log_softmax(logits_V: ArrayLike) -> np.ndarray:
    """Log-probs float64 [V] of logits [V], -inf allowed for all but one."""
    logits = np.asarray(logits_V, np.float64)
    shifted = logits - logits.max()
    return shifted - math.log(float(np.exp(shifted).sum()))


def _policy(logprobs_V: ArrayLike) -> tuple[np.ndarray, np.ndarray, float]:
    """pi, log pi with 0 where pi is 0 (each use is weighted by pi there), and H."""
    logprobs = np.asarray(logprobs_V, np.float64)
    pi = np.exp(logprobs)
    if logprobs.ndim != 1 or not abs(float(pi.sum()) - 1.0) <= NORMALISATION_TOLERANCE:
        raise ValueError(f"logprobs_V must be one normalised distribution, got sum {pi.sum()} over {pi.shape}")
    logp = np.where(pi > 0, logprobs, 0.0)
    return pi, logp, -float(pi @ logp)


def _covariance(pi: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Cov over a ~ pi. Centred before multiplying: near-constant values would cancel otherwise."""
    return float(pi @ ((x - pi @ x) * (y - pi @ y)))


def _same_length(pi: np.ndarray, values: ArrayLike, *, name: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.shape != pi.shape:
        raise ValueError(f"{name} must have shape {list(pi.shape)} like logprobs_V, got {list(array.shape)}")
    return array


def entropy_gradient(logprobs_V: ArrayLike) -> np.ndarray:
    """dH/dz_j = -pi_j (log pi_j + H), float64 [V] (spec C1)."""
    pi, logp, entropy = _policy(logprobs_V)
    return -pi * (logp + entropy)


def entropy_change(logprobs_V: ArrayLike, logit_change_V: ArrayLike) -> float:
    """Lemma 1: dH = -Cov_{a ~ pi}(log pi(a), dz_a) in nats, for any small change dz [V] of the logits."""
    pi, logp, _ = _policy(logprobs_V)
    return -_covariance(pi, logp, _same_length(pi, logit_change_V, name="logit_change_V"))


def policy_gradient_change(logprobs_V: ArrayLike, advantages_V: ArrayLike, *, centred: bool = True) -> float:
    """Theorem 1: dH/d(eta) = -Cov(log pi, pi A) of the exact expected policy-gradient step.

    Args:
        advantages_V: float [V], advantage of each action.
        centred: Take E_pi[A] off first, as the true gradient does, which makes any baseline drop out (spec A8).
            False is the paper's formula as printed, which holds for E_pi[A] = 0.
    """
    pi, logp, _ = _policy(logprobs_V)
    advantages = _same_length(pi, advantages_V, name="advantages_V")
    if centred:
        advantages = advantages - pi @ advantages
    return -_covariance(pi, logp, pi * advantages)


def natural_gradient_change(logprobs_V: ArrayLike, advantages_V: ArrayLike) -> float:
    """Theorem 2: dH/d(eta) = -Cov(log pi, A) of the natural policy gradient, dz = eta A; needs no centring."""
    pi, logp, _ = _policy(logprobs_V)
    return -_covariance(pi, logp, _same_length(pi, advantages_V, name="advantages_V"))


def second_moment(logprobs_V: ArrayLike) -> float:
    """S2 = sum_a pi_a^2 (log pi_a + H) (spec C2)."""
    pi, logp, entropy = _policy(logprobs_V)
    return float(np.square(pi) @ (logp + entropy))


def token_coefficients(logprobs_T: ArrayLike, entropy_T: ArrayLike, second_moment_T: ArrayLike) -> np.ndarray:
    """s_y = S2 - pi_y (log pi_y + H) of sampled tokens, float64 [T] (spec C2).

    With weight A, the sampled token's own step eta A (e_y - pi) changes the entropy of its state by eta A s_y.

    Args:
        logprobs_T: log pi(y) of the sampled token at each position.
        entropy_T: H of the policy at the position, nats.
        second_moment_T: S2 of the policy at the position (`second_moment`).
    """
    logp, H, S2 = (np.asarray(values, np.float64) for values in (logprobs_T, entropy_T, second_moment_T))
    pi = np.exp(logp)
    return S2 - pi * (np.where(pi > 0, logp, 0.0) + H)


def token_coefficient_bound(entropy: ArrayLike) -> np.ndarray:
    """Bound of |s_y|: 1/e + H, float64 of the shape of `entropy` (nats) (spec C2)."""
    return 1.0 / math.e + np.asarray(entropy, np.float64)


def sampled_token_bound(entropy: ArrayLike, group_size: int) -> np.ndarray:
    """Bound of |dH/d(eta)| by one sampled token: sqrt(G) (1/e + H), as |A| <= sqrt(G) for QAE and GRPO with the sample
    std (spec C2)."""
    if group_size < 2:
        raise ValueError(f"group_size must be 2 or above, got {group_size}")
    return math.sqrt(group_size) * token_coefficient_bound(entropy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribution:
    """Predicted first-order change of the mean token entropy, dH/d(eta) in nats, by its sources (spec C3, P3).

    All parts are sums over their tokens divided by the number of all tokens, so that parts add up to the total.
    """

    total: float
    positive: float
    """From tokens with A > 0."""
    negative: float
    """From tokens with A < 0."""
    by_label: dict[str, float]
    """From tokens of each label, such as the regime of their group or their data source."""


def attribute(
    advantages_T: ArrayLike,
    coefficients_T: ArrayLike,
    weights_T: ArrayLike,
    labels_T: Sequence[str] | None = None,
) -> Attribution:
    """P3: mean over tokens of w A s, whole and split (spec C3).

    Args:
        advantages_T: float [T].
        coefficients_T: float [T] s_y of `token_coefficients`.
        weights_T: float [T] importance ratio where the token is not clipped, 0 where it is.
        labels_T: [T] a label a token; no split by label when None.
    """
    A, s, w = (np.asarray(values, np.float64) for values in (advantages_T, coefficients_T, weights_T))
    if A.ndim != 1 or len(A) == 0 or not A.shape == s.shape == w.shape:
        raise ValueError(f"advantages, coefficients and weights must be [T], got {A.shape}, {s.shape} and {w.shape}")
    effects = w * A * s / len(A)
    by_label: dict[str, float] = {}
    if labels_T is not None:
        labels = np.asarray(labels_T)
        if labels.shape != A.shape:
            raise ValueError(f"labels_T must have shape {list(A.shape)}, got {list(labels.shape)}")
        by_label = {str(label): float(effects[labels == label].sum()) for label in np.unique(labels)}
    return Attribution(
        total=float(effects.sum()),
        positive=float(effects[A > 0].sum()),
        negative=float(effects[A < 0].sum()),
        by_label=by_label,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCovariance:
    """P2: the bandit view of one group; minus it predicts the sign of dH (Cui et al. Eq 8-9)."""

    with_weighted_advantage: float
    """Cov(log pi(y), pi(y) A(y)) with pi(y) = exp(mean token log-prob): the paper's, as read in spec C1 (Theorem 1)."""
    with_advantage: float
    """Cov(log pi(y), A(y)) (Theorem 2)."""


def group_covariance(mean_logprobs_N: ArrayLike, advantages_N: ArrayLike) -> GroupCovariance:
    """Covariances (over N, not N - 1) of the responses of one prompt (spec C1, C3).

    Args:
        mean_logprobs_N: float [N] token mean of a response's log-probs, nats.
        advantages_N: float [N].
    """
    logp, A = np.asarray(mean_logprobs_N, np.float64), np.asarray(advantages_N, np.float64)
    if logp.ndim != 1 or len(logp) == 0 or logp.shape != A.shape:
        raise ValueError(f"mean_logprobs_N and advantages_N must be [N], got {logp.shape} and {A.shape}")
    equal = np.full(len(logp), 1.0 / len(logp))
    return GroupCovariance(
        with_weighted_advantage=_covariance(equal, logp, np.exp(logp) * A),
        with_advantage=_covariance(equal, logp, A),
    )


def surrogate_change(logprobs_V: ArrayLike, rewards_V: ArrayLike, baseline: float) -> float:
    """dH/d(eta) = -F(b) = -Cov(log pi, pi (r - b)) of the update dz = eta pi (r - b) (QAE 4.3 and A.2, spec A8).

    This is the surrogate that Prop 4.2 is stated for. The exact expected policy gradient does not depend on b
    (`policy_gradient_change`), so nothing here says that K moves the entropy of a run.
    """
    pi, _, _ = _policy(logprobs_V)
    rewards = _same_length(pi, rewards_V, name="rewards_V")
    return policy_gradient_change(logprobs_V, rewards - baseline, centred=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropySafety:
    """Prop 4.2 for one state with rewards 0 and 1: the quantile baseline and the explicit bounds (spec A8)."""

    baseline: int
    """b_K: 0 for p <= 1 - K (hard), 1 above (easy), p the policy's success probability."""
    change: float
    """Surrogate dH/d(eta) at b_K: the smallest over b in [0, 1] when hard, the largest when easy."""
    opposite_change: float
    """At the other end, 1 - b_K: the other extreme, for the change rises linearly with b."""
    lower: float
    """Explicit bounds of `change`: -H max(pi) p <= . <= p / e for b = 0, and
    -(1 - p) / e <= . <= H max(pi) (1 - p) for b = 1."""
    upper: float

    @property
    def holds(self) -> bool:
        """Whether extremality and both bounds are seen, up to rounding."""
        slack = 1e-12 * (1.0 + abs(self.lower) + abs(self.upper))
        extreme = self.change - self.opposite_change if self.baseline == 0 else self.opposite_change - self.change
        return extreme <= slack and self.lower - slack <= self.change <= self.upper + slack


def entropy_safety(logprobs_V: ArrayLike, rewards_V: ArrayLike, level: float) -> EntropySafety:
    """Prop 4.2's extremality and the explicit two-sided bounds for one policy (spec A8).

    Args:
        rewards_V: [V], each 0 or 1.
        level: K in (0, 1).

    Raises:
        ValueError: rewards other than 0 and 1, or K outside (0, 1).
    """
    pi, _, entropy = _policy(logprobs_V)
    rewards = _same_length(pi, rewards_V, name="rewards_V")
    if not np.isin(rewards, (0.0, 1.0)).all():
        raise ValueError(f"rewards_V must be 0 or 1, got {rewards[~np.isin(rewards, (0.0, 1.0))][0]}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    success = float(pi @ rewards)
    baseline = 0 if success <= 1 - level else 1
    side = success if baseline == 0 else 1.0 - success
    pull, push = entropy * float(pi.max()) * side, side / math.e
    return EntropySafety(
        baseline=baseline,
        change=surrogate_change(logprobs_V, rewards, baseline),
        opposite_change=surrogate_change(logprobs_V, rewards, 1 - baseline),
        lower=-pull if baseline == 0 else -push,
        upper=push if baseline == 0 else pull,
    )
