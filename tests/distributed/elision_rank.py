"""One rank of updates on rollout batches, with and without the responses of zero advantage; run by test_elision.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.advantage import compute_advantages
from megatron_rlvr.config.schema import (
    AdvantageConfig,
    ClipCovConfig,
    CovLogp,
    DType,
    KlCovConfig,
    LossConfig,
    MismatchConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RatioLevel,
)
from megatron_rlvr.data.packing import unpack_responses
from megatron_rlvr.metrics import merge, values
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.trainer.update.batch import DealOptions, deal, pack_share
from megatron_rlvr.trainer.update.steps import Updater
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup
from megatron_rlvr.weights.hf_config import ModelShape

# By name: the loss section, updates a rollout batch, share of elided responses that have a forward pass.
CASES: dict[str, tuple[LossConfig, int, float]] = {
    "ppo": (LossConfig(), 1, 1.0),
    "ppo, none probed": (LossConfig(), 1, 0.0),
    "gspo, two updates, TIS": (LossConfig(name="gspo", mismatch=MismatchConfig(weight=RatioLevel.token)), 2, 0.3),
    "clip_cov": (
        LossConfig(name="clip_cov", clip_cov=ClipCovConfig(ratio="0.2", lower=0.0, upper=9.0)),
        2,
        1.0,
    ),
    "kl_cov": (LossConfig(name="kl_cov", kl_cov=KlCovConfig(ratio="0.2", skip_zero_advantage=True)), 2, 1.0),
    "kl_cov, engine's log-probs": (
        LossConfig(name="kl_cov", kl_cov=KlCovConfig(ratio="0.2", skip_zero_advantage=True), cov_mass=0.5),
        1,
        0.0,
    ),
    "clip_cov, current": (
        LossConfig(name="clip_cov", cov_logp=CovLogp.current, clip_cov=ClipCovConfig(ratio="0.2", lower=0.0)),
        1,
        0.0,
    ),
}


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


def run_case(
    case: tuple[LossConfig, int, float], job: dict[str, Any], parallel: ParallelContext, *, elide: bool, out: Path
) -> list[dict[str, float]]:
    """Two rollout batches, the second of zero advantages alone; writes the trained model."""
    loss, num_updates, probed_share = case
    ranks = parallel.ranks
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    model = ModelConfig(path=job["path"], dtype=DType.fp32)
    shape = ModelShape.from_hf(job["path"])
    policy = Policy(job["path"], shape, model_config=model, parallel=parallel, optim=optim)
    updater = Updater(policy, parallel, loss=loss, optim=optim, temperature=1.0, seed=0, total_updates=4)
    rows = []
    for all_wrong in (False, True):
        batch = groups(shape.vocab_size, all_wrong=all_wrong)
        advantages, _ = compute_advantages(batch, AdvantageConfig())
        options = DealOptions(
            updates_per_rollout=num_updates,
            aggregation="token-mean",
            max_response_tokens=8,
            max_tokens_per_microbatch=40,
            dp_size=ranks.dp_size,
            micro_batch_multiple=ranks.pp_size if parallel.config.vpp > 1 else 1,
            elide_zero_advantage=elide,
            probed_share=probed_share,
        )
        if probed_share == 0.0:
            sample_with(policy, batch, advantages, options, parallel)
        shares = deal(batch, advantages, options)[ranks.dp_rank]
        outcome = updater.run([pack_share(share, pad_to_multiple=1, device=policy.device) for share in shares])
        counted = ranks.is_last_stage and ranks.tp_rank == 0
        merged = values(merge(parallel.gather_objects(outcome.metrics if counted else {})))
        rows.append(merged | {"grad_norm": max(result.grad_norm for result in outcome.results)})
    policy.save_hf(out, like=job["path"])
    return rows


def sample_with(policy: Policy, batch: list[RolloutGroup], advantages: list, options: DealOptions, parallel) -> None:
    """Puts the policy's own log-probs where the engine's go: an engine without mismatch."""
    whole = replace(options, elide_zero_advantage=False, updates_per_rollout=1)
    [share] = deal(batch, advantages, whole)[parallel.ranks.dp_rank]
    micro_batches = pack_share(share, pad_to_multiple=1, device=policy.device).micro_batches
    once = policy.logprobs(micro_batches, temperature=1.0)
    mine: dict[int, np.ndarray] = {}
    for micro, logprobs_T in zip(micro_batches, once.logprobs, strict=False):
        mine |= unpack_responses(logprobs_T, micro)
    everyones: dict[int, np.ndarray] = {}
    for part in parallel.gather_objects(mine):
        everyones |= part
    for trajectory, rollout in enumerate(rollout for group in batch for rollout in group.rollouts):
        rollout.rollout_logprobs = everyones[trajectory]


def main(job: dict[str, Any]) -> None:
    with ParallelContext(ParallelConfig(**job["parallel"]), seed=0, timeout_s=120) as parallel:
        found: dict[str, Any] = {}
        for number, (name, case) in enumerate(CASES.items()):
            for kind in ("full", "less"):
                out = Path(job["out"]) / f"{kind}-{number}"
                rows = run_case(case, job, parallel, elide=kind == "less", out=out)
                found.setdefault(name, {})[kind] = {"rows": rows, "weights": str(out / "model.safetensors")}
        if parallel.ranks.is_main:
            (Path(job["out"]) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
