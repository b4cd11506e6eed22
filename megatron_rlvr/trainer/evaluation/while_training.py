"""Evaluations while training: the held-out problems and the named sets, with every problem's answers kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.config.schema import EvalSetConfig
from megatron_rlvr.metrics import Max, Metric
from megatron_rlvr.rollout.evaluate import HELD_OUT
from megatron_rlvr.trainer.evaluation.records import (
    Record,
    flat_metrics,
    levels_of,
    record_of,
    summarize,
    write_records,
)
from megatron_rlvr.trainer.session import Session
from megatron_rlvr.types import EvalBatch

EVAL_DIR = "eval"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """What one evaluation found, the same on every rank but for the answers, which rank 0 has."""

    held_out: EvalBatch
    metrics: dict[str, Metric]
    """Of the step after which it was made."""

    def as_start(self) -> dict[str, Metric]:
        """The metrics under the names of an evaluation before the first step."""
        renamed: dict[str, Metric] = {}
        for key, metric in self.metrics.items():
            head, _, name = key.rpartition("/")
            renamed[key if name == "num_problems" else f"{head}/start_{name}"] = metric
        return renamed


def evaluate(run: Session, step: int) -> Evaluated:
    """Evaluates the weights that the servers hold; collective over the trainer's ranks.

    Answers go to ``<run>/eval/<set>/step_<step>.jsonl`` (`eval_records`), the held-out problems' to ``held_out``.

    Args:
        step: completed rollout steps.
    """
    held_out = run.evaluate()
    metrics: dict[str, Metric] = {
        "eval/accuracy": Max(held_out.accuracy),
        "eval/num_problems": Max(float(len(held_out.groups))),
    }

    def rest() -> dict[str, float]:
        greedy = run.config.eval.temperature == 0.0
        records = [record_of(group, set_name=HELD_OUT, greedy=greedy) for group in held_out.groups]
        write_records(records_path(run.run_dir, HELD_OUT, step), records)
        found: dict[str, float] = {}
        for spec in run.config.eval.sets:
            found |= _evaluate_set(run, spec, step)
        return found

    return Evaluated(held_out=held_out, metrics=metrics | {key: Max(value) for key, value in run.on_main(rest).items()})


def records_path(run_dir: Path, name: str, step: int) -> Path:
    """Where the answers of an evaluation lie."""
    return run_dir / EVAL_DIR / name / f"step_{step:06d}.jsonl"


def _evaluate_set(run: Session, spec: EvalSetConfig, step: int) -> dict[str, float]:
    """On rank 0: the sampled and the greedy answers of one set, as metrics."""
    records: list[Record] = []
    for key, greedy in ((spec.name, False), (f"{spec.name}/greedy", True)):
        if not (spec.greedy if greedy else spec.num_samples):
            continue
        batch = run.answer_set(key)
        records += [record_of(group, set_name=spec.name, greedy=greedy) for group in batch.groups]
    write_records(records_path(run.run_dir, spec.name, step), records)
    summary = summarize(records, k=levels_of(spec), seed=run.config.train.seed)
    return flat_metrics(spec.name, summary)
