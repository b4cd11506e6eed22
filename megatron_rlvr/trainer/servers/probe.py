"""A fixed prompt whose log-probs the trainer and its servers must agree on."""

from __future__ import annotations

import numpy as np
import torch

from megatron_rlvr.data.packing import PackedSequence, build_microbatch
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.trainer.update.batch import on_device

NUM_TOKENS = 24
FP32_TOLERANCE, HALF_TOLERANCE = 1e-3, 0.5
"""Nats, of the largest of `NUM_TOKENS` differences: ten times what kernels make of the same weights (in fp32 on both
sides, or in half precision on one), and far below what other weights make."""


class PromptProbe:
    """The trainer's log-probs of token ids that are spread over the vocabulary.

    Args:
        policy: all ranks' model.
        tolerance: nats by which servers may be off.
        pad_to_multiple: of the packed tokens, for sequence parallelism.
        multiple: micro-batches that a pass must have a multiple of, for virtual pipelines.
    """

    def __init__(self, policy: Policy, *, tolerance: float, pad_to_multiple: int, multiple: int) -> None:
        self.tolerance = tolerance
        self._policy = policy
        vocab = policy.shape.vocab_size
        self.input_ids = [(17 + 7919 * index) % vocab for index in range(NUM_TOKENS)]
        ids = np.array(self.input_ids, dtype=np.int32)
        sequence = PackedSequence(
            prompt_ids=ids[:1],
            response_ids=ids[1:],
            advantage=0.0,
            weight=0.0,
            rollout_logprobs=np.zeros(NUM_TOKENS - 1, dtype=np.float32),
            trajectory=0,
        )
        micro = on_device(build_microbatch([sequence], pad_to_multiple=pad_to_multiple), policy.device)
        self._micro_batches = [micro] * multiple

    def logprobs(self) -> list[float]:
        """Nats, of all tokens but the first, at temperature 1; collective over the trainer's ranks."""
        parallel = self._policy.parallel
        result = self._policy.logprobs(self._micro_batches, temperature=1.0)
        ranks = parallel.ranks
        mine: list[float] | None = None
        if ranks.is_last_stage and ranks.tp_rank == 0:
            mine = _on_response(result.logprobs[0], self._micro_batches[0].loss_mask_T)
        return next(part for part in parallel.gather_objects(mine) if part is not None)


def _on_response(logprobs_T: torch.Tensor, mask_T: torch.Tensor) -> list[float]:
    return [float(value) for value in logprobs_T[mask_T].tolist()]
