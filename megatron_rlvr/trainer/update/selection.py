"""Which tokens Clip-Cov and KL-Cov act on: over a whole optimizer step, or inside one micro-batch (spec B5).

T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.distributed as dist

from megatron_rlvr import ops
from megatron_rlvr.config.schema import CovScope, LossConfig
from megatron_rlvr.entropy.selection_mass import mass_count
from megatron_rlvr.ops.exact import parse_ratio, selection_count
from megatron_rlvr.types import MicroBatch

COVARIANCE_LOSSES = ("clip_cov", "kl_cov")


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedTokens:
    """Several micro-batches end to end."""

    advantages_T: torch.Tensor
    mask_T: torch.Tensor
    trajectory_T: torch.Tensor
    position_T: torch.Tensor
    old_logprobs_T: torch.Tensor

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> JoinedTokens:
        """Joins micro-batches whose old log-probs are there."""
        return cls(
            advantages_T=torch.cat([micro.advantages_T for micro in micro_batches]),
            mask_T=torch.cat([micro.loss_mask_T for micro in micro_batches]),
            trajectory_T=torch.cat([micro.trajectory_T for micro in micro_batches]),
            position_T=torch.cat([micro.response_position_T for micro in micro_batches]),
            old_logprobs_T=torch.cat([m.old_logprobs_T for m in micro_batches if m.old_logprobs_T is not None]),
        )


class TokenSelector:
    """Chooses by covariance of log-prob and advantage.

    Args:
        loss: the loss section; its name is the method. May be replaced between optimizer steps.
        seed: of Clip-Cov's draw.
        group: data-parallel ranks, None for one rank alone.
    """

    def __init__(self, loss: LossConfig, *, seed: int, group: dist.ProcessGroup | None) -> None:
        self.loss = loss
        self.seed = seed
        self.group = group

    @property
    def selects(self) -> bool:
        """Whether the loss acts on chosen tokens at all."""
        return self.loss.name in COVARIANCE_LOSSES

    @property
    def selects_globally(self) -> bool:
        """Whether they are chosen once for all micro-batches and ranks of an optimizer step."""
        return self.selects and self.loss.cov_scope is CovScope.minibatch

    def choose(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        elided: Sequence[MicroBatch] = (),
        step: int,
        current: Sequence[torch.Tensor] = (),
        everywhere: bool,
    ) -> list[torch.Tensor]:
        """The chosen tokens of every micro-batch.

        Args:
            micro_batches: with old log-probs.
            elided: the optimizer step's tokens of zero advantage that are not among them, with old log-probs; they
                count in N and in the means, and may take slots in vain.
            step: number of the optimizer step, for the draw.
            current: fp32 [T] log-probs of every micro-batch to take instead of the old ones; they also tell which
                tokens the ratio clip decides.
            everywhere: together with the other data-parallel ranks (collective), or in these tokens alone.

        Returns:
            bool [T] for every one of `micro_batches`.
        """
        join = JoinedTokens.of([*micro_batches, *elided])
        logprobs_T = join.old_logprobs_T
        clipped_T = None
        if current:
            logprobs_T = torch.cat([*current, *[m.old_logprobs_T for m in elided if m.old_logprobs_T is not None]])
            clipped_T = self._ratio_clipped(logprobs_T, join)
        group = self.group if everywhere else None
        excluded_T = (join.advantages_T == 0) if self._skips_zero_advantage else None
        ratio, bounds = self._extent(logprobs_T, join, group)
        if ratio == 0:
            chosen_T = torch.zeros_like(join.mask_T)
        else:
            chosen_T = ops.select_tokens(
                logprobs_T,
                join.advantages_T,
                join.mask_T,
                method=self.loss.name,
                ratio=ratio,
                ratio_clipped_T=clipped_T,
                excluded_T=excluded_T,
                trajectory_T=join.trajectory_T,
                position_T=join.position_T,
                seed=self.seed,
                step=step,
                group=group,
                **bounds,
            )
        sizes = [micro.num_tokens for micro in micro_batches]
        return list(chosen_T[: sum(sizes)].split(sizes))

    @property
    def _skips_zero_advantage(self) -> bool:
        return self.loss.name == "kl_cov" and self.loss.kl_cov.skip_zero_advantage

    def _extent(
        self, logprobs_T: torch.Tensor, join: JoinedTokens, group: dist.ProcessGroup | None
    ) -> tuple[Fraction, dict[str, float]]:
        """Share of the tokens to choose, and between which covariances; either may follow the batch's (spec G9)."""
        clip = self.loss.clip_cov
        clips = self.loss.name == "clip_cov"
        ratio = parse_ratio(clip.ratio if clips else self.loss.kl_cov.ratio)
        bounds = {"lower": clip.lower, "upper": clip.upper} if clips else {}
        relative = clips and clip.relative_bounds
        if self.loss.cov_mass is None and not relative:
            return ratio, bounds
        covariance = ops.token_covariance(logprobs_T, join.advantages_T, join.mask_T, group=group)
        cov_M = covariance.cov_T[join.mask_T]
        positive = _everyones(cov_M[cov_M > 0].cpu().numpy(), group)
        if len(positive) == 0:
            return Fraction(0), bounds
        if relative:
            # Sorted: the same to the last bit for any order of ranks and tokens.
            unit = float(np.sort(positive).mean())
            bounds = {name: bound * unit for name, bound in bounds.items()}
        if self.loss.cov_mass is not None:
            cap = selection_count(ratio, covariance.num_tokens)
            count = mass_count(positive, self.loss.cov_mass, max_count=cap)
            ratio = Fraction(count, covariance.num_tokens)
        return ratio, bounds

    def _ratio_clipped(self, logprobs_T: torch.Tensor, join: JoinedTokens) -> torch.Tensor | None:
        if self.loss.name != "clip_cov":
            return None
        options = self.loss.clip_cov
        return ops.ratio_clipped(
            logprobs_T,
            join.old_logprobs_T,
            join.advantages_T,
            join.mask_T,
            eps_low=options.eps_low,
            eps_high=options.eps_high,
            logratio_clamp=self.loss.logratio_clamp,
        )


def _everyones(values: np.ndarray, group: dist.ProcessGroup | None) -> np.ndarray:
    """Values of all ranks, in any order."""
    if group is None:
        return values
    parts: list[np.ndarray] = [values] * dist.get_world_size(group)
    dist.all_gather_object(parts, values, group=group)
    return np.concatenate(parts)
