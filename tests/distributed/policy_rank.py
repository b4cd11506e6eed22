"""One rank of a small training job: two optimizer steps in a given layout; what it computed goes to a file.

Run by test_policy_layouts.py with one JSON argument.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rlvr import ops
from megatron_rlvr.config.schema import DType, ModelConfig, OptimConfig, ParallelConfig, Recompute
from megatron_rlvr.data.packing import PackedSequence, build_microbatch, plan_microbatches, unpack_responses
from megatron_rlvr.metrics import Metric
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.trainer.update.prompt_sharing import unit_cost, units
from megatron_rlvr.types import MicroBatch
from megatron_rlvr.weights.hf_config import ModelShape

TEMPERATURE = 0.8


def sequences(vocab_size: int) -> list[PackedSequence]:
    """Twelve short responses to five prompts with both signs of advantage; all ranks make the same."""
    rng = np.random.default_rng(0)
    made = []
    for index, group in enumerate([0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4]):
        drawn, response = (rng.integers(0, vocab_size, rng.integers(low, 12)) for low in (3, 1))
        prompt = made[-1].prompt_ids if made and made[-1].group == group else drawn
        made.append(
            PackedSequence(
                prompt_ids=prompt,
                response_ids=response,
                advantage=float(rng.normal()),
                weight=1 / 64,
                rollout_logprobs=np.zeros(len(response), np.float32),
                trajectory=index,
                group=group,
            )
        )
    return made


def loss(
    logprobs_T: torch.Tensor, entropy_T: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Policy gradient with an entropy bonus, so that gradients of both outputs are exercised."""
    token_loss_T = -logprobs_T * micro.advantages_T - 0.1 * entropy_T
    return (token_loss_T.double() * micro.weights_T).sum(), {}


def main(job: dict[str, Any]) -> None:
    parallel_config = ParallelConfig(**job["parallel"])
    model = ModelConfig(path=job["path"], dtype=DType[job["dtype"]], recompute=Recompute[job["recompute"]])
    shape = ModelShape.from_hf(job["path"])
    ops.set_backend(job["ops"])
    with ParallelContext(parallel_config, seed=0, timeout_s=120) as parallel:
        ranks = parallel.ranks
        # A large eps keeps Adam's first steps smooth in the gradient: without it, an element whose gradient is
        # rounding noise moves by a whole learning rate in either direction.
        optim = OptimConfig(lr=1e-2, weight_decay=0.0, eps=1e-3)
        policy = Policy(job["path"], shape, model_config=model, parallel=parallel, optim=optim)
        policy.runner.head.logits_bytes = job["logits_bytes"]
        batch = sequences(shape.vocab_size)
        dealt = [[sequence] for sequence in batch]
        if job["share_prompts"]:
            dealt = units(batch, dp_size=1, max_tokens=job["max_tokens"])
        plan = plan_microbatches(
            [unit_cost(unit) for unit in dealt],
            dp_size=ranks.dp_size,
            max_tokens=job["max_tokens"],
            multiple_of=ranks.pp_size if parallel_config.vpp > 1 else 1,
        )
        pad = ranks.tp_size if parallel_config.sequence_parallel else 1
        micro_batches = [
            build_microbatch([s for i in chosen for s in dealt[i]], pad_to_multiple=pad)
            for chosen in plan[ranks.dp_rank]
        ]
        shared = sum(parallel.gather_objects(sum(micro.num_shared_tokens for micro in micro_batches)))
        result: dict[str, Any] = {
            "num_micro_batches": len(micro_batches),
            "num_shared_tokens": shared // (ranks.tp_size * ranks.pp_size),
            "logprobs": [],
            "grad_norm": [],
        }
        for _ in range(2):
            once = policy.logprobs(micro_batches, temperature=TEMPERATURE)
            part: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            for micro, logprobs_T, entropy_T in zip(micro_batches, once.logprobs, once.entropy, strict=False):
                entropy = unpack_responses(entropy_T, micro)
                part |= {k: (v, entropy[k]) for k, v in unpack_responses(logprobs_T, micro).items()}
            counted = ranks.is_last_stage and ranks.tp_rank == 0
            merged: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            for of_rank in parallel.gather_objects(part if counted else {}):
                merged |= of_rank
            _, update = policy.update(micro_batches, loss, lr=optim.lr, temperature=TEMPERATURE)
            result["logprobs"].append(merged)
            result["grad_norm"].append(update.grad_norm)
        policy.save_hf(job["out"], like=job["path"])
        if ranks.is_main:
            Path(job["out"]).with_suffix(".pkl").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
