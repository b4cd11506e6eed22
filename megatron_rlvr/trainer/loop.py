"""The main loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_rlvr.advantage import compute_advantages
from megatron_rlvr.advantage.regime import group_regime
from megatron_rlvr.config.checkpoints import EXIT_RESUMABLE
from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.metrics import Max, Mean, Metric, merge, values
from megatron_rlvr.ops.exact import parse_quantile_level
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.report.live_view import LiveView
from megatron_rlvr.report.run_record import RunRecord
from megatron_rlvr.report.run_status import RunStatus
from megatron_rlvr.report.samples import choose_samples, write_samples
from megatron_rlvr.trainer.checkpoints.run_state import Progress
from megatron_rlvr.trainer.checkpoints.save_and_resume import Checkpoints
from megatron_rlvr.trainer.diagnostics.group_dynamics import group_dynamics, safety_metrics
from megatron_rlvr.trainer.diagnostics.look import Look, plan_look
from megatron_rlvr.trainer.diagnostics.measurements import Findings
from megatron_rlvr.trainer.diagnostics.monitors import keep_tokens, observe
from megatron_rlvr.trainer.endings import lost_peers_explained
from megatron_rlvr.trainer.evaluation.while_training import Evaluated
from megatron_rlvr.trainer.evaluation.while_training import evaluate as evaluate_all
from megatron_rlvr.trainer.session import Session
from megatron_rlvr.trainer.steering.levels import verdicts
from megatron_rlvr.trainer.step_clock import STEP_TIMES, StepClock
from megatron_rlvr.trainer.stopping import RunInterruptedError, StopSignals
from megatron_rlvr.trainer.update.batch import DealOptions, StepShare, UpdateBatch, deal, pack_share
from megatron_rlvr.trainer.update.steps import TrainingDivergedError, UpdateOutcome
from megatron_rlvr.types import RolloutBatch


@dataclass(kw_only=True, slots=True)
class RunSummary:
    """What a run learned."""

    steps: int
    start_accuracy: float | None
    end_accuracy: float | None
    num_problems: int
    model_dir: Path | None
    """Hugging Face folder of the trained policy."""


def train(
    config: RunConfig,
    parallel: ParallelContext,
    run_dir: Path,
    view: LiveView | None,
    record: RunRecord | None,
    stop: StopSignals,
) -> RunSummary:
    """Trains from start, or from the newest checkpoint, to end; view and record are rank 0's.

    Raises:
        RunInterruptedError: a signal asked to stop; what was done is in a checkpoint.
    """
    status = RunStatus(run_dir if parallel.ranks.is_main else None)
    with status, Session(config, parallel, run_dir, view, stop) as run:
        checkpoints = Checkpoints(run, record, status)
        try:
            with lost_peers_explained(stop):
                found = checkpoints.find()
                run.open(resumes=found is not None)
                progress = checkpoints.resume(found)
        except RunInterruptedError as request:
            status.update(state="stopped", exit_code=EXIT_RESUMABLE, reason=str(request))
            raise
        stop.hold()
        try:
            if config.train.enabled:
                train_steps(run, progress, checkpoints, record, status)
            else:
                generate_steps(run, progress, checkpoints, record, status)
            checkpoints.complete()
        except RunInterruptedError as request:
            checkpoints.save_and_stop(progress, str(request))
            raise
        finally:
            checkpoints.abandon()
        model_dir = checkpoints.save_model() if config.train.enabled and config.train.save_hf else None
        return RunSummary(
            steps=progress.step,
            start_accuracy=progress.start_accuracy,
            end_accuracy=progress.accuracy,
            num_problems=progress.num_problems,
            model_dir=model_dir,
        )


def train_steps(
    run: Session, progress: Progress, checkpoints: Checkpoints, record: RunRecord | None, status: RunStatus
) -> None:
    """The steps that are left: rollouts, update, sync, evaluation, record."""
    config = run.config
    if progress.unrecorded is not None:
        finish_step(run, progress, checkpoints, record, StepClock())
    elif progress.step == 0 and config.eval.at_start:
        start = evaluate(run, progress)
        progress.start_accuracy, progress.start_metrics = start.held_out.accuracy, values(start.as_start())
        run.note(f"before training: {progress.start_accuracy:.1%} of {progress.num_problems} held-out problems")
    clock = StepClock()
    for step in range(progress.step + 1, config.train.steps + 1):
        clock = StepClock(after=clock)
        clock.lap("record")
        checkpoints.tend()
        clock.lap("checkpoint")
        batch = run.generate(step)
        clock.lap("rollout")
        run.updater.use_loss(run.controls.loss())
        updates, advantages, metrics, look = share_out(run, batch, step)
        metrics |= run.controls.metrics(step)
        run.release_memory()
        clock.lap("train")
        run.diagnostics.start(look)
        clock.lap("diagnostics")
        outcome = run.updater.run(updates)
        settle_controls(run, batch, outcome)
        clock.lap("train")
        clock.move(run.diagnostics.seconds_in_update, "train", "diagnostics")
        findings = run.diagnostics.finish(updates)
        clock.lap("diagnostics")
        progress.step = run.policy_version = step
        progress.count_bad_updates(result.skipped for result in outcome.results)
        # Interrupted, it is a step without a sync: recorded, then saved at the boundary.
        with suppress(RunInterruptedError):
            metrics |= run.push_weights()
        clock.lap("sync")
        if step == 1 and progress.start_accuracy is not None:
            metrics |= {name: Max(value) for name, value in progress.start_metrics.items()}
        parts = [metrics, *step_metrics(outcome)]
        progress.unrecorded = summarize(run, progress, batch, advantages, parts, findings, clock)
        finish_step(run, progress, checkpoints, record, clock)
        status.update(step=step)
        refuse_divergence(progress, config.train.max_bad_updates)


def finish_step(
    run: Session, progress: Progress, checkpoints: Checkpoints, record: RunRecord | None, clock: StepClock
) -> None:
    """What follows an update: evaluation, checkpoint, record. An interrupted evaluation is made up for later."""
    config, step = run.config, progress.step
    row = progress.unrecorded
    assert row is not None
    if step == config.train.steps or (config.eval.every and step % config.eval.every == 0):
        clock.lap("record")
        row |= values(evaluate(run, progress).metrics)
        clock.lap("eval")
    progress.unrecorded = None
    # Before the checkpoint, which keeps what the monitors have seen.
    row |= observe(run, run.parallel.broadcast_object(row))
    clock.lap("record")
    if checkpoints.due(step):
        checkpoints.begin(progress, background=config.checkpoint.asynchronous)
    checkpoints.export(step)
    clock.lap("checkpoint")
    row["checkpoint/failures"] = float(checkpoints.failures)
    publish(run, row, clock, record)
    if not config.checkpoint.asynchronous:
        checkpoints.complete()


def generate_steps(
    run: Session, progress: Progress, checkpoints: Checkpoints, record: RunRecord | None, status: RunStatus
) -> None:
    """Rollouts without training, for `train.enabled=false`."""
    clock = StepClock()
    for step in range(progress.step + 1, run.config.train.steps + 1):
        clock = StepClock(after=clock)
        clock.lap("record")
        checkpoints.tend()
        clock.lap("checkpoint")
        batch = run.generate(step)
        clock.lap("rollout")
        progress.step = step
        row = summarize(run, progress, batch, [], [{}, {}, {}], NOTHING_FOUND, clock)
        clock.lap("record")
        if checkpoints.due(step):
            checkpoints.begin(progress, background=False)
        clock.lap("checkpoint")
        publish(run, row, clock, record)
        checkpoints.complete()
        status.update(step=step)


def evaluate(run: Session, progress: Progress) -> Evaluated:
    """Answers to the held-out problems and the named sets; notes the accuracy."""
    latest = evaluate_all(run, progress.step)
    held_out = latest.held_out
    progress.accuracy, progress.accuracy_at, progress.num_problems = (
        held_out.accuracy, progress.step, len(held_out.groups)
    )  # fmt: skip
    return latest


def refuse_divergence(progress: Progress, limit: int) -> None:
    """Ends a run whose updates are not finite any more.

    Raises:
        TrainingDivergedError: so many updates in a row were skipped.
    """
    if progress.bad_updates >= limit:
        raise TrainingDivergedError(
            f"the loss or gradient of {progress.bad_updates} updates in a row, up to step {progress.step}, was not "
            f"finite (train.max_bad_updates={limit}); none of them changed the weights. Look at the rewards, "
            f"rollout/logprob_diff_max and grad_norm of these steps, or lower optim.lr"
        )


NOTHING_FOUND = Findings(metrics={}, tokens=[])


def share_out(
    run: Session, batch: RolloutBatch | None, step: int
) -> tuple[list[UpdateBatch], list[np.ndarray], dict[str, Metric], Look | None]:
    """Advantages and packing on rank 0, then every rank's micro-batches of every optimizer step, and what it is to
    look at where the step is one to look at."""
    config, ranks = run.config, run.parallel.ranks
    dp_ranks = run.parallel.gather_objects(ranks.dp_rank)

    def prepare() -> tuple[list[np.ndarray], dict[str, Metric], list[tuple[list[StepShare], Look | None]]]:
        assert batch is not None
        levels, elision = run.controls.levels(batch.groups, step=step), run.elision
        advantages, metrics = compute_advantages(batch.groups, config.advantage, levels=levels)
        options = DealOptions(
            updates_per_rollout=config.train.updates_per_rollout,
            aggregation=config.loss.aggregation,
            max_response_tokens=config.rollout.max_response_tokens,
            max_tokens_per_microbatch=config.train.max_tokens_per_microbatch,
            dp_size=ranks.dp_size,
            micro_batch_multiple=ranks.pp_size if config.parallel.vpp > 1 else 1,
            elide_zero_advantage=elision.is_on,
            probed_share=elision.probed_share,
            share_prompts=run.prompts.is_on,
        )
        by_group = levels or [parse_quantile_level(config.advantage.K)] * len(batch.groups)
        regimes = [group_regime(group, level) for group, level in zip(batch.groups, by_group, strict=True)]
        metrics |= group_dynamics(batch.groups, advantages)
        if config.advantage.estimator == "qae":
            metrics |= safety_metrics(batch.groups, run.controls.levels_of_sources(batch.groups, step=step))
        shares = deal(batch.groups, advantages, options, regimes=regimes)
        looks: Sequence[Look | None] = [None] * len(shares)
        if run.diagnostics.is_due(step):
            looks = plan_look(
                batch.groups,
                advantages,
                options,
                probe_responses=config.diagnostics.probe_responses,
                samples=choose_samples(batch.groups, config.diagnostics.token_samples),
            )
        return advantages, metrics, list(zip(shares, looks, strict=True))

    prepared = run.on_main(prepare, share=False)
    advantages, metrics, shares = prepared if prepared is not None else ([], {}, [])
    box: list[tuple[list[StepShare], Look | None] | None] = [None]
    dist.scatter_object_list(
        box, [shares[dp] for dp in dp_ranks] if run.is_main else None, src=0, group=run.parallel.control_group
    )
    assert box[0] is not None
    own, look = box[0]
    pad = ranks.tp_size if config.parallel.sequence_parallel else 1
    updates = [pack_share(share, pad_to_multiple=pad, device=run.policy.device) for share in own]
    return updates, advantages, metrics, look


def settle_controls(run: Session, batch: RolloutBatch | None, outcome: UpdateOutcome) -> None:
    """Tells the controls on every rank what the step measured."""
    ranks = run.parallel.ranks
    if run.controls.settings is not None:
        counted = ranks.is_last_stage and ranks.tp_rank == 0
        mine = {name: metric for name, metric in outcome.metrics.items() if name == "entropy/mean"}
        measured = values(merge(run.parallel.gather_objects(mine if counted else {})))
        run.controls.observe(measured["entropy/mean"])
    if run.controls.group_levels.remembers:
        visits = [verdicts(group) for group in batch.groups] if batch is not None else None
        run.controls.learn(run.parallel.broadcast_object(visits))


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


def summarize(
    run: Session,
    progress: Progress,
    batch: RolloutBatch | None,
    advantages: Sequence[np.ndarray],
    parts: Sequence[dict[str, Metric]],
    findings: Findings,
    clock: StepClock,
) -> dict[str, Any]:
    """All ranks' metrics of a step as one row, on rank 0; empty on the others. Writes the step's samples."""
    ranks = run.parallel.ranks
    counted = ranks.is_last_stage and ranks.tp_rank == 0
    # Sums and means are counted once per data-parallel rank; what every rank knows alike is rank 0's.
    policy_part, *common = (parts[1], parts[0], parts[2])
    gathered = run.parallel.gather_objects((policy_part | findings.metrics, findings.tokens) if counted else ({}, []))
    if not run.is_main:
        return {}
    assert batch is not None
    flat = np.concatenate(advantages) if len(advantages) else None
    write_samples(
        run.run_dir, progress.step, batch.groups, count=run.config.logging.samples_per_step, advantages_N=flat
    )
    records = [record for _, of_rank in gathered for record in of_rank]
    keep_tokens(run, progress.step, batch, advantages, records)
    return {
        "step": progress.step,
        "policy_version": run.policy_version,
        **rollout_metrics(batch),
        **values(merge([*(metrics for metrics, _ in gathered), *common])),
        **{f"time/{name}_s": seconds for name, seconds in clock.laps.items()},
    }


def publish(run: Session, row: dict[str, Any], clock: StepClock, record: RunRecord | None) -> None:
    """Writes a step's row: metrics, report, live view."""
    if not run.is_main:
        return
    assert record is not None
    row |= {f"time/{name}_s": seconds for name, seconds in clock.laps.items()}
    laps = {name: row[name] for name in row if name.startswith("time/") and name.removeprefix("time/") in STEP_TIMES}
    row["time/step_s"] = sum(laps.values())
    row["tokens_per_s"] = float(row["rollout/num_tokens"] or 0.0) / row["time/step_s"]
    record.write(row)
    if run.view is not None:
        run.view.update(row)
