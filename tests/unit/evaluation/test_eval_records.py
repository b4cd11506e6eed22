"""Answers on disk, and summaries that follow from them alone."""

import json
import math

import numpy as np
import pytest

from megatron_rlvr.trainer.evaluation.records import (
    RecordWriter,
    flat_metrics,
    is_complete,
    read_records,
    record_of,
    summarize,
    write_records,
)
from megatron_rlvr.trainer.evaluation.run import table
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup, VerifierStatus


def group(uid, verdicts, *, ends=None):
    prompt = Prompt(
        uid=uid, text="1+1=", input_ids=np.array([1], np.int32), answer="2", data_source="sums", metadata={}
    )
    rollouts = [
        Rollout(
            response_ids=np.arange(3 + place, dtype=np.int32),
            rollout_logprobs=np.zeros(3 + place, np.float32),
            text=f"ü {place}\u2028",
            finish_reason=(ends or [FinishReason.stop] * len(verdicts))[place],
            weight_versions=[(0, 0, 3 + place)],
            correctness=float(right),
            reward=0.9 if right else 0.05,
        )
        for place, right in enumerate(verdicts)
    ]
    return RolloutGroup(prompt=prompt, rollouts=rollouts, index=0)


def test_a_problem_comes_back_as_written(tmp_path):
    path = tmp_path / "eval" / "sums.jsonl"
    record = record_of(group("sums/0", [1, 0]), set_name="sums", greedy=False)
    write_records(path, [record])
    assert read_records(path) == [record]
    assert record["samples"][1] == {
        "text": "ü 1\u2028",
        "correct": False,
        "reward": 0.05,
        "length": 4,
        "finish_reason": "stop",
        "verifier": "ok",
    }
    assert (record["uid"], record["mode"], record["answer"], record["prompt"]) == ("sums/0", "sampled", "2", "1+1=")


def test_a_line_cut_off_by_a_kill_is_no_problem(tmp_path):
    path = tmp_path / "sums.jsonl"
    with RecordWriter(path) as writer:
        writer.write(record_of(group("sums/0", [1]), set_name="sums", greedy=False))
    with path.open("a") as file:
        file.write('{"uid": "sums/1", "mode": "samp')
    assert [record["uid"] for record in read_records(path)] == ["sums/0"]
    with RecordWriter(path) as writer:
        writer.write(record_of(group("sums/1", [0]), set_name="sums", greedy=False))
    assert [record["uid"] for record in read_records(path)] == ["sums/0", "sums/1"]


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"uid": "a", "mode": "sampled", "samples": []}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"sums.jsonl:2: not an evaluated problem: KeyError\('uid'\)"):
        read_records(path)


def test_summary_is_the_unbiased_estimate_over_problems():
    """Against the estimator's definition: the share of k-subsets of the answers that hold a right one."""
    verdicts = {"a": [1, 0, 0, 0], "b": [1, 1, 0, 0], "c": [0, 0, 0, 0]}
    records = [record_of(group(uid, right), set_name="s", greedy=False) for uid, right in verdicts.items()]
    records += [record_of(group("a", [1]), set_name="s", greedy=True)]
    summary = summarize(records, k=[1, 2], level=0.9, seed=3)
    assert summary["pass@1"]["mean"] == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)
    pairs = math.comb(4, 2)
    expected = ((pairs - math.comb(3, 2)) + (pairs - math.comb(2, 2)) + 0) / (3 * pairs)
    assert summary["pass@2"]["mean"] == pytest.approx(expected)
    for key in ("pass@1", "pass@2"):
        assert 0 <= summary[key]["low"] < summary[key]["mean"] < summary[key]["high"] <= 1
        assert summary[key]["num_problems"] == 3
    assert summary["greedy"] == {"mean": 1.0, "low": pytest.approx(0.05), "high": 1.0, "num_problems": 1}
    assert summary["sampled"]["num_samples"] == 12
    assert summary["sampled"]["num_correct"] == 3
    assert summary["sampled"]["length_mean"] == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert summary["greedy_answers"]["num_samples"] == 1
    assert summarize(json.loads(json.dumps(records)), k=[1, 2], level=0.9, seed=3) == summary
    metrics = flat_metrics("s", summary)
    assert metrics["eval/s/pass@1"] == summary["pass@1"]["mean"]
    assert metrics["eval/s/greedy_low"] == pytest.approx(0.05)
    assert metrics["eval/s/num_problems"] == 3


def test_an_answer_without_a_number_is_no_failure_of_the_verifier():
    answered = group("a", [1, 0, 0, 0])
    states = (VerifierStatus.ok, VerifierStatus.unparsable, VerifierStatus.timeout, VerifierStatus.crash)
    for rollout, state in zip(answered.rollouts, states, strict=True):
        rollout.verifier_status = state
    summary = summarize([record_of(answered, set_name="s", greedy=False)], k=[1])
    assert summary["sampled"]["unparsable_fraction"] == 0.25
    assert summary["sampled"]["verifier_failures"] == 2
    shown = dict(zip(*table({"s": summary}), strict=True))
    assert (shown["unparsable"], shown["verifier failures"]) == ("25.0%", "2")


def test_nothing_solved_is_not_called_certain():
    """0 of 30: the upper end is the p for which (1 - p)^30 = 0.025."""
    records = [record_of(group(f"s/{i}", [0]), set_name="s", greedy=False) for i in range(30)]
    found = summarize(records, k=[1])["pass@1"]
    assert (found["mean"], found["low"]) == (0.0, 0.0)
    assert (1 - found["high"]) ** 30 == pytest.approx(0.025)


def test_an_aborted_answer_leaves_the_problem_unfinished():
    assert is_complete(group("a", [1, 0], ends=[FinishReason.stop, FinishReason.length]))
    assert not is_complete(group("a", [1, 0], ends=[FinishReason.stop, FinishReason.abort]))
