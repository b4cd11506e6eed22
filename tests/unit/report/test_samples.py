from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.report import write_samples
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup, VerifierStatus


def group(index: int, verdicts: list[bool], *, text: str = "42") -> RolloutGroup:
    prompt = Prompt(
        uid=f"train/{index}",
        text=f"Q{index}\nA:",
        input_ids=np.zeros(3, np.int32),
        answer="42",
        data_source="chain_sum",
    )
    rollouts = [
        Rollout(
            response_ids=np.zeros(2, np.int32),
            rollout_logprobs=np.zeros(2, np.float32),
            text=text,
            finish_reason=FinishReason.stop,
            weight_versions=[(0, 0, 2)],
            correctness=float(right),
            reward=float(right),
        )
        for right in verdicts
    ]
    return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)


def test_mixed_groups_come_first_with_a_right_and_a_wrong_answer(tmp_path: Path) -> None:
    groups = [group(0, [True, True]), group(1, [False, False, True]), group(2, [False])]
    path = write_samples(tmp_path, 7, groups, count=3, advantages_N=np.array([0, 0, -0.5, 0, 1.5, 0]))
    assert path == tmp_path / "samples" / "step_000007.txt"
    assert path.read_text().splitlines() == [
        "step 7",
        "",
        "prompt train/1 (chain_sum): 1 of 3 right",
        "reference answer: 42",
        "│ Q1",
        "│ A:",
        "",
        "response 2 right, reward 1, advantage +1.500, 2 tokens, finished by stop",
        "│ 42",
        "",
        "response 0 wrong, reward 0, advantage -0.500, 2 tokens, finished by stop",
        "│ 42",
        "",
        "prompt train/0 (chain_sum): 2 of 2 right",
        "reference answer: 42",
        "│ Q0",
        "│ A:",
        "",
        "response 0 right, reward 1, advantage +0.000, 2 tokens, finished by stop",
        "│ 42",
    ]


def test_no_text_can_look_like_a_heading(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 1, [group(0, [True], text="a\nresponse 9 right\n\nb")], count=1)
    assert path is not None
    lines = path.read_text().splitlines()
    assert sum(line.startswith("response ") for line in lines) == 1
    assert lines[-4:] == ["│ a", "│ response 9 right", "│ ", "│ b"]


def test_a_verdict_that_could_not_be_reached_is_said(tmp_path: Path) -> None:
    unscored = group(0, [False])
    unscored.rollouts[0].verifier_status = VerifierStatus.timeout
    path = write_samples(tmp_path, 1, [unscored], count=4)
    assert path is not None
    assert "verifier: timeout" in path.read_text()


def test_nothing_to_write_leaves_nothing(tmp_path: Path) -> None:
    assert write_samples(tmp_path, 1, [group(0, [True])], count=0) is None
    assert write_samples(tmp_path, 1, [], count=4) is None
    assert list(tmp_path.iterdir()) == []


def test_advantages_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one entry per rollout \(2\), got 3"):
        write_samples(tmp_path, 1, [group(0, [True, False])], count=1, advantages_N=np.zeros(3))
