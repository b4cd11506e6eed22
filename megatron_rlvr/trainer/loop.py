"""The main loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_rlvr.advantage import compute_advantages
from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.metrics import Max, Mean, Metric, merge, values
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.report.html_report import write_report
from megatron_rlvr.report.live_view import LiveView
from megatron_rlvr.report.metrics_writer import MetricsWriter
from megatron_rlvr.report.samples import write_samples
from megatron_rlvr.trainer.batch import DealOptions, StepShare, UpdateBatch, deal, pack_share
from megatron_rlvr.trainer.session import Session
from megatron_rlvr.trainer.update import UpdateOutcome
from megatron_rlvr.types import EvalBatch, RolloutBatch


@dataclass(kw_only=True, slots=True)
class RunSummary:
    """What a run learned."""

    steps: int
    start_accuracy: float | None
    end_accuracy: float
    num_problems: int
    model_dir: Path | None
    """Hugging Face folder of the trained policy."""


def train(
    config: RunConfig, parallel: ParallelContext, run_dir: Path, view: LiveView | None, writer: MetricsWriter | None
) -> RunSummary:
    """Trains from start to end; view and writer are rank 0's."""
    with Session(config, parallel, run_dir, view) as run:
        run.open()
        start = run.evaluate() if config.eval.at_start else None
        if start is not None:
            run.note(f"before training: {start.accuracy:.1%} of {len(start.groups)} held-out problems")
        latest = start
        for step in range(1, config.train.steps + 1):
            clock = StepClock()
            batch = run.generate(step)
            clock.lap("rollout")
            updates, advantages, metrics = share_out(run, batch)
            if step == 1 and start is not None:
                metrics |= {
                    "eval/start_accuracy": Max(start.accuracy),
                    "eval/num_problems": Max(float(len(start.groups))),
                }
            outcome = run.updater.run(updates)
            clock.lap("train")
            run.policy_version = step
            run.push_weights()
            clock.lap("sync")
            if step == config.train.steps or (config.eval.every and step % config.eval.every == 0):
                latest = run.evaluate()
                clock.lap("eval")
                metrics |= evaluation_metrics(latest)
            record(run, step, batch, advantages, [metrics, *step_metrics(outcome)], clock, writer)
        assert latest is not None
        model_dir = run_dir / "model" if config.train.save_hf else None
        if model_dir is not None:
            run.policy.save_hf(model_dir, like=run.policy.path)
        return RunSummary(
            steps=config.train.steps,
            start_accuracy=start.accuracy if start is not None else None,
            end_accuracy=latest.accuracy,
            num_problems=len(latest.groups),
            model_dir=model_dir,
        )


class StepClock:
    """Wall-clock seconds of the parts of a step."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Books the time since the last lap under `name`."""
        now = time.monotonic()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def share_out(
    run: Session, batch: RolloutBatch | None
) -> tuple[list[UpdateBatch], list[np.ndarray], dict[str, Metric]]:
    """Advantages and packing on rank 0, then every rank's micro-batches of every optimizer step."""
    config, ranks = run.config, run.parallel.ranks
    dp_ranks = run.parallel.gather_objects(ranks.dp_rank)

    def prepare() -> tuple[list[np.ndarray], dict[str, Metric], list[list[StepShare]]]:
        assert batch is not None
        advantages, metrics = compute_advantages(batch.groups, config.advantage)
        options = DealOptions(
            updates_per_rollout=config.train.updates_per_rollout,
            aggregation=config.loss.aggregation,
            max_response_tokens=config.rollout.max_response_tokens,
            max_tokens_per_microbatch=config.train.max_tokens_per_microbatch,
            dp_size=ranks.dp_size,
            micro_batch_multiple=ranks.pp_size if config.parallel.vpp > 1 else 1,
            elide_zero_advantage=run.elides_zero_advantage,
        )
        return advantages, metrics, deal(batch.groups, advantages, options)

    prepared = run.on_main(prepare, share=False)
    advantages, metrics, shares = prepared if prepared is not None else ([], {}, [])
    box: list[list[StepShare] | None] = [None]
    dist.scatter_object_list(
        box, [shares[dp] for dp in dp_ranks] if run.is_main else None, src=0, group=run.parallel.control_group
    )
    assert box[0] is not None
    pad = ranks.tp_size if config.parallel.sequence_parallel else 1
    updates = [pack_share(share, pad_to_multiple=pad, device=run.policy.device) for share in box[0]]
    return updates, advantages, metrics


def step_metrics(outcome: UpdateOutcome) -> list[dict[str, Metric]]:
    """The update's metrics and what the optimizer did."""
    grad_norms: dict[str, Metric] = {
        "grad_norm": Mean(sum(result.grad_norm for result in outcome.results), len(outcome.results)),
        "optim/lr": Max(outcome.results[-1].lr),
        "optim/skipped_updates": Max(sum(result.skipped for result in outcome.results)),
    }
    return [outcome.metrics, grad_norms]


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Rewards, correctness and lengths of a batch."""
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts if rollout.valid]
    rewards = np.array([rollout.reward + rollout.penalty for rollout in rollouts])
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/max": float(rewards.max()),
        "reward/accuracy": float(np.mean([rollout.correctness for rollout in rollouts])),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated_fraction": float(np.mean([r.finish_reason.value == "length" for r in rollouts])),
        "rollout/num_responses": float(len(rollouts)),
        "rollout/num_tokens": float(lengths.sum()),
    }
    for source in sorted({group.prompt.data_source for group in batch.groups}):
        of_source = [
            rollout.correctness
            for group in batch.groups
            if group.prompt.data_source == source
            for rollout in group.rollouts
            if rollout.valid
        ]
        if of_source:
            metrics[f"reward/accuracy/{source}"] = float(np.mean(of_source))
    return metrics | batch.metrics


def evaluation_metrics(batch: EvalBatch) -> dict[str, Metric]:
    """Held-out accuracy as plain metrics."""
    return {"eval/accuracy": Max(batch.accuracy), "eval/num_problems": Max(float(len(batch.groups)))}


def record(
    run: Session,
    step: int,
    batch: RolloutBatch | None,
    advantages: Sequence[np.ndarray],
    parts: Sequence[dict[str, Metric]],
    clock: StepClock,
    writer: MetricsWriter | None,
) -> None:
    """Merges all ranks' metrics and writes the step: metrics, samples, report, live view."""
    ranks = run.parallel.ranks
    counted = ranks.is_last_stage and ranks.tp_rank == 0
    # Sums and means are counted once per data-parallel rank; what every rank knows alike is rank 0's.
    policy_part, *common = (parts[1], parts[0], parts[2])
    gathered = run.parallel.gather_objects(policy_part if counted else {})
    if not run.is_main:
        return
    assert batch is not None
    assert writer is not None
    merged = values(merge([*gathered, *common]))
    total_s = sum(seconds for name, seconds in clock.laps.items() if name != "eval")
    row: dict[str, float | int | str | None] = {
        "step": step,
        "policy_version": run.policy_version,
        **rollout_metrics(batch),
        **merged,
        **{f"time/{name}_s": seconds for name, seconds in clock.laps.items()},
        "time/step_s": total_s,
    }
    row["tokens_per_s"] = float(row["rollout/num_tokens"] or 0.0) / total_s
    writer.write(row)
    flat = np.concatenate(advantages) if len(advantages) else None
    write_samples(run.run_dir, step, batch.groups, count=run.config.logging.samples_per_step, advantages_N=flat)
    write_report(run.run_dir)
    if run.view is not None:
        run.view.update(row)
