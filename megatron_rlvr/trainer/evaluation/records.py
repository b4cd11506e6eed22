"""Answers to evaluation problems on disk, a line a problem, and the numbers that follow from them.

Every line holds all samples of one problem: their texts, verdicts, lengths and ends. A summary is computed from such
lines and nothing else, so that it can be computed again from the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.config.schema import EvalSetConfig
from megatron_rlvr.entropy.passk import PassAtK, pass_at_k_with_interval
from megatron_rlvr.types import FinishReason, RolloutGroup, VerifierStatus

SAMPLED, GREEDY = "sampled", "greedy"
VERIFIER_FAILURES = (VerifierStatus.timeout.value, VerifierStatus.crash.value)
Record = dict[str, Any]


def record_of(group: RolloutGroup, *, set_name: str, greedy: bool) -> Record:
    """A problem with its answers, as it is written.

    Returns:
        ``uid, set, mode, data_source, prompt, answer, samples``; a sample has ``text, correct`` (bool), ``reward,
        length`` (tokens), ``finish_reason, verifier``.
    """
    return {
        "uid": group.prompt.uid,
        "set": set_name,
        "mode": GREEDY if greedy else SAMPLED,
        "data_source": group.prompt.data_source,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "samples": [
            {
                "text": rollout.text,
                "correct": rollout.correctness > 0.5,
                "reward": rollout.reward,
                "length": len(rollout.response_ids),
                "finish_reason": rollout.finish_reason.value,
                "verifier": rollout.verifier_status.value,
            }
            for rollout in group.rollouts
        ],
    }


def is_complete(group: RolloutGroup) -> bool:
    """Whether every answer ended by itself or by its length: an answer that a server aborted says nothing of the model
    and must be asked for again."""
    return all(rollout.finish_reason is not FinishReason.abort for rollout in group.rollouts)


class RecordWriter:
    """Appends problems to a file, each on disk before `write` returns.

    Args:
        path: the file; a last line that was cut off by a kill is removed.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def write(self, record: Record) -> None:
        """Appends one problem."""
        self._file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes a whole evaluation; the file appears in one step, in the place of an earlier one of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with RecordWriter(part) as writer:
        for record in records:
            writer.write(record)
    part.replace(path)


def read_records(path: Path) -> list[Record]:
    """The problems of a file, in the order in which they were finished; none where there is no file.

    Raises:
        ValueError: a line is not such a problem; named by file and line.
    """
    if not path.exists():
        return []
    records = []
    *whole_lines, _torn = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(whole_lines, start=1):
        try:
            record = json.loads(line)
            record["uid"], record["mode"], record["samples"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not an evaluated problem: {error!r}") from error
        records.append(record)
    return records


def summarize(
    records: Iterable[Record], *, k: Sequence[int], level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, float | int]]:
    """Numbers of one set.

    Args:
        records: of one set, each problem and mode once.
        k: pass@k to compute from the sampled answers.
        level: nominal coverage of the intervals, which resample the problems (exact bounds where none or all were
            solved).
        seed: of the resampling.

    Returns:
        By name: ``pass@<k>`` of the sampled answers and ``greedy`` of the greedy ones, each ``mean, low, high`` (ends
        of the interval) and ``num_problems``; ``sampled`` and ``greedy_answers`` describe the answers themselves.
    """
    by_mode: dict[str, list[Record]] = {SAMPLED: [], GREEDY: []}
    for record in records:
        by_mode[record["mode"]].append(record)
    summary: dict[str, dict[str, float | int]] = {}
    for mode, described in ((SAMPLED, "sampled"), (GREEDY, "greedy_answers")):
        chosen = by_mode[mode]
        if not chosen:
            continue
        counts = [len(record["samples"]) for record in chosen]
        right = [sum(sample["correct"] for sample in record["samples"]) for record in chosen]
        wanted = [(f"pass@{each}", each) for each in k] if mode == SAMPLED else [("greedy", 1)]
        for name, each in wanted:
            estimate = pass_at_k_with_interval(counts, right, each, level=level, seed=seed)
            low, high = _ends(estimate)
            summary[name] = {
                "mean": estimate.mean,
                "low": low,
                "high": high,
                "num_problems": estimate.num_problems,
            }
        summary[described] = _describe(chosen)
    return summary


def _ends(estimate: PassAtK) -> tuple[float, float]:
    """The interval's ends. Where no problem was solved, or every one, resampling knows no spread: there the exact
    (Clopper-Pearson) bound on the share of such problems says what so few of them can exclude."""
    tail = ((1 - estimate.level) / 2) ** (1 / estimate.num_problems)
    if estimate.mean == 0.0:
        return 0.0, 1.0 - tail
    if estimate.mean == 1.0:
        return tail, 1.0
    return estimate.low, estimate.high


def _describe(records: Sequence[Record]) -> dict[str, float | int]:
    samples = [sample for record in records for sample in record["samples"]]
    lengths = [sample["length"] for sample in samples]
    return {
        "num_samples": len(samples),
        "num_correct": sum(sample["correct"] for sample in samples),
        "length_mean": sum(lengths) / len(samples),
        "length_max": max(lengths),
        "truncated_fraction": sum(s["finish_reason"] == FinishReason.length.value for s in samples) / len(samples),
        # The model's own doing, unlike a verifier that ran out of time or died.
        "unparsable_fraction": sum(s["verifier"] == VerifierStatus.unparsable.value for s in samples) / len(samples),
        "verifier_failures": sum(s["verifier"] in VERIFIER_FAILURES for s in samples),
    }


def flat_metrics(name: str, summary: Mapping[str, Mapping[str, float | int]]) -> dict[str, float]:
    """A set's summary as metrics of a training step.

    Returns:
        ``eval/<name>/pass@<k>`` and ``eval/<name>/greedy`` with ``_low`` and ``_high``, ``eval/<name>/num_problems``,
        ``eval/<name>/length_mean`` (tokens) and ``eval/<name>/truncated_fraction``.
    """
    metrics: dict[str, float] = {}
    for key, fields in summary.items():
        if "mean" in fields:
            metrics[f"eval/{name}/{key}"] = fields["mean"]
            metrics[f"eval/{name}/{key}_low"] = fields["low"]
            metrics[f"eval/{name}/{key}_high"] = fields["high"]
            seen = metrics.get(f"eval/{name}/num_problems", 0)
            metrics[f"eval/{name}/num_problems"] = max(seen, fields["num_problems"])
    described = summary.get("sampled", summary.get("greedy_answers"))
    if described is not None:
        metrics[f"eval/{name}/length_mean"] = described["length_mean"]
        metrics[f"eval/{name}/truncated_fraction"] = described["truncated_fraction"]
    return metrics


def levels_of(spec: EvalSetConfig) -> list[int]:
    """The k of a set's pass@k, none where nothing is sampled."""
    return list(spec.k) if spec.num_samples else []
