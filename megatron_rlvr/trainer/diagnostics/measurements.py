"""Costly measurements around an update: P3, P4 and M1 of spec C3, and tokens for the report's map.

They change nothing in the run: weights, optimizer, random numbers and the update's own log-probs stay what they were.
T packed tokens.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_rlvr import ops
from megatron_rlvr.config.schema import DiagnosticsConfig
from megatron_rlvr.data.packing import split_by_label, unpack_responses
from megatron_rlvr.metrics import Max, Mean, Metric, Sum
from megatron_rlvr.policy.first_order import WeightStep
from megatron_rlvr.policy.forward import TokenLoss
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.trainer.diagnostics.look import Look
from megatron_rlvr.trainer.update.batch import UpdateBatch, pack_sequences
from megatron_rlvr.trainer.update.selection import JoinedTokens
from megatron_rlvr.types import MicroBatch


@dataclass(kw_only=True, slots=True)
class TokenRecord:
    """One response, token by token; R response tokens."""

    update: int
    trajectory: int
    logprobs: list[float]
    """[R] nats, before the updates."""
    covariance: list[float]
    """[R] (log pi - mean log pi)(A - mean A) over the rollout batch (spec B1)."""
    selected: list[bool]
    """[R] what Clip-Cov or KL-Cov acted on; all false under other losses."""
    entropy: list[float]
    """[R] nats, when its update began; empty where the update left the response out."""


@dataclass(kw_only=True, slots=True)
class Findings:
    """What the diagnostics of one step found."""

    metrics: dict[str, Metric]
    """This rank's part; merge over ranks that hold logits and have tensor rank 0."""
    tokens: list[TokenRecord]
    """Of this rank's responses that are watched, or in which most tokens were selected."""


class Diagnostics:
    """Measures around the updates of a step; every method is collective over the trainer's ranks.

    Example:
        >>> diagnostics.start(look)            # before the step's updates; None where it is not a step to look at
        >>> updater.run(updates)               # calls `before_update`
        >>> findings = diagnostics.finish(updates)
    """

    def __init__(
        self, policy: Policy, parallel: ParallelContext, *, config: DiagnosticsConfig, temperature: float
    ) -> None:
        self.policy = policy
        self.parallel = parallel
        self.config = config
        self.temperature = temperature
        self.seconds_in_update = 0.0
        """Spent by `before_update` on this step, which others would book as training."""
        self._look: Look | None = None
        self._step: WeightStep | None = None
        self._effects: dict[str, float] = {}
        self._bound_use = -math.inf
        self._num_updates = 0
        self._entropy: dict[int, torch.Tensor] = {}
        """[T] nats of the updates' micro-batches (by `id`; the step keeps them alive), when their update began."""

    def is_due(self, step: int) -> bool:
        """Whether the costly measurements are made in this rollout step."""
        return self.config.every > 0 and step % self.config.every == 0

    def start(self, look: Look | None) -> None:
        """Keeps the weights that the step starts from."""
        self._look = look
        self.seconds_in_update = 0.0
        self._effects, self._bound_use, self._num_updates = defaultdict(float), -math.inf, 0
        self._entropy = {}
        self._step = WeightStep(self.policy) if look is not None and look.probes else None

    def before_update(self, micro_batches: Sequence[MicroBatch], token_loss: TokenLoss) -> None:
        """P3: what the next optimizer step does to the entropy of its own tokens, by the tabular first order.

        A token's weight is the loss's own derivative by its log-prob: w A / N for PPO with token-mean, 0 where the
        ratio is clipped, and whatever another loss makes of it. One forward pass without gradient.
        """
        if self._look is None:
            return
        started = time.monotonic()
        self._num_updates += 1
        every = self.policy.runner.moments(micro_batches, temperature=self.temperature)
        for micro, moments in zip(micro_batches, every, strict=False):
            self._book(micro, moments, _derivative(token_loss, micro, moments))
            self._entropy[id(micro)] = moments.entropy_T
        self.seconds_in_update += time.monotonic() - started

    def _book(self, micro: MicroBatch, moments: ops.VocabMoments, derivative_T: torch.Tensor) -> None:
        logprobs_T, entropy_T = moments.logprobs_T.double(), moments.entropy_T.double()
        # s_y = S2 - pi_y (log pi_y + H), at most 1/e + H in size (spec C2).
        coefficient_T = moments.sum_p2_logp_T - logprobs_T.exp() * (logprobs_T + entropy_T)
        bound_T = entropy_T + 1.0 / math.e
        zeros_T = torch.zeros_like(coefficient_T)
        effect_T = torch.where(micro.loss_mask_T, -derivative_T.double() * coefficient_T, zeros_T)
        most_T = torch.where(micro.loss_mask_T, derivative_T.double().abs() * bound_T, zeros_T)
        parts = {
            "": effect_T.sum(),
            "/positive": effect_T[micro.advantages_T > 0].sum(),
            "/negative": effect_T[micro.advantages_T < 0].sum(),
            "_bound": most_T.sum(),
        }
        by_regime = split_by_label(effect_T, micro, micro.regimes)
        by_source = split_by_label(effect_T, micro, micro.sources)
        parts |= {f"/{name}": values.sum() for name, values in by_regime.items() if name}
        parts |= {f"/source/{name}": values.sum() for name, values in by_source.items() if name}
        for name, value in parts.items():
            self._effects[name] += float(value)
        if micro.loss_mask_T.any():
            use = (coefficient_T.abs() / bound_T)[micro.loss_mask_T].max()
            self._bound_use = max(self._bound_use, float(use))

    def finish(self, updates: Sequence[UpdateBatch]) -> Findings:
        """P4 and M1 on the probe, and the watched tokens, after the step's updates."""
        if self._look is None:
            return Findings(metrics={}, tokens=[])
        metrics = self._attribution_metrics() | self._probe_metrics()
        tokens = self._token_records(updates)
        self._look, self._entropy = None, {}
        return Findings(metrics=metrics, tokens=tokens)

    def _attribution_metrics(self) -> dict[str, Metric]:
        if not self.parallel.ranks.is_last_stage:
            return {}
        # Every update's weights add up to one; the mean over updates compares with one of them.
        metrics: dict[str, Metric] = {
            f"dynamics/p3{name}": Sum(value / self._num_updates) for name, value in self._effects.items()
        }
        if math.isfinite(self._bound_use):
            metrics["dynamics/p3_coefficient_use_max"] = Max(self._bound_use)
        return metrics

    def _probe_metrics(self) -> dict[str, Metric]:
        assert self._look is not None
        if self._step is None:
            return {}
        shares = self._look.probes
        pad = self.parallel.ranks.tp_size if self.parallel.config.sequence_parallel else 1
        packed = [pack_sequences(s.micro_batches, pad_to_multiple=pad, device=self.policy.device) for s in shares]
        found = self._step.first_order(packed, [s.num_tokens for s in shares], temperature=self.temperature)
        after = self.policy.logprobs(
            [m for micro_batches in packed for m in micro_batches], temperature=self.temperature
        )
        self._step = None
        total = sum(share.num_tokens for share in shares)
        change = sum(share.num_tokens * first.change for share, first in zip(shares, found, strict=True)) / total
        metrics: dict[str, Metric] = {"dynamics/p4": Max(change), "dynamics/probe_tokens": Max(float(total))}
        remaining = iter(after.entropy)
        moved_all = Mean(0.0, 0.0)
        for share, micro_batches, first in zip(shares, packed, found, strict=True):
            moved = Mean(0.0, 0.0)
            for micro, before_T in zip(micro_batches, first.before.entropy, strict=False):
                difference_T = (next(remaining).double() - before_T.double())[micro.loss_mask_T]
                moved = moved.merge(Mean(float(difference_T.sum()), float(difference_T.numel())))
            moved_all = moved_all.merge(moved)
            metrics[f"dynamics/m1/source/{share.source}"] = moved
            metrics[f"dynamics/p4/source/{share.source}"] = Max(first.change)
        metrics["dynamics/m1"] = moved_all
        return metrics

    def _token_records(self, updates: Sequence[UpdateBatch]) -> list[TokenRecord]:
        """Watched responses of this rank, and those of its responses in which most tokens were selected."""
        assert self._look is not None
        ranks = self.parallel.ranks
        if not ranks.is_last_stage or not self.config.token_samples:
            return []
        placed = [
            (u, micro)
            for u, update in enumerate(updates)
            for micro in (*update.micro_batches, *update.probed, *update.idle)
        ]
        join = JoinedTokens.of([micro for _, micro in placed])
        covariance = ops.token_covariance(
            join.old_logprobs_T,
            join.advantages_T,
            join.mask_T,
            group=self.parallel.dp_group if ranks.dp_size > 1 else None,
        )
        wanted = {*self._look.watched, *_most_selected(placed, self.config.token_samples)}
        pieces = covariance.cov_T.split([micro.num_tokens for _, micro in placed])
        return [
            record
            for (update, micro), cov_T in zip(placed, pieces, strict=True)
            for record in self._records_of(update, micro, cov_T, {t for u, t in wanted if u == update})
        ]

    def _records_of(
        self, update: int, micro: MicroBatch, cov_T: torch.Tensor, wanted: Collection[int]
    ) -> Iterator[TokenRecord]:
        if not wanted or not bool(torch.isin(micro.trajectory_T, torch.tensor([*wanted]).to(cov_T.device)).any()):
            return
        assert micro.old_logprobs_T is not None
        selected_T = micro.selected_T if micro.selected_T is not None else torch.zeros_like(micro.loss_mask_T)
        entropy_T = self._entropy.get(id(micro))
        logprobs, selected = unpack_responses(micro.old_logprobs_T, micro), unpack_responses(selected_T, micro)
        entropy = {} if entropy_T is None else unpack_responses(entropy_T, micro)
        for trajectory, cov in unpack_responses(cov_T, micro).items():
            if trajectory in wanted:
                yield TokenRecord(
                    update=update,
                    trajectory=trajectory,
                    logprobs=logprobs[trajectory].tolist(),
                    covariance=cov.tolist(),
                    selected=selected[trajectory].tolist(),
                    entropy=entropy[trajectory].tolist() if entropy else [],
                )


def _most_selected(placed: Sequence[tuple[int, MicroBatch]], count: int) -> list[tuple[int, int]]:
    """(update, trajectory) of up to `count` responses, those with the most selected tokens first."""
    found: list[tuple[int, int, int]] = []
    for update, micro in placed:
        if micro.selected_T is not None:
            trajectories, counts = micro.trajectory_T[micro.selected_T].unique(return_counts=True)
            found += [(-c, update, t) for c, t in zip(counts.tolist(), trajectories.tolist(), strict=True)]
    return [(update, trajectory) for _, update, trajectory in sorted(found)[:count]]


def _derivative(token_loss: TokenLoss, micro: MicroBatch, moments: ops.VocabMoments) -> torch.Tensor:
    """Derivative of the summed loss by every token's log-prob, [T]."""
    leaf_T = moments.logprobs_T.detach().clone().requires_grad_()
    # A copy: the loss notes log-probs on the micro-batch, which belong to the update's own pass.
    with torch.enable_grad():
        value, _ = token_loss(leaf_T, moments.entropy_T, replace(micro))
    if not value.requires_grad:
        return torch.zeros_like(leaf_T)
    [gradient_T] = torch.autograd.grad(value, [leaf_T], allow_unused=True)
    return torch.zeros_like(leaf_T) if gradient_T is None else gradient_T
