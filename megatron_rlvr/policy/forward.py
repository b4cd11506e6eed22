"""Forward and backward over micro-batches through Megatron's pipeline schedules.

T packed tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_rlvr import ops
from megatron_rlvr.metrics import Metric
from megatron_rlvr.policy.head import TokenHead
from megatron_rlvr.policy.layers import AttentionPlan, PackedSequences, uses_transformer_engine
from megatron_rlvr.policy.model import unwrap
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.types import MicroBatch

T = TypeVar("T")
TokenLoss = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, Metric]]]
"""(logprobs_T, entropy_T, micro-batch) -> (scalar loss summed over the micro-batch's tokens, metrics)."""


class PipelineRunner:
    """Runs micro-batches through this rank's chunks.

    Args:
        chunks: model chunks, wrapped for training or not.
        head: log-probs and entropies from the last stage's hidden states.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, *, head: TokenHead) -> None:
        self.chunks = list(chunks)
        self.parallel = parallel
        self.head = head
        self._is_half = any(isinstance(m, Float16Module) for chunk in chunks for m in chunk.modules())

    def logprobs(
        self, micro_batches: Sequence[MicroBatch], *, temperature: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(logprobs_T, entropy_T) of every micro-batch, fp32 nats, without gradient; empty off the last stage."""

        return self._look(micro_batches, lambda hidden, micro: self._logprob_entropy(hidden, micro, temperature))

    def moments(self, micro_batches: Sequence[MicroBatch], *, temperature: float) -> list[ops.VocabMoments]:
        """Log-prob, entropy and second moments of every micro-batch, without gradient; empty off the last stage.

        Log-probs and entropies are bit for bit those of `logprobs`: a loss that looks at the sign of a log ratio must
        see 0 on policy.
        """

        def collect(hidden_T1D: torch.Tensor, micro: MicroBatch) -> ops.VocabMoments:
            logprobs_T, entropy_T = self._logprob_entropy(hidden_T1D, micro, temperature)
            weight_VD = unwrap(self.chunks[-1]).head_weight()
            moments = self.head.moments(hidden_T1D, weight_VD, micro, temperature=temperature)
            return replace(moments, logprobs_T=logprobs_T, entropy_T=entropy_T)

        return self._look(micro_batches, collect)

    def _look(self, micro_batches: Sequence[MicroBatch], on_hidden: Callable[[torch.Tensor, MicroBatch], T]) -> list[T]:
        """What `on_hidden` makes of every micro-batch's last hidden states, without gradient and without dropout."""

        def collect(hidden_T1D: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, T]:
            return hidden_T1D.new_zeros(()), on_hidden(hidden_T1D, micro)

        for chunk in self.chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                return self._run(micro_batches, collect, forward_only=True)
        finally:
            for chunk in self.chunks:
                chunk.train()

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: TokenLoss, *, temperature: float
    ) -> list[dict[str, Metric]]:
        """Accumulates gradients of the sum over all micro-batches and data-parallel ranks of `loss`.

        Returns:
            Metrics of every micro-batch; empty off the last stage.
        """
        # Megatron averages over micro-batches and data-parallel ranks; the loss carries global denominators already.
        undo_average = len(micro_batches) * self.parallel.ranks.dp_size

        def compute(hidden_T1D: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, Metric]]:
            logprobs_T, entropy_T = self._logprob_entropy(hidden_T1D, micro, temperature)
            value, metrics = loss(logprobs_T, entropy_T, micro)
            return value * undo_average, metrics

        return self._run(micro_batches, compute, forward_only=False)

    def _logprob_entropy(
        self, hidden_T1D: torch.Tensor, micro: MicroBatch, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(hidden_T1D, unwrap(self.chunks[-1]).head_weight(), micro, temperature=temperature)

    def _run(self, micro_batches: Sequence[MicroBatch], on_hidden: Callable, *, forward_only: bool) -> list:
        if not micro_batches:
            raise ValueError("micro_batches must not be empty: every data-parallel rank runs the same number")
        packs = [_packed_sequences(micro) for micro in micro_batches]

        def forward_step(data: Iterator[int], chunk: torch.nn.Module, *unused: object) -> tuple[torch.Tensor, Callable]:
            index = next(data)
            micro = micro_batches[index]
            extra = {"fp32_output": False} if self._is_half else {}
            output = chunk(
                input_ids=micro.tokens_T.unsqueeze(0),
                position_ids=micro.position_ids_T.unsqueeze(0),
                attention_mask=None,
                packed_seq_params=packs[index],
                **extra,
            )
            return output, partial(on_hidden, micro=micro)

        indices = range(len(micro_batches))
        run = get_forward_backward_func()
        return run(
            forward_step_func=forward_step,
            data_iterator=[iter(indices) for _ in self.chunks] if len(self.chunks) > 1 else iter(indices),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=max(micro.num_tokens for micro in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _packed_sequences(micro: MicroBatch) -> PackedSequences:
    plan, borders = None, micro.cu_seqlens
    if uses_transformer_engine():
        assert max(micro.prefixes) < 0, "transformer-engine's attention knows no shared prompts"
    else:
        plan = AttentionPlan.build(micro.cu_seqlens, micro.prefixes)
        borders = borders[[0, -1]]
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=micro.max_seqlen,
        max_seqlen_kv=micro.max_seqlen,
        plan=plan,
    )
