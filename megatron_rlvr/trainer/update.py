"""The optimizer steps on one rollout batch: old log-probs, token selection, loss, update.

T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rlvr import loss as losses
from megatron_rlvr import ops
from megatron_rlvr.config.schema import CovLogp, CovScope, LossConfig, OptimConfig
from megatron_rlvr.loss.kl import reference_kl
from megatron_rlvr.metrics import Max, Mean, Metric, Sum, merge
from megatron_rlvr.policy.optimizer import UpdateResult, learning_rate
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import LogprobPass, Policy
from megatron_rlvr.trainer.batch import UpdateBatch
from megatron_rlvr.types import MicroBatch

COVARIANCE_LOSSES = ("clip_cov", "kl_cov")


@dataclass(kw_only=True, slots=True)
class UpdateOutcome:
    """What the optimizer steps on one rollout batch did."""

    metrics: dict[str, Metric]
    """This rank's part; merge over ranks that hold logits and have tensor rank 0."""
    results: list[UpdateResult]


class Updater:
    """Trains the policy on rollout batches; every method is collective over the trainer's ranks.

    Args:
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        reference: frozen model for the KL term, None where `loss.kl_coef` is 0.
    """

    def __init__(
        self,
        policy: Policy,
        parallel: ParallelContext,
        *,
        loss: LossConfig,
        optim: OptimConfig,
        temperature: float,
        seed: int,
        total_updates: int,
        reference: Policy | None = None,
    ) -> None:
        self.policy = policy
        self.parallel = parallel
        self.loss = loss
        self.optim = optim
        self.temperature = temperature
        self.seed = seed
        self.total_updates = total_updates
        self.reference = reference
        self.policy_loss = losses.LOSSES.get(loss.name)
        self.num_updates = 0
        """Completed optimizer steps (skipped ones included)."""
        self._current: list[torch.Tensor] = []
        """Current log-probs of the optimizer step under way, micro-batch by micro-batch, for the overlap metric."""

    def run(self, updates: Sequence[UpdateBatch]) -> UpdateOutcome:
        """One optimizer step for every entry of `updates` (this rank's part of it)."""
        every = [micro for update in updates for micro in update.micro_batches]
        idle = [micro for update in updates for micro in update.idle]
        assert not (idle and self._needs_all_tokens(len(updates))), "zero advantages are elided where that is exact"
        # With a single update old and current log-probs are the same numbers: the loss pass gives both.
        separate_pass = len(updates) > 1 or self._selects_globally
        parts: list[dict[str, Metric]] = [self._look_at(idle)] if idle else []
        if separate_pass:
            before = self.policy.logprobs(every, temperature=self.temperature)
            for micro, logprobs_T in zip(every, before.logprobs, strict=False):
                micro.old_logprobs_T = logprobs_T
            parts.append(self._pass_metrics(every, before))
        if self.reference is not None:
            frozen = self.reference.logprobs(every, temperature=self.temperature)
            for micro, logprobs_T in zip(every, frozen.logprobs, strict=False):
                micro.ref_logprobs_T = logprobs_T
        results = []
        for micro_batches in [update.micro_batches for update in updates]:
            self._current = []
            if self._selects_globally:
                self._select(micro_batches)
            lr = learning_rate(self.optim, self.num_updates, self.total_updates)
            metrics, result = self.policy.update(
                micro_batches,
                lambda *args: self._token_loss(*args, with_pass_metrics=not separate_pass),
                lr=lr,
                temperature=self.temperature,
            )
            if self._selects_globally and self.loss.cov_logp is CovLogp.old:
                parts.append(self._overlap_metrics(micro_batches))
            self.num_updates += 1
            parts.append(metrics)
            results.append(result)
        if not separate_pass and self.parallel.ranks.is_last_stage:
            parts.append(self._covariance_metrics([*every, *idle]))
        parts.append(_saved_metrics(every, idle))
        return UpdateOutcome(metrics=merge(parts), results=results)

    def _needs_all_tokens(self, num_updates: int) -> bool:
        return num_updates > 1 or self._selects_globally or self.reference is not None or self.loss.entropy_coef != 0.0

    def _look_at(self, idle: Sequence[MicroBatch]) -> dict[str, Metric]:
        """A pass without gradient over responses that the update leaves out: entropy and mismatch count them."""
        once = self.policy.logprobs(idle, temperature=self.temperature)
        for micro, logprobs_T in zip(idle, once.logprobs, strict=False):
            micro.old_logprobs_T = logprobs_T
        if not self.parallel.ranks.is_last_stage:
            return {}
        return _mismatch_metrics(idle, once) | _entropy_metrics(idle, once)

    @property
    def _selects_globally(self) -> bool:
        return self.loss.name in COVARIANCE_LOSSES and self.loss.cov_scope is CovScope.minibatch

    def _token_loss(
        self,
        logprobs_T: torch.Tensor,
        entropy_T: torch.Tensor,
        micro: MicroBatch,
        *,
        with_pass_metrics: bool,
    ) -> tuple[torch.Tensor, dict[str, Metric]]:
        """Sum over tokens of weight x (policy loss + KL term - entropy bonus), and its metrics."""
        current_T = logprobs_T.detach()
        metrics: dict[str, Metric] = {}
        self._current.append(current_T)
        if micro.old_logprobs_T is None:
            micro.old_logprobs_T = current_T
        if with_pass_metrics:
            once = LogprobPass(logprobs=[current_T], entropy=[entropy_T.detach()])
            metrics |= _mismatch_metrics([micro], once) | _entropy_metrics([micro], once)
        selected_T = micro.selected_T
        if self.loss.name in COVARIANCE_LOSSES and selected_T is None:
            selected_T = self._select_in(micro, current_T)
        loss_T, loss_metrics = self.policy_loss(
            logprobs_T,
            micro.old_logprobs_T,
            micro.advantages_T,
            micro.loss_mask_T,
            selected_T=selected_T,
            config=self.loss,
        )
        metrics |= loss_metrics
        weights_T = micro.weights_T.double()
        metrics["loss/policy"] = Sum(float((loss_T.detach().double() * weights_T).sum()))
        if micro.ref_logprobs_T is not None:
            kl_T = reference_kl(logprobs_T, micro.ref_logprobs_T, micro.loss_mask_T, kind=self.loss.kl_kind.value)
            metrics["kl/reference_mean"] = _mean(kl_T.detach(), micro.loss_mask_T)
            loss_T = loss_T + self.loss.kl_coef * kl_T
        if self.loss.entropy_coef != 0.0:
            loss_T = loss_T - self.loss.entropy_coef * torch.where(micro.loss_mask_T, entropy_T, 0.0)
        return (loss_T.double() * weights_T).sum(), metrics

    def _select(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Fixes the selected tokens of one optimizer step, over all its micro-batches and data-parallel ranks."""
        current: Sequence[torch.Tensor] = []
        if self.loss.cov_logp is CovLogp.current:
            current = self.policy.logprobs(micro_batches, temperature=self.temperature).logprobs
        if not self.parallel.ranks.is_last_stage:
            return
        old_T = torch.cat([micro.old_logprobs_T for micro in micro_batches if micro.old_logprobs_T is not None])
        logprobs_T = torch.cat(list(current)) if current else old_T
        join = _Joined.of(micro_batches)
        clipped_T = self._ratio_clipped(logprobs_T, old_T, join) if current else None
        selected_T = self._choose(logprobs_T, join, ratio_clipped_T=clipped_T, everywhere=True)
        sizes = [micro.num_tokens for micro in micro_batches]
        for micro, part in zip(micro_batches, selected_T.split(sizes), strict=True):
            micro.selected_T = part

    def _overlap_metrics(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Metric]:
        """Share of the tokens selected by old log-probs that current ones would have selected too (spec B5.2).

        Free of extra passes: the loss has just seen the current log-probs of every micro-batch.
        """
        if not self.parallel.ranks.is_last_stage:
            return {}
        join = _Joined.of(micro_batches)
        old_T = torch.cat([micro.old_logprobs_T for micro in micro_batches if micro.old_logprobs_T is not None])
        selected_T = torch.cat([micro.selected_T for micro in micro_batches if micro.selected_T is not None])
        current_T = torch.cat(self._current)
        clipped_T = self._ratio_clipped(current_T, old_T, join)
        would_T = self._choose(current_T, join, ratio_clipped_T=clipped_T, everywhere=True)
        return {"cov/selected_overlap_current": Mean(float((selected_T & would_T).sum()), float(selected_T.sum()))}

    def _select_in(self, micro: MicroBatch, current_T: torch.Tensor) -> torch.Tensor:
        """The papers' code: means, count and draw inside one micro-batch, from the current log-probs."""
        assert micro.old_logprobs_T is not None
        join = _Joined.of([micro])
        clipped_T = self._ratio_clipped(current_T, micro.old_logprobs_T, join)
        return self._choose(current_T, join, ratio_clipped_T=clipped_T, everywhere=False)

    def _ratio_clipped(self, logprobs_T: torch.Tensor, old_T: torch.Tensor, join: _Joined) -> torch.Tensor | None:
        if self.loss.name != "clip_cov":
            return None
        options = self.loss.clip_cov
        return ops.ratio_clipped(
            logprobs_T,
            old_T,
            join.advantages_T,
            join.mask_T,
            eps_low=options.eps_low,
            eps_high=options.eps_high,
            logratio_clamp=self.loss.logratio_clamp,
        )

    def _choose(
        self, logprobs_T: torch.Tensor, join: _Joined, *, ratio_clipped_T: torch.Tensor | None, everywhere: bool
    ) -> torch.Tensor:
        clip = self.loss.name == "clip_cov"
        extra = {"lower": self.loss.clip_cov.lower, "upper": self.loss.clip_cov.upper} if clip else {}
        return ops.select_tokens(
            logprobs_T,
            join.advantages_T,
            join.mask_T,
            method=self.loss.name,
            ratio=self.loss.clip_cov.ratio if clip else self.loss.kl_cov.ratio,
            ratio_clipped_T=ratio_clipped_T,
            trajectory_T=join.trajectory_T,
            position_T=join.position_T,
            seed=self.seed,
            step=self.num_updates,
            group=self._dp_group if everywhere else None,
            **extra,
        )

    @property
    def _dp_group(self):
        return self.parallel.dp_group if self.parallel.ranks.dp_size > 1 else None

    def _pass_metrics(self, micro_batches: Sequence[MicroBatch], once: LogprobPass) -> dict[str, Metric]:
        if not self.parallel.ranks.is_last_stage:
            return {}
        metrics = _mismatch_metrics(micro_batches, once) | _entropy_metrics(micro_batches, once)
        return metrics | self._covariance_metrics(micro_batches)

    def _covariance_metrics(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Metric]:
        """Batch covariance of log-prob and advantage over all response tokens (spec B1), collective over DP."""
        join = _Joined.of(micro_batches)
        old_T = torch.cat([micro.old_logprobs_T for micro in micro_batches if micro.old_logprobs_T is not None])
        covariance = ops.token_covariance(old_T, join.advantages_T, join.mask_T, group=self._dp_group)
        masked = covariance.cov_T[join.mask_T]
        metrics: dict[str, Metric] = {"cov/mean": _mean(covariance.cov_T, join.mask_T)}
        if masked.numel():
            metrics["cov/max"] = Max(float(masked.max()))
        return metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class _Joined:
    """Several micro-batches end to end."""

    advantages_T: torch.Tensor
    mask_T: torch.Tensor
    trajectory_T: torch.Tensor
    position_T: torch.Tensor

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> _Joined:
        return cls(
            advantages_T=torch.cat([micro.advantages_T for micro in micro_batches]),
            mask_T=torch.cat([micro.loss_mask_T for micro in micro_batches]),
            trajectory_T=torch.cat([micro.trajectory_T for micro in micro_batches]),
            position_T=torch.cat([micro.response_position_T for micro in micro_batches]),
        )


def _saved_metrics(kept: Sequence[MicroBatch], idle: Sequence[MicroBatch]) -> dict[str, Metric]:
    """Share of the packed tokens that had no backward pass."""
    saved, used = (float(sum(micro.num_tokens for micro in part)) for part in (idle, kept))
    return {"update/elided_fraction": Mean(saved, saved + used)}


def _mean(values_T: torch.Tensor, mask_T: torch.Tensor) -> Mean:
    masked = values_T[mask_T].double()
    return Mean(float(masked.sum()), float(masked.numel()))


def _mismatch_metrics(micro_batches: Sequence[MicroBatch], once: LogprobPass) -> dict[str, Metric]:
    """How far the trainer's log-probs are from the engine's on the sampled tokens, in nats."""
    parts: list[dict[str, Metric]] = []
    for micro, logprobs_T in zip(micro_batches, once.logprobs, strict=True):
        difference = (logprobs_T - micro.rollout_logprobs_T).abs()
        part: dict[str, Metric] = {"rollout/logprob_diff_mean": _mean(difference, micro.loss_mask_T)}
        if micro.loss_mask_T.any():
            part["rollout/logprob_diff_max"] = Max(float(difference[micro.loss_mask_T].max()))
        parts.append(part)
    return merge(parts)


def _entropy_metrics(micro_batches: Sequence[MicroBatch], once: LogprobPass) -> dict[str, Metric]:
    """Entropy as mean over response tokens, and as mean over responses of their token mean (spec C3), in nats."""
    parts: list[dict[str, Metric]] = []
    for micro, entropy_T in zip(micro_batches, once.entropy, strict=True):
        masked = entropy_T[micro.loss_mask_T].double()
        trajectory = micro.trajectory_T[micro.loss_mask_T]
        part: dict[str, Metric] = {"entropy/mean": Mean(float(masked.sum()), float(masked.numel()))}
        if masked.numel():
            _, index = trajectory.unique(return_inverse=True)
            counts = torch.bincount(index)
            sums = torch.zeros(len(counts), dtype=torch.float64, device=masked.device).index_add_(0, index, masked)
            part["entropy/sequence_mean"] = Mean(float((sums / counts).sum()), float(len(counts)))
        parts.append(part)
    return merge(parts)
