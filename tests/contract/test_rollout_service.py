"""The rollout process against the fake server and the real one: nothing of a response is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.config.schema import DataConfig, EvalConfig, ReasoningGymSpec, RewardConfig, RolloutConfig
from megatron_rlvr.rollout.messages import Progress
from megatron_rlvr.rollout.service import RolloutService
from megatron_rlvr.types import FinishReason, Rollout
from tests.contract.conftest import Subject
from tests.contract.hugging_face import continuation_logprobs

MAX_TOKENS = 24


@pytest.fixture
def service(subject: Subject, tmp_path: Path) -> Iterator[RolloutService]:
    running = RolloutService(
        data=DataConfig(reasoning_gym=[ReasoningGymSpec(name="chain_sum")], train_size=50, val_size=3),
        reward=RewardConfig(num_workers=1),
        rollout=RolloutConfig(prompts_per_step=2, group_size=4, max_response_tokens=MAX_TOKENS, max_retries=3),
        evaluation=EvalConfig(),
        tokenizer_path=str(subject.model),
        urls=[subject.url],
        seed=0,
        log_path=tmp_path / "rollout.log",
    )
    with running:
        running.start(120.0)
        yield running


def check_response(rollout: Rollout) -> None:
    length = len(rollout.response_ids)
    assert rollout.valid
    assert rollout.finish_reason is (FinishReason.length if length == MAX_TOKENS else FinishReason.stop)
    assert rollout.rollout_logprobs.shape == (length,)
    assert (rollout.rollout_logprobs < 0).all()
    assert [start for _, start, _ in rollout.weight_versions] == [
        0,
        *[end for _, _, end in rollout.weight_versions[:-1]],
    ]
    assert rollout.weight_versions[-1][2] == length


def test_logprobs_are_those_of_the_model(service: RolloutService, subject: Subject) -> None:
    batch = service.generate(step=0, policy_version=0)
    responses = [(group.prompt, rollout) for group in batch.groups for rollout in group.rollouts]
    assert len({tuple(rollout.response_ids) for _, rollout in responses}) == (8 if subject.real else 2)
    for prompt, rollout in responses:
        check_response(rollout)
        assert rollout.weight_versions == [(0, 0, len(rollout.response_ids))]
        if subject.real:
            expected = continuation_logprobs(subject.model, prompt.input_ids.tolist(), rollout.response_ids.tolist())
            np.testing.assert_allclose(rollout.rollout_logprobs, expected, atol=1e-4, rtol=0)


def test_greedy_evaluation_repeats(service: RolloutService, subject: Subject) -> None:
    first, second = (service.evaluate(policy_version=0) for _ in range(2))
    answers = [
        [rollout.response_ids.tolist() for group in batch.groups for rollout in group.rollouts]
        for batch in (first, second)
    ]
    assert answers[0] == answers[1]
    assert [group.prompt.uid for group in first.groups] == ["val/0", "val/1", "val/2"]


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_no_response_is_lost_in_a_sync(service: RolloutService, subject: Subject, mode: str) -> None:
    def sync_once(progress: Progress) -> None:
        if not synced:
            synced.append(progress)
            subject.engine.pause(mode)
            subject.engine.set_weight_version(3)
            subject.engine.resume()

    synced: list[Progress] = []
    service.generate_async(step=0, policy_version=0)
    batch = service.result(sync_once)
    assert synced
    for group in batch.groups:
        assert len(group.rollouts) == 4
        for rollout in group.rollouts:
            check_response(rollout)
            assert {version for version, _, _ in rollout.weight_versions} <= {0, 3}
    # from now on only responses under the new weights are taken
    after = service.generate(step=1, policy_version=3)
    versions = {span[0] for group in after.groups for rollout in group.rollouts for span in rollout.weight_versions}
    assert versions == {3}
