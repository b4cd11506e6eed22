"""The policy's head: log-prob and entropy of response tokens from the last hidden states.

T packed tokens, R of them response tokens, D hidden, V vocabulary columns of this rank's shard.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_rlvr import ops
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.types import MicroBatch

MOMENTS_LOGITS_BYTES = 256 << 20
"""Logits that exist at a time in a pass for moments, where nothing else bounds them."""


class TokenHead:
    """Turns hidden states into log-probs and entropies; tokens without loss (prompts, padding) cost nothing.

    Args:
        vocab_size: real vocabulary; padded columns take no part in the softmax, as in the engine.
        logits_bytes: bound of the logits that exist at a time; None: those of all response tokens.
    """

    def __init__(self, parallel: ParallelContext, *, vocab_size: int, logits_bytes: int | None) -> None:
        self.parallel = parallel
        self.vocab_size = vocab_size
        self.logits_bytes = logits_bytes
        self._group = parallel.tp_group if parallel.ranks.tp_size > 1 else None
        self._broken: list[torch.Tensor] = []

    def take_broken(self) -> bool:
        """Whether a hidden state since the last call was not finite, on this rank.

        Such a state counts as 0, so that a broken forward pass reaches the end of the update, where all ranks agree to
        drop it, instead of ending one rank among others that wait for it.
        """
        broken, self._broken = self._broken, []
        return any(bool(flag) for flag in broken)

    def __call__(
        self, hidden_T1D: torch.Tensor, weight_VD: torch.Tensor, micro: MicroBatch, *, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of every target and entropy of every position in nats, fp32 [T], 0 where no loss is.

        Args:
            hidden_T1D: [T, 1, D], under sequence parallelism this rank's part [T / TP, 1, D].
        """
        rows_R = micro.loss_mask_T.nonzero().squeeze(1)
        hidden_RD = self._rows(hidden_T1D, rows_R)
        targets_R = micro.targets_T.index_select(0, rows_R)
        if self.logits_bytes is None:
            pair = self._whole(hidden_RD, weight_VD, targets_R, temperature)
        else:
            pair = ops.chunked_logprob_entropy(
                hidden_RD,
                weight_VD,
                targets_R,
                temperature=temperature,
                group=self._group,
                chunk_bytes=self.logits_bytes,
                vocab_size=self.vocab_size,
            )
        logprobs_T, entropy_T = (
            values_R.new_zeros(micro.num_tokens).index_copy(0, rows_R, values_R) for values_R in pair
        )
        return logprobs_T, entropy_T

    def moments(
        self, hidden_T1D: torch.Tensor, weight_VD: torch.Tensor, micro: MicroBatch, *, temperature: float
    ) -> ops.VocabMoments:
        """Log-prob, entropy and second moments of every position [T], 0 where no loss is; without gradient.

        Args:
            hidden_T1D: as for a call.
        """
        rows_R = micro.loss_mask_T.nonzero().squeeze(1)
        targets_R = micro.targets_T.index_select(0, rows_R)
        row_bytes = weight_VD.shape[0] * weight_VD.element_size()
        piece = max(1, (self.logits_bytes or MOMENTS_LOGITS_BYTES) // row_bytes)
        parts = [
            ops.vocab_parallel_moments(
                self._logits(hidden_RD, weight_VD), part_R, temperature=temperature, group=self._group
            )
            for hidden_RD, part_R in zip(
                self._rows(hidden_T1D, rows_R).split(piece), targets_R.split(piece), strict=True
            )
        ]

        def whole(name: str) -> torch.Tensor:
            values_R = torch.cat([getattr(part, name) for part in parts])
            return values_R.new_zeros(micro.num_tokens).index_copy(0, rows_R, values_R)

        return ops.VocabMoments(
            logprobs_T=whole("logprobs_T"),
            entropy_T=whole("entropy_T"),
            sum_p2_T=whole("sum_p2_T"),
            sum_p2_logp_T=whole("sum_p2_logp_T"),
        )

    def _rows(self, hidden_T1D: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """The hidden states [R, D] of response tokens, whose gradient is summed over the vocabulary's shards once.

        The chunked head sums it by itself; before whole logits the sum is that of Megatron's mappings.
        """
        whole_logits = self.logits_bytes is None
        if self.parallel.config.sequence_parallel:
            hidden_T1D = gather_from_sequence_parallel_region(hidden_T1D, tensor_parallel_output_grad=whole_logits)
        hidden_RD = hidden_T1D.squeeze(1).index_select(0, rows_R)
        finite_RD = hidden_RD.detach().isfinite()
        self._broken.append(~finite_RD.all())
        hidden_RD = hidden_RD.where(finite_RD, 0.0)
        if whole_logits and self._group is not None and not self.parallel.config.sequence_parallel:
            hidden_RD = copy_to_tensor_model_parallel_region(hidden_RD)
        return hidden_RD

    def _whole(
        self, hidden_RD: torch.Tensor, weight_VD: torch.Tensor, targets_R: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Through the logits of all response tokens, which backward overwrites with their gradient."""
        logits_RV = self._logits(hidden_RD, weight_VD)
        return ops.vocab_parallel_logprob_entropy(
            logits_RV, targets_R, temperature=temperature, group=self._group, inplace_backward=True
        )

    def _logits(self, hidden_RD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] with padded columns masked."""
        logits_RV = F.linear(hidden_RD, weight_VD)
        width = weight_VD.shape[0]
        real = ops.real_columns(width, vocab_size=self.vocab_size, group=self._group)
        if real < width:
            logits_RV.detach()[:, real:].fill_(-torch.inf)
        return logits_RV
