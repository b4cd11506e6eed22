"""One rank of an update on a rollout batch, with or without the responses of zero advantage; run by test_elision.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.advantage import compute_advantages
from megatron_rlvr.config.schema import AdvantageConfig, DType, LossConfig, ModelConfig, OptimConfig, ParallelConfig
from megatron_rlvr.metrics import merge, values
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.trainer.batch import DealOptions, deal, pack_share
from megatron_rlvr.trainer.update import Updater
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup
from megatron_rlvr.weights.hf_config import ModelShape


def groups(vocab_size: int, *, all_wrong: bool) -> list[RolloutGroup]:
    """Six prompts of four responses, from all wrong to all right."""
    rng = np.random.default_rng(1)
    made = []
    for index in range(6):
        rollouts = []
        for number in range(4):
            ids = rng.integers(0, vocab_size, rng.integers(1, 8)).astype(np.int32)
            right = float(number < index % 5 and not all_wrong)
            rollouts.append(
                Rollout(
                    response_ids=ids,
                    rollout_logprobs=rng.normal(size=len(ids)).astype(np.float32) - 5,
                    text="",
                    finish_reason=FinishReason.stop,
                    weight_versions=[(0, 0, len(ids))],
                    correctness=right,
                    reward=right,
                )
            )
        prompt_ids = rng.integers(0, vocab_size, 5).astype(np.int32)
        prompt = Prompt(uid=f"train/{index}", text="", input_ids=prompt_ids, answer="", data_source="made")
        made.append(RolloutGroup(prompt=prompt, rollouts=rollouts, index=index))
    return made


def main(job: dict[str, Any]) -> None:
    shape = ModelShape.from_hf(job["path"])
    with ParallelContext(ParallelConfig(**job["parallel"]), seed=0, timeout_s=120) as parallel:
        ranks = parallel.ranks
        optim = OptimConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
        model = ModelConfig(path=job["path"], dtype=DType.fp32)
        policy = Policy(job["path"], shape, model_config=model, parallel=parallel, optim=optim)
        updater = Updater(policy, parallel, loss=LossConfig(), optim=optim, temperature=1.0, seed=0, total_updates=2)
        rows = []
        for all_wrong in (False, True):
            batch = groups(shape.vocab_size, all_wrong=all_wrong)
            advantages, _ = compute_advantages(batch, AdvantageConfig())
            options = DealOptions(
                updates_per_rollout=1,
                aggregation="token-mean",
                max_response_tokens=8,
                max_tokens_per_microbatch=40,
                dp_size=ranks.dp_size,
                micro_batch_multiple=ranks.pp_size if parallel.config.vpp > 1 else 1,
                elide_zero_advantage=job["elide"],
            )
            [share] = deal(batch, advantages, options)[ranks.dp_rank]
            outcome = updater.run([pack_share(share, pad_to_multiple=1, device=policy.device)])
            counted = ranks.is_last_stage and ranks.tp_rank == 0
            merged = values(merge(parallel.gather_objects(outcome.metrics if counted else {})))
            rows.append(merged | {"grad_norm": outcome.results[0].grad_norm})
        policy.save_hf(job["out"], like=job["path"])
        if ranks.is_main:
            Path(job["out"]).with_suffix(".json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
