"""One rank: optimizer steps with a checkpoint in the middle, and the same steps from it. For test_policy_checkpoint.py.

The JSON argument: path, dtype, parallel, steps, save_after, out (folder of results), saved (the checkpoint: written
unless it exists).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_rlvr.config.schema import DType, ModelConfig, OptimConfig, ParallelConfig
from megatron_rlvr.data.packing import build_microbatch, plan_microbatches
from megatron_rlvr.policy import checkpoint
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.weights.hf_config import ModelShape
from tests.distributed.policy_rank import TEMPERATURE, loss, sequences


def train_one_step(policy: Policy, step: int) -> None:
    ranks = policy.parallel.ranks
    batch = sequences(policy.shape.vocab_size)[step : step + 8]
    plan = plan_microbatches(
        [s.num_tokens for s in batch], dp_size=ranks.dp_size, max_tokens=100, multiple_of=ranks.pp_size
    )
    micro_batches = [build_microbatch([batch[i] for i in chosen], pad_to_multiple=1) for chosen in plan[ranks.dp_rank]]
    policy.update(micro_batches, loss, lr=1e-2 / (1 + step), temperature=TEMPERATURE)


def save(policy: Policy, folder: Path, *, background: bool) -> checkpoint.PendingSave:
    if policy.parallel.ranks.is_main:
        folder.mkdir()
    policy.parallel.barrier()
    return checkpoint.PendingSave(
        folder,
        policy.parallel,
        policy,
        besides=lambda out: (out / "beside").write_text("kept") and None,
        background=background,
    )


def main(job: dict[str, Any]) -> None:
    out, saved = Path(job["out"]), Path(job["saved"])
    with ParallelContext(ParallelConfig(**job["parallel"]), seed=0, timeout_s=120) as parallel:
        if not job["resume_only"]:
            policy = build(job, parallel)
            # Before the first step there are no moments yet.
            save(policy, out / "untouched", background=True).finish()
            pending = None
            for step in range(job["steps"]):
                train_one_step(policy, step)
                if step + 1 == job["save_after"]:
                    # Training goes on while it is written: the snapshot must not see later steps.
                    pending = save(policy, saved, background=True)
                    policy.save_hf(out / "middle", like=job["path"])
            assert pending is not None
            pending.finish()
            policy.save_hf(out / "whole", like=job["path"])
        policy = build(job, parallel)
        checkpoint.load(policy, saved)
        save(policy, out / "again", background=False).finish()
        for step in range(job["save_after"], job["steps"]):
            train_one_step(policy, step)
        policy.save_hf(out / "resumed", like=job["path"])


def build(job: dict[str, Any], parallel: ParallelContext) -> Policy:
    model = ModelConfig(path=job["path"], dtype=DType[job["dtype"]])
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    shape = ModelShape.from_hf(job["path"])
    return Policy(job["path"], shape, model_config=model, parallel=parallel, optim=optim)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
