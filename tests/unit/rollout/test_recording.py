"""Recorded rollouts: the same batch comes back, and what is no batch is named."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.rollout.recording import ReplayService, read_batch, step_file, write_batch
from megatron_rlvr.types import FinishReason, RolloutBatch, VerifierStatus
from tests.e2e.recorded import GROUP, PROMPTS, group, record


def test_a_batch_comes_back(tmp_path: Path) -> None:
    groups = [group(index, 300, 3) for index in (4, 9)]
    odd = groups[1].rollouts[2]
    odd.response_ids, odd.rollout_logprobs = np.zeros(0, np.int32), np.zeros(0, np.float32)
    odd.finish_reason, odd.verifier_status, odd.weight_versions = FinishReason.abort, VerifierStatus.timeout, []
    odd.reward, odd.text = float("nan"), 'quotes " and ü'
    batch = RolloutBatch(groups=groups, metrics={"rollout/retries": 3, "time/generate_s": 0.1})
    write_batch(step_file(tmp_path / "new", 3), batch)
    got = read_batch(tmp_path / "new" / "step_000003.npz")
    assert got.metrics == batch.metrics
    for mine, theirs in zip(groups, got.groups, strict=True):
        assert (theirs.index, theirs.prompt.uid, theirs.prompt.answer) == (mine.index, mine.prompt.uid, "7")
        assert np.array_equal(theirs.prompt.input_ids, mine.prompt.input_ids)
        for a, b in zip(mine.rollouts, theirs.rollouts, strict=True):
            assert np.array_equal(a.response_ids, b.response_ids)
            assert b.response_ids.dtype == np.int32
            assert np.array_equal(a.rollout_logprobs, b.rollout_logprobs)
            assert b.rollout_logprobs.dtype == np.float32
            assert (a.text, a.finish_reason, a.verifier_status) == (b.text, b.finish_reason, b.verifier_status)
            assert (a.weight_versions, a.correctness, a.penalty) == (b.weight_versions, b.correctness, b.penalty)
            assert a.reward == b.reward or (math.isnan(a.reward) and math.isnan(b.reward))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step_000003.npz"]


def test_a_verdict_without_json_form_is_kept_as_text(tmp_path: Path) -> None:
    one = group(0, 300, 1)
    one.prompt.answer = {1}
    write_batch(tmp_path / "a.npz", RolloutBatch(groups=[one], metrics={}))
    assert read_batch(tmp_path / "a.npz").groups[0].prompt.answer == "{1}"


def test_what_is_no_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.npz does not exist"):
        read_batch(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"a\.npz is no recorded batch"):
        read_batch(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz is no recorded batch"):
        read_batch(tmp_path / "a.npz")
    write_batch(tmp_path / "a.npz", RolloutBatch(groups=[group(0, 300, 2)], metrics={}))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.npz is no recorded batch"):
        read_batch(tmp_path / "a.npz")


def test_a_replay_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = record(tmp_path, steps=1, vocab_size=99)
    right = ReplayService(folder, group_size=GROUP, prompts_per_step=PROMPTS)
    assert len(right.generate(step=1).groups) == PROMPTS
    assert len(right.evaluate(policy_version=1).groups) == 8
    with pytest.raises(ValueError, match=r"eval_000001_aime-greedy\.npz does not exist"):
        right.evaluate(policy_version=1, key="aime/greedy")
    for sizes in ({"group_size": 2, "prompts_per_step": PROMPTS}, {"group_size": GROUP, "prompts_per_step": 1}):
        with pytest.raises(ValueError, match=r"rollout\.prompts_per_step and rollout\.group_size must be as recorded"):
            ReplayService(folder, **sizes).generate(step=1)
    with pytest.raises(ValueError, match=r"step_000002\.npz does not exist"):
        right.generate(step=2)
