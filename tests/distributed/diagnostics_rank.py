"""One rank of updates that are looked at, or not; run by test_diagnostics.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.advantage import compute_advantages
from megatron_rlvr.config.schema import (
    AdvantageConfig,
    DiagnosticsConfig,
    DType,
    KlCovConfig,
    KlKind,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from megatron_rlvr.data.packing import unpack_responses
from megatron_rlvr.entropy.dynamics import attribute, token_coefficients
from megatron_rlvr.metrics import merge, values
from megatron_rlvr.policy.forward import TokenLoss
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.report.samples import choose_samples
from megatron_rlvr.trainer.diagnostics.look import plan_look
from megatron_rlvr.trainer.diagnostics.measurements import Diagnostics
from megatron_rlvr.trainer.update.batch import DealOptions, deal, pack_share
from megatron_rlvr.trainer.update.steps import Updater
from megatron_rlvr.types import MicroBatch, RolloutGroup
from megatron_rlvr.weights.hf_config import ModelShape
from tests.distributed.elision_rank import groups

TEMPERATURE = 0.2
"""Sharp enough for a random model's entropy to move."""


def batch_of(vocab_size: int) -> list[RolloutGroup]:
    """Two data sources that take turns."""
    made = groups(vocab_size, all_wrong=False)
    return [replace(g, prompt=replace(g.prompt, data_source=("sums", "words")[g.index % 2])) for g in made]


class Witness:
    """Passes on to the diagnostics, and computes P3 beside them as the specification writes it: mean of w A s."""

    def __init__(self, diagnostics: Diagnostics, loss: LossConfig) -> None:
        self.diagnostics = diagnostics
        self.loss = loss
        self.found: list[dict[str, Any]] = []

    def before_update(self, micro_batches: Sequence[MicroBatch], token_loss: TokenLoss) -> None:
        self.diagnostics.before_update(micro_batches, token_loss)
        policy = self.diagnostics.policy
        every = policy.runner.moments(micro_batches, temperature=TEMPERATURE)
        A, s, w, regimes = [], [], [], []
        for micro, moments in zip(micro_batches, every, strict=False):
            mask = micro.loss_mask_T
            logprobs = moments.logprobs_T[mask].double()
            old = logprobs if micro.old_logprobs_T is None else micro.old_logprobs_T[mask].double()
            advantages = micro.advantages_T[mask].double().numpy()
            ratio = (logprobs - old).exp().numpy()
            clipped = ((advantages > 0) & (ratio > 1 + self.loss.eps_high)) | (
                (advantages < 0) & (ratio < 1 - self.loss.eps_low)
            )
            A.append(advantages)
            w.append(np.where(clipped, 0.0, ratio))
            s.append(
                token_coefficients(
                    logprobs.numpy(), moments.entropy_T[mask].numpy(), moments.sum_p2_logp_T[mask].numpy()
                )
            )
            order = sorted(unpack_responses(micro.advantages_T, micro).items())
            assert len(order) == len(micro.regimes)
            lengths = [len(v) for v in unpack_responses(micro.advantages_T, micro).values()]
            regimes += [r for r, length in zip(micro.regimes, lengths, strict=True) for _ in range(length)]
        if A:
            found = attribute(np.concatenate(A), np.concatenate(s), np.concatenate(w), regimes)
            self.found.append({"total": found.total, "positive": found.positive, "negative": found.negative,
                               **found.by_label})  # fmt: skip


def main(job: dict[str, Any]) -> None:
    shape = ModelShape.from_hf(job["path"])
    with ParallelContext(ParallelConfig(**job["parallel"]), seed=0, timeout_s=120) as parallel:
        ranks = parallel.ranks
        optim = OptimConfig(lr=job["lr"], weight_decay=0.1, eps=1e-3)
        policy = Policy(job["path"], shape, model_config=ModelConfig(path=job["path"], dtype=DType.fp32),
                        parallel=parallel, optim=optim)  # fmt: skip
        # A smooth penalty: the sign of a log ratio of 1e-5 is rounding noise, which differs between layouts.
        loss = LossConfig(name=job["loss"], eps_high=0.02, kl_cov=KlCovConfig(ratio="0.2", kl=KlKind.k2))
        config = DiagnosticsConfig(every=1 if job["look"] else 0)
        diagnostics = Diagnostics(policy, parallel, config=config, temperature=TEMPERATURE)
        witness = Witness(diagnostics, loss)
        updater = Updater(policy, parallel, loss=loss, optim=optim, temperature=TEMPERATURE, seed=0, total_updates=8,
                          observer=witness if job["witness"] else diagnostics)  # fmt: skip
        batch = batch_of(shape.vocab_size)
        advantages, _ = compute_advantages(batch, AdvantageConfig())
        options = DealOptions(
            updates_per_rollout=job["updates"],
            aggregation="token-mean",
            max_response_tokens=8,
            max_tokens_per_microbatch=40,
            dp_size=ranks.dp_size,
            micro_batch_multiple=1,
            elide_zero_advantage=job["updates"] == 1 and job["loss"] == "ppo" and not job["witness"],
        )
        regimes = ["hard" if i < 3 else "easy" for i in range(len(batch))]
        shares = deal(batch, advantages, options, regimes=regimes)[ranks.dp_rank]
        looks = plan_look(batch, advantages, options, probe_responses=16, samples=choose_samples(batch, 4))
        rows, tokens = [], []
        for step in (1, 2):
            updates = [pack_share(share, pad_to_multiple=1, device=policy.device) for share in shares]
            diagnostics.start(looks[ranks.dp_rank] if diagnostics.is_due(step) else None)
            outcome = updater.run(updates)
            findings = diagnostics.finish(updates)
            counted = ranks.is_last_stage and ranks.tp_rank == 0
            parts = parallel.gather_objects((outcome.metrics | findings.metrics, findings.tokens) if counted else None)
            rows.append(values(merge([metrics for metrics, _ in filter(None, parts)])))
            tokens.append(sorted(
                (r.update, r.trajectory, r.logprobs, r.covariance, r.selected, r.entropy)
                for _, records in filter(None, parts) for r in records
            ))  # fmt: skip
        policy.save_hf(job["out"], like=job["path"])
        if ranks.is_main:
            result = {"rows": rows, "tokens": tokens, "witness": witness.found}
            Path(job["out"]).with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
