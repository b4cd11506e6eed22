"""What a rollout batch alone says about the entropy to come: P1 and P2 and Prop 4.2, free of any pass (spec C3, A8).

All of it is the bandit view: a response is one action, its log-prob is the mean over its tokens of what the engine
gave at sampling, which is the policy of the step's start wherever sampling is on policy. N responses of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from megatron_rlvr.advantage.regime import DEGENERATE, HARD, group_regime
from megatron_rlvr.entropy.dynamics import entropy_safety, group_covariance, log_softmax
from megatron_rlvr.metrics import Mean, Metric
from megatron_rlvr.types import Rollout, RolloutGroup

ACCURACY_BUCKETS = ((0.25, "0_25"), (0.5, "25_50"), (0.75, "50_75"), (1.0, "75_100"))
"""Groups that are neither all right nor all wrong, by the upper end of their accuracy (per cent in the name)."""


def group_dynamics(groups: Sequence[RolloutGroup], advantages: Sequence[np.ndarray]) -> dict[str, Metric]:
    """Covariance predictors of the batch.

    Args:
        groups: scored groups.
        advantages: float [N] of every group, 0 for aborted responses.

    Returns:
        ``dynamics/p2``, minus the mean over groups of Cov(log pi, pi A) (Cui et al. Eq 8-9), also
        ``/source/<name>`` and, of mixed groups, ``/accuracy_<from>_<to>``; ``dynamics/p2_natural`` with Cov(log pi, A);
        ``dynamics/p1/source/<name>``, minus the token covariance inside one data source.
    """
    sums: dict[str, list[float]] = defaultdict(list)
    responses: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for group, advantage_G in zip(groups, advantages, strict=True):
        chosen = [(r, float(a)) for r, a in zip(group.rollouts, advantage_G, strict=True) if r.valid]
        source = group.prompt.data_source
        responses[source] += [
            (len(r.response_ids), float(r.rollout_logprobs.sum(dtype=np.float64)), a) for r, a in chosen
        ]
        if len(chosen) < 2:
            continue
        covariance = group_covariance(_mean_logprobs([r for r, _ in chosen]), [a for _, a in chosen])
        values = ["dynamics/p2", f"dynamics/p2/source/{source}"]
        if group.mixed:
            accuracy = float(np.mean([r.correctness > 0.5 for r, _ in chosen]))
            bucket = next(name for upper, name in ACCURACY_BUCKETS if accuracy <= upper)
            values.append(f"dynamics/p2/accuracy_{bucket}")
        for name in values:
            sums[name].append(-covariance.with_weighted_advantage)
        sums["dynamics/p2_natural"].append(-covariance.with_advantage)
    metrics: dict[str, Metric] = {name: Mean(float(np.sum(v)), float(len(v))) for name, v in sums.items()}
    for source, parts in responses.items():
        if parts:
            metrics[f"dynamics/p1/source/{source}"] = _minus_token_covariance(*zip(*parts, strict=True))
    return metrics


def _minus_token_covariance(lengths: Sequence[int], sums: Sequence[float], advantages: Sequence[float]) -> Mean:
    """Minus the covariance over tokens of log-prob and advantage, from the responses' sums: A is one number each."""
    length_N, sum_N, advantage_N = (np.asarray(values, np.float64) for values in (lengths, sums, advantages))
    count = float(length_N.sum())
    centred_N = advantage_N - float(length_N @ advantage_N) / count
    # The mean log-prob times the centred advantages adds up to nothing.
    return Mean(-float(sum_N @ centred_N), count)


def safety_metrics(groups: Sequence[RolloutGroup], levels: Mapping[str, Fraction]) -> dict[str, Metric]:
    """Prop 4.2 and the explicit bounds on every mixed group's own policy: its distinct responses, renormalised.

    This is about the surrogate that the proposition is stated for (spec A8); a step's entropy is not bounded by it.

    Args:
        levels: K of every data source.

    Returns:
        ``safety/holds`` (share of groups in which extremality and bounds are seen), means of ``safety/change``,
        ``safety/opposite_change``, ``safety/lower``, ``safety/upper`` (nats per unit step), and
        ``safety/regime_agrees``: share of groups whose counted regime is that of the policy's success probability.
    """
    sums: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        level = levels[group.prompt.data_source]
        regime = group_regime(group, level)
        if regime == DEGENERATE:
            continue
        # Sampled twice, an action is still one.
        distinct = {r.response_ids.tobytes(): r for r in group.rollouts if r.valid}
        rollouts = list(distinct.values())
        correct = [float(r.correctness > 0.5) for r in rollouts]
        found = entropy_safety(log_softmax(_mean_logprobs(rollouts)), correct, float(level))
        sums["safety/holds"].append(float(found.holds))
        sums["safety/regime_agrees"].append(float((found.baseline == 0) == (regime == HARD)))
        for name in ("change", "opposite_change", "lower", "upper"):
            sums[f"safety/{name}"].append(getattr(found, name))
    return {name: Mean(float(np.sum(v)), float(len(v))) for name, v in sums.items()}


def _mean_logprobs(rollouts: Sequence[Rollout]) -> np.ndarray:
    return np.array([np.mean(r.rollout_logprobs, dtype=np.float64) for r in rollouts])
