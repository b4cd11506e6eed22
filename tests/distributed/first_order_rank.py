"""One rank that trains on one batch and holds the predicted entropy change against the measured one; run by
test_first_order.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.config.schema import DType, ModelConfig, OptimConfig, ParallelConfig
from megatron_rlvr.data.packing import build_microbatch, plan_microbatches
from megatron_rlvr.metrics import Metric
from megatron_rlvr.policy.first_order import WeightStep
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.types import MicroBatch
from megatron_rlvr.weights.hf_config import ModelShape
from tests.distributed.policy_rank import sequences

LEARNING_RATE = 1e-6
TEMPERATURE = 0.2
"""Sharp enough for a random model's entropy to move."""
UPDATES = 3


def loss(
    logprobs_T: torch.Tensor, entropy_T: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Plain policy gradient."""
    return (-(logprobs_T * micro.advantages_T).double() * micro.weights_T).sum(), {}


def main(job: dict[str, Any]) -> None:
    parallel_config = ParallelConfig(**job["parallel"])
    shape = ModelShape.from_hf(job["path"])
    with ParallelContext(parallel_config, seed=0, timeout_s=120) as parallel:
        ranks = parallel.ranks
        optim = OptimConfig(lr=LEARNING_RATE, weight_decay=0.1, eps=1e-3)
        model = ModelConfig(path=job["path"], dtype=DType.fp32)
        policy = Policy(job["path"], shape, model_config=model, parallel=parallel, optim=optim)
        batch = sequences(shape.vocab_size)
        plan = plan_microbatches(
            [sequence.num_tokens for sequence in batch],
            dp_size=ranks.dp_size,
            max_tokens=job["max_tokens"],
            multiple_of=ranks.pp_size if parallel_config.vpp > 1 else 1,
        )
        pad = ranks.tp_size if parallel_config.sequence_parallel else 1
        train = [build_microbatch([batch[i] for i in chosen], pad_to_multiple=pad) for chosen in plan[ranks.dp_rank]]
        halves = [
            [build_microbatch([batch[i] for i in chosen if i % 2 == half], pad_to_multiple=pad)
             for chosen in plan[ranks.dp_rank]]
            for half in (0, 1)
        ]  # fmt: skip
        counts = [sum(len(s.response_ids) for s in batch[half::2]) for half in (0, 1)]

        def mean_entropy(probe: list[MicroBatch], entropy: list[torch.Tensor], count: int) -> float:
            parts = [float(e[m.loss_mask_T].double().sum()) for e, m in zip(entropy, probe, strict=False)]
            own = sum(parts) / count if ranks.is_last_stage and ranks.tp_rank == 0 else 0.0
            return sum(parallel.gather_objects(own))

        step = WeightStep(policy)
        for _ in range(UPDATES):
            policy.update(train, loss, lr=optim.lr, temperature=TEMPERATURE)
        weights = [p.detach().clone() for chunk in policy.chunks for p in chunk.parameters()]
        found = step.first_order(halves, counts, temperature=TEMPERATURE)
        kept = all(
            torch.equal(old, new)
            for old, new in zip(weights, (p for chunk in policy.chunks for p in chunk.parameters()), strict=True)
        )
        rows = []
        for probe, count, first in zip(halves, counts, found, strict=True):
            after = policy.logprobs(probe, temperature=TEMPERATURE).entropy
            before = mean_entropy(probe, first.before.entropy, count)
            rows.append({"predicted": first.change, "measured": mean_entropy(probe, after, count) - before,
                         "before": before})  # fmt: skip
        _, update = policy.update(train, loss, lr=optim.lr, temperature=TEMPERATURE)
        policy.save_hf(job["out"], like=job["path"])
        everywhere = parallel.gather_objects((kept, [row["predicted"] for row in rows]))
        if ranks.is_main:
            result = {"rows": rows, "kept": all(k for k, _ in everywhere), "grad_norm": update.grad_norm,
                      "agree": all(p == everywhere[0][1] for _, p in everywhere)}  # fmt: skip
            Path(job["out"]).with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
