"""Sampled rollouts as text a person can read: ``samples/step_000012.txt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rlvr.types import Rollout, RolloutGroup, VerifierStatus

SAMPLES_DIR = "samples"
CONTENT_MARK = "│ "
"""Stands before every line of a prompt or response, so that no text can look like a heading."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One rollout that is shown, with its place in the batch."""

    group: RolloutGroup
    group_index: int
    """Index of the group in the batch."""
    number: int
    """Index of the rollout in its group."""
    advantage: float | None


def write_samples(
    run_dir: Path,
    step: int,
    groups: Sequence[RolloutGroup],
    *,
    count: int,
    advantages_N: np.ndarray | None = None,
) -> Path | None:
    """Writes up to `count` rollouts of a step, groups with both right and wrong answers first.

    From every group comes one right and one wrong response where there are both, so that a reader sees what the
    reward told apart. The choice is a function of the batch alone.

    Args:
        run_dir: The run's folder.
        step: Rollout step, in the file's name.
        groups: The step's groups.
        count: Rollouts to write; with 0 nothing is written.
        advantages_N: float [N], an advantage for every rollout in the order of the groups, where known.

    Returns:
        The file, or None when there was nothing to write.

    Raises:
        ValueError: another number of advantages than of rollouts.
    """
    total = sum(len(group.rollouts) for group in groups)
    if advantages_N is not None and len(advantages_N) != total:
        raise ValueError(f"advantages_N must have one entry per rollout ({total}), got {len(advantages_N)}")
    samples = choose_samples(groups, count, advantages_N)
    if not samples:
        return None
    lines = [f"step {step}", ""]
    shown: RolloutGroup | None = None
    for sample in samples:
        if sample.group is not shown:
            lines += _prompt_lines(sample.group)
            shown = sample.group
        lines += _response_lines(sample)
    path = Path(run_dir) / SAMPLES_DIR / f"step_{step:06d}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def remove_samples(run_dir: Path, *, after: int) -> None:
    """Removes the files of steps after `after`, which a resumed run does again."""
    for path in (Path(run_dir) / SAMPLES_DIR).glob("*_*.*"):
        if int(path.stem.partition("_")[2]) > after:
            path.unlink()


def choose_samples(groups: Sequence[RolloutGroup], count: int, advantages_N: np.ndarray | None = None) -> list[Sample]:
    """Up to `count` rollouts as `write_samples` shows them, with the same arguments."""
    starts = np.cumsum([0, *(len(group.rollouts) for group in groups)])
    by_interest = sorted(range(len(groups)), key=lambda i: not groups[i].mixed)
    samples: list[Sample] = []
    for i in by_interest:
        for number in _telling_pair(groups[i]):
            if len(samples) == count:
                return samples
            advantage = None if advantages_N is None else float(advantages_N[starts[i] + number])
            samples.append(Sample(group=groups[i], group_index=i, number=number, advantage=advantage))
    return samples


def _telling_pair(group: RolloutGroup) -> list[int]:
    """The first right and the first wrong response; the first of all where every one got the same verdict."""
    right = [i for i, rollout in enumerate(group.rollouts) if rollout.correctness > 0.5]
    wrong = [i for i, rollout in enumerate(group.rollouts) if rollout.correctness <= 0.5]
    return [*right[:1], *wrong[:1]]


def _prompt_lines(group: RolloutGroup) -> list[str]:
    right = sum(rollout.correctness > 0.5 for rollout in group.rollouts)
    prompt = group.prompt
    heading = f"prompt {prompt.uid} ({prompt.data_source}): {right} of {len(group.rollouts)} right"
    answer = [] if prompt.answer is None else [f"reference answer: {' '.join(str(prompt.answer).split())[:200]}"]
    return [heading, *answer, *_marked(prompt.text), ""]


def _response_lines(sample: Sample) -> list[str]:
    rollout: Rollout = sample.group.rollouts[sample.number]
    verdict = "right" if rollout.correctness > 0.5 else "wrong"
    parts = [f"response {sample.number} {verdict}", f"reward {rollout.reward + rollout.penalty:.3g}"]
    if sample.advantage is not None:
        parts.append(f"advantage {sample.advantage:+.3f}")
    parts += [f"{len(rollout.response_ids)} tokens", f"finished by {rollout.finish_reason.value}"]
    if rollout.verifier_status is not VerifierStatus.ok:
        parts.append(f"verifier: {rollout.verifier_status.value}")
    return [", ".join(parts), *_marked(rollout.text), ""]


def _marked(text: str) -> list[str]:
    return [CONTENT_MARK + line for line in text.splitlines() or [""]]
