"""Recorded rollouts with made-up verdicts: a training without servers whose gradients are not zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_rlvr.rollout.recording import evaluation_file, step_file, write_batch
from megatron_rlvr.types import EvalBatch, FinishReason, Prompt, Rollout, RolloutBatch, RolloutGroup

PROMPTS, GROUP = 4, 4


def record(folder: Path, *, steps: int, vocab_size: int, bad_steps: tuple[int, ...] = ()) -> Path:
    """Batches of so many steps and an evaluation after each; in `bad_steps` a reward is not a number."""
    for step in range(1, steps + 1):
        groups = [group((step - 1) * PROMPTS + i, vocab_size, GROUP) for i in range(PROMPTS)]
        if step in bad_steps:
            groups[0].rollouts[0].reward = float("nan")
        write_batch(step_file(folder, step), RolloutBatch(groups=groups, metrics={"rollout/groups_generated": PROMPTS}))
    for step in range(steps + 1):
        answers = [group(1000 + 10 * step + i, vocab_size, 1) for i in range(8)]
        write_batch(evaluation_file(folder, step), EvalBatch(groups=answers, metrics={}))
    return folder


def group(index: int, vocab_size: int, size: int) -> RolloutGroup:
    rng = np.random.default_rng(index)
    rollouts = []
    for number in range(size):
        length = int(rng.integers(2, 9))
        right = float(rng.random() < 0.5)
        rollouts.append(
            Rollout(
                response_ids=rng.integers(2, vocab_size, length).astype(np.int32),
                rollout_logprobs=-rng.random(length).astype(np.float32) * 6,
                text=f"response {number}",
                finish_reason=FinishReason.stop,
                weight_versions=[(0, 0, length)],
                correctness=right,
                reward=right,
            )
        )
    ids = rng.integers(2, vocab_size, int(rng.integers(4, 10))).astype(np.int32)
    prompt = Prompt(uid=f"train/{index}", text=f"problem {index}", input_ids=ids, answer="7", data_source="made_up")
    return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)
