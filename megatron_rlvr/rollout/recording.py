"""Rollouts on disk: one ``.npz`` a step or evaluation, with plain arrays and one JSON text, and nothing that runs code.

What the verifier needed beside the answer (`Prompt.metadata`) is left out: replayed responses have their verdict.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.types import (
    EvalBatch,
    FinishReason,
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutGroup,
    VerifierStatus,
)

FOLDER = "rollouts"
"""Name of the folder in a run's folder."""


def step_file(folder: Path, step: int) -> Path:
    """Where the batch of a step lies."""
    return folder / f"step_{step:06d}.npz"


def evaluation_file(folder: Path, policy_version: int, key: str | None = None) -> Path:
    """Where the evaluation of a policy version lies: of the held-out problems, or of a named set by its key."""
    suffix = "" if key is None else "_" + key.replace("/", "-")
    return folder / f"eval_{policy_version:06d}{suffix}.npz"


def write_batch(path: Path, batch: RolloutBatch | EvalBatch) -> None:
    """Writes a batch; the file appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
    index = {"groups": [_describe(group) for group in batch.groups], "metrics": batch.metrics}
    fresh = path.with_name(f".{path.name}")
    with fresh.open("wb") as file:
        np.savez_compressed(
            file,
            index=np.frombuffer(json.dumps(index).encode(), np.uint8),
            prompt_ids=_joined([group.prompt.input_ids for group in batch.groups], np.int32),
            prompt_lengths=np.array([len(group.prompt.input_ids) for group in batch.groups], np.int64),
            response_ids=_joined([rollout.response_ids for rollout in rollouts], np.int32),
            response_lengths=np.array([len(rollout.response_ids) for rollout in rollouts], np.int64),
            rollout_logprobs=_joined([rollout.rollout_logprobs for rollout in rollouts], np.float32),
        )
    os.replace(fresh, path)


def read_batch(path: Path) -> RolloutBatch:
    """The batch that `write_batch` wrote.

    Raises:
        ValueError: there is no such file, or it does not hold a batch; names it.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = json.loads(arrays["index"].tobytes())
            prompts = _cut(arrays["prompt_ids"], arrays["prompt_lengths"])
            responses = _cut(arrays["response_ids"], arrays["response_lengths"])
            logprobs = _cut(arrays["rollout_logprobs"], arrays["response_lengths"])
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: the recorded run did not come so far") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no recorded batch: {error}") from error
    groups = []
    first = 0
    for entry, prompt_ids in zip(index["groups"], prompts, strict=True):
        last = first + len(entry["rollouts"])
        rollouts = [
            _rollout(fields, ids, logprobs_R)
            for fields, ids, logprobs_R in zip(
                entry["rollouts"], responses[first:last], logprobs[first:last], strict=True
            )
        ]
        first = last
        prompt = Prompt(input_ids=prompt_ids, **entry["prompt"])
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts, index=entry["index"]))
    return RolloutBatch(groups=groups, metrics=index["metrics"])


def _describe(group: RolloutGroup) -> dict[str, Any]:
    prompt = group.prompt
    try:
        json.dumps(prompt.answer)
        answer = prompt.answer
    except TypeError:
        answer = str(prompt.answer)
    return {
        "index": group.index,
        "prompt": {"uid": prompt.uid, "text": prompt.text, "answer": answer, "data_source": prompt.data_source},
        "rollouts": [
            {
                "text": rollout.text,
                "finish_reason": rollout.finish_reason.value,
                "weight_versions": [list(span) for span in rollout.weight_versions],
                "correctness": rollout.correctness,
                "reward": rollout.reward,
                "penalty": rollout.penalty,
                "verifier_status": rollout.verifier_status.value,
            }
            for rollout in group.rollouts
        ],
    }


def _rollout(entry: dict[str, Any], response_ids: np.ndarray, logprobs_R: np.ndarray) -> Rollout:
    special = {
        "finish_reason": FinishReason(entry["finish_reason"]),
        "verifier_status": VerifierStatus(entry["verifier_status"]),
        "weight_versions": [(version, start, end) for version, start, end in entry["weight_versions"]],
    }
    return Rollout(response_ids=response_ids, rollout_logprobs=logprobs_R, **entry | special)


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype) for part in parts]) if parts else np.zeros(0, dtype)


def _cut(joined: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    if lengths.sum() != len(joined):
        raise ValueError(f"lengths sum up to {lengths.sum()}, there are {len(joined)} elements")
    return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []


class ReplayService:
    """Stands for `RolloutService`: the batches that an earlier run has recorded, step by step.

    Args:
        folder: where they lie.
        group_size: G that the run wants; a recording with another one is refused.
        prompts_per_step: groups that a batch must have.
    """

    def __init__(self, folder: Path, *, group_size: int, prompts_per_step: int) -> None:
        self.folder = folder
        self._group_size = group_size
        self._prompts_per_step = prompts_per_step

    def generate(self, *, step: int) -> RolloutBatch:
        """The recorded batch of a step.

        Raises:
            ValueError: it is missing, broken, or of another size than the run wants.
        """
        path = step_file(self.folder, step)
        batch = read_batch(path)
        sizes = {len(group.rollouts) for group in batch.groups}
        if len(batch.groups) != self._prompts_per_step or sizes != {self._group_size}:
            raise ValueError(
                f"rollout.prompts_per_step and rollout.group_size must be as recorded in {path} "
                f"({len(batch.groups)} and {sorted(sizes)}), got {self._prompts_per_step} and {self._group_size}"
            )
        return batch

    def evaluate(self, *, policy_version: int, key: str | None = None) -> EvalBatch:
        """The recorded evaluation after a step (0: before training), of the held-out problems or of a named set.

        Raises:
            ValueError: it is missing or broken.
        """
        batch = read_batch(evaluation_file(self.folder, policy_version, key))
        return EvalBatch(groups=batch.groups, metrics=batch.metrics)
