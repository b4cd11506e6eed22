"""The optimizer steps on one rollout batch: old log-probs, token selection, loss, update.

T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_rlvr import loss as losses
from megatron_rlvr.config.schema import CovLogp, LossConfig, OptimConfig
from megatron_rlvr.loss import LossTokens
from megatron_rlvr.loss.kl import reference_kl
from megatron_rlvr.loss.mismatch import importance
from megatron_rlvr.metrics import Mean, Metric, Sum, merge
from megatron_rlvr.policy.forward import TokenLoss
from megatron_rlvr.policy.optimizer import UpdateResult, learning_rate
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import LogprobPass, Policy
from megatron_rlvr.trainer.update.batch import UpdateBatch
from megatron_rlvr.trainer.update.metrics import (
    covariance_metrics,
    masked_mean,
    pass_metrics,
    sampled_entropy_metrics,
    saving_metrics,
)
from megatron_rlvr.trainer.update.selection import TokenSelector
from megatron_rlvr.types import MicroBatch


@dataclass(kw_only=True, slots=True)
class UpdateOutcome:
    """What the optimizer steps on one rollout batch did."""

    metrics: dict[str, Metric]
    """This rank's part; merge over ranks that hold logits and have tensor rank 0."""
    results: list[UpdateResult]


class TrainingDivergedError(RuntimeError):
    """Update after update had a loss or gradient that is not finite."""


class UpdateObserver(Protocol):
    """Somebody who looks at an optimizer step without changing it."""

    def before_update(self, micro_batches: Sequence[MicroBatch], token_loss: TokenLoss) -> None:
        """Called on every rank before each optimizer step, with its micro-batches and its loss."""
        ...


class Updater:
    """Trains the policy on rollout batches; every method is collective over the trainer's ranks.

    Args:
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        reference: frozen model for the KL term, None where `loss.kl_coef` is 0.
        observer: is shown every optimizer step before it is made.
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
        observer: UpdateObserver | None = None,
    ) -> None:
        self.policy = policy
        self.observer = observer
        self.parallel = parallel
        self.loss = loss
        self.optim = optim
        self.temperature = temperature
        self.seed = seed
        self.total_updates = total_updates
        self.reference = reference
        self.policy_loss = losses.LOSSES.get(loss.name)
        self.selector = TokenSelector(loss, seed=seed, group=self._dp_group)
        self.num_updates = 0
        """Completed optimizer steps (skipped ones included)."""
        self._current: list[torch.Tensor] = []
        """Current log-probs of the optimizer step under way, micro-batch by micro-batch, for the overlap metric."""

    def use_loss(self, loss: LossConfig) -> None:
        """Takes the settings of the next updates; the loss stays the one of that name."""
        assert loss.name == self.loss.name, "a run keeps its loss"
        self.loss = self.selector.loss = loss

    def run(self, updates: Sequence[UpdateBatch]) -> UpdateOutcome:
        """One optimizer step for every entry of `updates` (this rank's part of it)."""
        every = [micro for update in updates for micro in update.micro_batches]
        parts = self._look_at_elided(updates)
        # In the first update old and current log-probs are the same numbers: its loss pass gives both, unless tokens
        # are chosen before it.
        num_free = 0 if self.selector.selects_globally else 1
        looked_at = [micro for update in updates[num_free:] for micro in update.micro_batches]
        if looked_at:
            before = self.policy.logprobs(looked_at, temperature=self.temperature)
            for micro, logprobs_T in zip(looked_at, before.logprobs, strict=False):
                micro.old_logprobs_T = logprobs_T
            if self.parallel.ranks.is_last_stage:
                parts.append(pass_metrics(looked_at, before))
        if self.reference is not None:
            frozen = self.reference.logprobs(every, temperature=self.temperature)
            for micro, logprobs_T in zip(every, frozen.logprobs, strict=False):
                micro.ref_logprobs_T = logprobs_T
        results = []
        for number, update in enumerate(updates):
            metrics, result = self._step(update, with_pass_metrics=number < num_free)
            parts.append(metrics)
            results.append(result)
        if self.parallel.ranks.is_last_stage:
            everyone = [*every, *[micro for update in updates for micro in (*update.probed, *update.idle)]]
            parts.append(covariance_metrics(everyone, self._dp_group))
            parts.append(sampled_entropy_metrics(everyone))
        parts.append(saving_metrics(updates))
        return UpdateOutcome(metrics=merge(parts), results=results)

    def _step(self, update: UpdateBatch, *, with_pass_metrics: bool) -> tuple[dict[str, Metric], UpdateResult]:
        """One optimizer step."""
        if self.selector.selects_globally:
            self._select(update)
        if self.observer is not None:
            self.observer.before_update(
                update.micro_batches, lambda *args: self._token_loss(*args, with_pass_metrics=False)
            )
        self._current = []
        metrics, result = self.policy.update(
            update.micro_batches,
            lambda *args: self._token_loss(*args, with_pass_metrics=with_pass_metrics),
            lr=learning_rate(self.optim, self.num_updates, self.total_updates),
            temperature=self.temperature,
        )
        if self.selector.selects_globally and self.loss.cov_logp is CovLogp.old:
            metrics |= self._overlap_metrics(update)
        self.num_updates += 1
        return metrics, result

    def _look_at_elided(self, updates: Sequence[UpdateBatch]) -> list[dict[str, Metric]]:
        """A pass without gradient over a sample of the elided responses, and old log-probs for all of them.

        Those without a pass take the engine's: they only enter means over tokens (spec A10).
        """
        for micro in (micro for update in updates for micro in update.idle):
            micro.old_logprobs_T = micro.rollout_logprobs_T
        probed = [(update, micro) for update in updates for micro in update.probed]
        if not probed:
            return []
        once = self.policy.logprobs([micro for _, micro in probed], temperature=self.temperature)
        if not self.parallel.ranks.is_last_stage:
            return []
        parts = []
        for (update, micro), logprobs_T, entropy_T in zip(probed, once.logprobs, once.entropy, strict=True):
            micro.old_logprobs_T = logprobs_T
            alone = LogprobPass(logprobs=[logprobs_T], entropy=[entropy_T])
            parts.append(pass_metrics([micro], alone, update.probe_scale))
        return parts

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
            metrics |= pass_metrics([micro], once)
        selected_T = micro.selected_T
        if self.selector.selects and selected_T is None:
            # The papers' code: means, count and draw inside one micro-batch, from the current log-probs.
            [selected_T] = self.selector.choose([micro], step=self.num_updates, current=[current_T], everywhere=False)
            micro.selected_T = selected_T
        importance_T, weight_metrics = importance(
            micro.old_logprobs_T, micro.rollout_logprobs_T, micro.loss_mask_T, micro.trajectory_T, self.loss.mismatch
        )
        tokens = LossTokens(
            logprobs_T=logprobs_T,
            old_logprobs_T=micro.old_logprobs_T,
            advantages_T=micro.advantages_T,
            mask_T=micro.loss_mask_T,
            weights_T=micro.weights_T,
            trajectory_T=micro.trajectory_T,
            importance_T=importance_T,
            selected_T=selected_T,
        )
        loss, loss_metrics = self.policy_loss(tokens, self.loss)
        metrics |= weight_metrics | loss_metrics
        metrics["loss/policy"] = Sum(float(loss.detach()))
        weights_T = micro.weights_T.double()
        if micro.ref_logprobs_T is not None:
            kl_T = reference_kl(logprobs_T, micro.ref_logprobs_T, micro.loss_mask_T, kind=self.loss.kl_kind.value)
            metrics["kl/reference_mean"] = masked_mean(kl_T.detach(), micro.loss_mask_T)
            loss = loss + self.loss.kl_coef * (kl_T.double() * weights_T).sum()
        if self.loss.entropy_coef != 0.0:
            masked_T = torch.where(micro.loss_mask_T, entropy_T, 0.0)
            loss = loss - self.loss.entropy_coef * (masked_T.double() * weights_T).sum()
        return loss, metrics

    def _select(self, update: UpdateBatch) -> None:
        """Fixes the selected tokens of one optimizer step, over all its micro-batches and data-parallel ranks."""
        current: Sequence[torch.Tensor] = []
        if self.loss.cov_logp is CovLogp.current:
            current = self.policy.logprobs(update.micro_batches, temperature=self.temperature).logprobs
        if not self.parallel.ranks.is_last_stage:
            return
        for micro, selected_T in zip(update.micro_batches, self._chosen(update, current), strict=True):
            micro.selected_T = selected_T

    def _chosen(self, update: UpdateBatch, current: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self.selector.choose(
            update.micro_batches,
            elided=[*update.probed, *update.idle],
            step=self.num_updates,
            current=current,
            everywhere=True,
        )

    def _overlap_metrics(self, update: UpdateBatch) -> dict[str, Metric]:
        """Share of the tokens selected by old log-probs that current ones would have selected too (spec B5.2).

        Free of extra passes: the loss has just seen the current log-probs of every micro-batch. Elided responses keep
        their old ones.
        """
        if not self.parallel.ranks.is_last_stage:
            return {}
        selected_T = torch.cat([micro.selected_T for micro in update.micro_batches if micro.selected_T is not None])
        both_T = selected_T & torch.cat(self._chosen(update, self._current))
        return {"cov/selected_overlap_current": Mean(float(both_T.sum()), float(selected_T.sum()))}

    @property
    def _dp_group(self) -> dist.ProcessGroup | None:
        return self.parallel.dp_group if self.parallel.ranks.dp_size > 1 else None
