"""The exact first-order entropy change of a real update: <grad H(theta_old), theta_new - theta_old> (spec C3, P4).

H is the mean entropy of probe tokens. Whatever the optimizer did (Adam, clipping, weight decay, several updates) lies
in the displacement of the weights, so nothing is assumed about it. T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlvr.metrics import Metric
from megatron_rlvr.policy.policy import LogprobPass, Policy
from megatron_rlvr.types import MicroBatch

PIECE = 1 << 22
"""Elements of a tensor that are in fp64 at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstOrder:
    """What one probe says."""

    change: float
    """Predicted change of the probe's mean entropy, nats; the same on every rank."""
    before: LogprobPass
    """Log-probs and entropies at the old weights, of this rank's micro-batches."""


class WeightStep:
    """The way of the weights from this object's making on; every method is collective over the trainer's ranks.

    Keeps copies of the old and the new weights in host memory, in the dtype the model computes in: what is predicted
    is the change of what the model computes.

    Example:
        >>> step = WeightStep(policy)
        >>> ...  # one optimizer step, or several
        >>> [probe] = step.first_order([micro_batches], [num_tokens], temperature=1.0)
        >>> probe.change
        -0.0021
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._chunks: list[Any] = list(policy.chunks)
        """Each a DistributedDataParallel."""
        self._before = self._copy()

    def first_order(
        self, probes: Sequence[Sequence[MicroBatch]], num_tokens: Sequence[int], *, temperature: float
    ) -> list[FirstOrder]:
        """Predicted change of every probe's mean entropy over its response tokens.

        The weights are put back for the gradient and are bit for bit the new ones afterwards; so is the optimizer.

        Args:
            probes: this rank's micro-batches of every probe, as many on every data-parallel rank.
            num_tokens: response tokens of every probe over all data-parallel ranks.
            temperature: of the policy, as in training.
        """
        after = self._copy()
        results = []
        self._put(self._before)
        try:
            for probe, count in zip(probes, num_tokens, strict=True):
                before = self._gradient(probe, count, temperature)
                results.append(FirstOrder(change=self._project(after), before=before))
        finally:
            self._put(after)
            for chunk in self._chunks:
                chunk.zero_grad_buffer()
        return results

    def _gradient(self, micro_batches: Sequence[MicroBatch], num_tokens: int, temperature: float) -> LogprobPass:
        """Leaves this rank's own part of the gradient of the mean entropy in ``main_grad``, not yet summed over ranks.

        The dot product with the displacement is linear: summing it over ranks takes the place of summing gradients,
        so that neither data-parallel nor embedding gradients travel.
        """
        seen = LogprobPass(logprobs=[], entropy=[])

        def mean_entropy(
            logprobs_T: torch.Tensor, entropy_T: torch.Tensor, micro: MicroBatch
        ) -> tuple[torch.Tensor, dict[str, Metric]]:
            seen.logprobs.append(logprobs_T.detach())
            seen.entropy.append(entropy_T.detach())
            return torch.where(micro.loss_mask_T, entropy_T, 0.0).double().sum() / max(num_tokens, 1), {}

        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        with self._local_gradients():
            self.policy.runner.forward_backward(micro_batches, mean_entropy, temperature=temperature)
        return seen

    @contextmanager
    def _local_gradients(self) -> Iterator[None]:
        """Backward passes that leave gradients unsynchronised: no reduction by buckets, no finalisation."""
        configs = [chunk.config for chunk in self._chunks]
        saved = [(config, config.finalize_model_grads_func, config.no_sync_func) for config in configs]
        with ExitStack() as stack:
            for config in configs:
                # The schedules would leave the chunks' own no_sync before the last micro-batch.
                config.finalize_model_grads_func = config.no_sync_func = None
            for chunk in self._chunks:
                stack.enter_context(chunk.no_sync())
            try:
                yield
            finally:
                for config, finalize, no_sync in saved:
                    config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync

    def _project(self, after: Sequence[torch.Tensor]) -> float:
        """<gradient, after - before>, every parameter of the model counted once."""
        parallel = self.policy.parallel
        total = torch.zeros(1, dtype=torch.float64)
        for (name, param), new, old in zip(self._parameters(), after, self._before, strict=True):
            total += _dot(param.main_grad, new, old) / self._times_counted(name, param)
        # Megatron divides the loss by the number of micro-batches; the runner undid that for a mean over
        # data-parallel ranks, which is not taken here.
        total /= parallel.ranks.dp_size
        dist.all_reduce(total, group=parallel.control_group)
        return float(total)

    def _times_counted(self, name: str, param: torch.nn.Parameter) -> int:
        """Tensor ranks whose gradient of a parameter is the whole one (otherwise each has a part, as Megatron's
        `finalize_model_grads` knows them)."""
        config = self._chunks[0].config
        whole = not (
            getattr(param, "tensor_model_parallel", False)
            or not getattr(param, "allreduce", True)
            or (config.sequence_parallel and getattr(param, "sequence_parallel", False))
            or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
        )
        return self.policy.parallel.ranks.tp_size if whole else 1

    def _parameters(self) -> Iterator[tuple[str, Any]]:
        for chunk in self._chunks:
            yield from chunk.named_parameters()

    def _copy(self) -> list[torch.Tensor]:
        return [param.detach().to("cpu", copy=True) for _, param in self._parameters()]

    def _put(self, weights: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for (_, param), value in zip(self._parameters(), weights, strict=True):
                param.copy_(value)


def _dot(gradient: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> float:
    """<gradient, new - old> in fp64 on the gradient's device, piece by piece."""
    total = 0.0
    pieces = zip(*(tensor.flatten().split(PIECE) for tensor in (gradient, new, old)), strict=True)
    for gradient_part, new_part, old_part in pieces:
        device = gradient_part.device
        moved = new_part.to(device, torch.float64) - old_part.to(device, torch.float64)
        total += float(gradient_part.double() @ moved)
    return total
