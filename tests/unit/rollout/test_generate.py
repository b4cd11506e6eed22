"""Rollout batches and evaluations from a server whose answers are planned."""

import asyncio
import hashlib
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from megatron_rlvr.config.schema import EvalConfig, GroupFilter, OverlongConfig, RolloutConfig
from megatron_rlvr.rollout import routing
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.generate import RolloutGenerator
from megatron_rlvr.rollout.messages import Progress, RolloutError
from megatron_rlvr.types import Prompt, RolloutGroup, Score, VerifierStatus
from tests.fakes.sglang_server import FakeSGLang, Fault

WRONG, RIGHT, UNREADABLE, EOS = 2, 3, 4, 1
FIRST_PROMPT = 100
GROUP_SIZE = 4


class PlannedServer(FakeSGLang):
    """Gives prompt i as many right responses as ``plan(i)`` says, each of one token and the end of sequence."""

    def __init__(self, plan: Callable[[int], int], **options: Any) -> None:
        super().__init__(next_token=self._next, **options)
        self.plan = plan
        self.asked: Counter[int] = Counter()

    def _next(self, context: Sequence[int], sample: int, updates: int) -> tuple[int, float]:
        if len(context) > 1:
            return EOS, -0.25
        prompt = context[0] - FIRST_PROMPT
        number = self.asked[prompt] % GROUP_SIZE
        self.asked[prompt] += 1
        return (RIGHT if number < self.plan(prompt) else WRONG), -1.0 - number


class Prompts:
    """Prompts 100, 101, ..."""

    num_too_long = 7
    num_broken = 1

    def __init__(self) -> None:
        self.drawn = 0

    def next(self, num_prompts: int) -> list[tuple[int, Prompt]]:
        first, self.drawn = self.drawn, self.drawn + num_prompts
        return [(index, prompt(index)) for index in range(first, self.drawn)]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class TextVerifier:
    """Right is token 3."""

    async def score(self, prompt: Prompt, response_text: str) -> Score:
        await asyncio.sleep(0)
        if f"<{UNREADABLE}>" in response_text:
            return Score(correctness=0.0, reward=0.0, status=VerifierStatus.unparsable)
        right = f"<{RIGHT}>" in response_text
        return Score(correctness=float(right), reward=0.75 if right else 0.125)


def prompt(index: int) -> Prompt:
    ids = np.array([FIRST_PROMPT + index], np.int32)
    return Prompt(uid=f"train/{index}", text=f"p{index}", input_ids=ids, answer=None, data_source="planned")


def generator(overlong: OverlongConfig | None = None, **changes: Any) -> RolloutGenerator:
    settings = {
        "prompts_per_step": 3,
        "group_size": GROUP_SIZE,
        "max_response_tokens": 8,
        "group_filter": GroupFilter.none,
        "max_gen_batches": 5,
    }
    return RolloutGenerator(
        verifier=TextVerifier(),
        stream=Prompts(),
        validation=[prompt(index) for index in range(50, 58)],
        rollout=RolloutConfig(**(settings | changes)),
        evaluation=EvalConfig(num_samples=GROUP_SIZE, temperature=0.5, max_problems=5),
        overlong=overlong or OverlongConfig(),
        seed=0,
    )


def client(server: FakeSGLang) -> GenerationClient:
    return GenerationClient([server.url], concurrency=16, request_timeout_s=20, max_retries=2, recovery_s=0.5)


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "FIRST_BACKOFF_S", 0.01)


def ignore(progress: Progress) -> None:
    pass


def indices(groups: list[RolloutGroup]) -> list[int]:
    return [group.index for group in groups]


def num_right(group: RolloutGroup) -> int:
    return int(sum(rollout.correctness for rollout in group.rollouts))


def test_groups_are_complete_ordered_and_scored():
    async def scenario(server: FakeSGLang):
        made = generator()
        async with client(server) as made.client:
            return await made.generate(step=0, policy_version=0, on_progress=seen.append)

    seen: list[Progress] = []
    with PlannedServer(lambda index: index + 1) as server:
        batch = asyncio.run(scenario(server))
    assert indices(batch.groups) == [0, 1, 2]
    assert [group.prompt.uid for group in batch.groups] == ["train/0", "train/1", "train/2"]
    assert [num_right(group) for group in batch.groups] == [1, 2, 3]
    for group in batch.groups:
        assert len(group.rollouts) == GROUP_SIZE
        for rollout in group.rollouts:
            assert rollout.response_ids.tolist() in ([RIGHT, EOS], [WRONG, EOS])
            assert rollout.reward == (0.75 if rollout.correctness else 0.125)
            assert rollout.weight_versions == [(0, 0, 2)]
        # the log-probs of the four answers, whichever of them came first
        assert sorted(rollout.rollout_logprobs.tolist() for rollout in group.rollouts) == [
            [-4.0, -0.25], [-3.0, -0.25], [-2.0, -0.25], [-1.0, -0.25],
        ]  # fmt: skip
    assert seen[-1] == Progress(finished=3, drawn=3, accepted=3, wanted=3, response_tokens=24)
    expected = {
        "rollout/groups_generated": 3, "rollout/groups_accepted": 3, "rollout/groups_carried": 0,
        "rollout/groups_surplus": 0, "rollout/groups_topped_up": 0, "rollout/responses": 12, "rollout/aborted": 0,
        "rollout/retries": 0, "rollout/abort_retries": 0, "rollout/prompt_tokens": 12, "rollout/response_tokens": 24,
        "response/length_mean": 2.0, "response/length_std": 0.0, "response/length_max": 2.0,
        "response/length_min": 2.0, "response/stop_fraction": 1.0, "response/truncated_fraction": 0.0,
        "verifier/unparsable": 0, "verifier/timeout": 0, "verifier/crash": 0,
        "data/prompts_too_long": 7, "data/prompts_broken": 1,
    }  # fmt: skip
    assert {key: batch.metrics[key] for key in expected} == expected
    assert batch.metrics["time/generate_s"] > 0
    assert batch.metrics["time/reward_s"] >= 0
    assert indices(pickle.loads(pickle.dumps(batch)).groups) == [0, 1, 2]


def test_dynamic_sampling_uses_every_mixed_group_exactly_once():
    def plan(index: int) -> int:
        """0 or 4 right for most prompts, something between for about a third."""
        return (0, 4, 2, 0, 4, 1, 4, 0, 3)[hashlib.blake2b(bytes([index % 256])).digest()[0] % 9]

    async def scenario(server: FakeSGLang):
        made = generator(group_filter=GroupFilter.mixed, max_gen_batches=20)
        async with client(server) as made.client:
            batches = [await made.generate(step=i, policy_version=0, on_progress=ignore) for i in range(12)]
        return batches, made.state_dict()

    with PlannedServer(plan, token_delay_s=0.0005) as server:
        batches, state = asyncio.run(scenario(server))
        asked = server.asked
    used = [index for batch in batches for index in indices(batch.groups)]
    drawn = state["stream"]["drawn"]
    assert used + indices(state["surplus"]) == [index for index in range(drawn) if 0 < plan(index) < GROUP_SIZE]
    assert asked == dict.fromkeys(range(drawn), GROUP_SIZE)
    assert all(len(batch.groups) == 3 for batch in batches)
    assert sum(batch.metrics["rollout/groups_generated"] for batch in batches) == drawn
    assert sum(batch.metrics["rollout/groups_accepted"] for batch in batches) == len(used) + len(state["surplus"])
    assert sum(batch.metrics["rollout/groups_topped_up"] for batch in batches) == 0
    surplus = [0, *(batch.metrics["rollout/groups_surplus"] for batch in batches)]
    assert [batch.metrics["rollout/groups_carried"] for batch in batches] == [min(left, 3) for left in surplus[:-1]]
    assert max(surplus) > 0


def test_the_bound_is_kept_and_the_batch_stays_whole(caplog: pytest.LogCaptureFixture):
    async def scenario(server: FakeSGLang):
        made = generator(group_filter=GroupFilter.mixed, max_gen_batches=2)
        async with client(server) as made.client:
            return await made.generate(step=5, policy_version=0, on_progress=ignore)

    with PlannedServer(lambda index: 2 if index == 4 else 4) as server:
        batch = asyncio.run(scenario(server))
        assert set(server.asked) == set(range(6))
    assert indices(batch.groups) == [0, 1, 4]
    assert batch.metrics["rollout/groups_topped_up"] == 2
    assert batch.metrics["rollout/groups_accepted"] == 1
    assert "step 5: 6 prompts gave 1 groups with right and wrong responses, 3 are wanted" in caplog.text


def test_resuming_from_a_state_gives_the_same_batches():
    async def scenario(server: FakeSGLang, state: dict | None, steps: int):
        made = generator(group_filter=GroupFilter.mixed, max_gen_batches=20)
        if state is not None:
            made.load_state_dict(pickle.loads(pickle.dumps(state)))
        async with client(server) as made.client:
            batches = [await made.generate(step=i, policy_version=0, on_progress=ignore) for i in range(steps)]
        return [indices(batch.groups) for batch in batches], made.state_dict()

    def run(state: dict | None, steps: int):
        with PlannedServer(lambda index: (index * 7 + index // 3) % 5) as server:
            return asyncio.run(scenario(server, state, steps))

    whole, _ = run(None, 6)
    head, state = run(None, 2)
    tail, _ = run(state, 4)
    assert head + tail == whole


def test_a_failed_step_leaves_the_data_order_as_it_was():
    async def scenario(server: FakeSGLang):
        made = generator()
        async with client(server) as made.client:
            await made.generate(step=0, policy_version=0, on_progress=ignore)
            before = made.state_dict()
            server.fault("generate", Fault.error)
            with pytest.raises(RolloutError, match="HTTP 500"):
                await made.generate(step=1, policy_version=0, on_progress=ignore)
            assert made.state_dict() == before
            assert [s.load for s in made.client.routing.servers] == [0]
            server.heal()
            return await made.generate(step=1, policy_version=0, on_progress=ignore)

    with PlannedServer(lambda index: 1) as server:
        assert indices(asyncio.run(scenario(server)).groups) == [3, 4, 5]


def test_aborted_and_unparsable_responses_are_counted_and_never_right():
    class Aborts(PlannedServer):
        """Aborts every response to prompt 1; prompt 2 gets tokens the verifier cannot read."""

        def _extend_span(self, running, position):
            super()._extend_span(running, position)
            running.aborted = "-g1-" in running.rid

        def _next(self, context, sample, updates):
            if context == [FIRST_PROMPT + 2]:
                return UNREADABLE, -1.0
            return super()._next(context, sample, updates)

    async def scenario(server: FakeSGLang):
        made = generator(group_filter=GroupFilter.none)
        async with client(server) as made.client:
            return await made.generate(step=0, policy_version=0, on_progress=ignore)

    with Aborts(lambda index: 4) as server:
        batch = asyncio.run(scenario(server))
    assert [num_right(group) for group in batch.groups] == [4, 0, 0]
    assert [sum(r.valid for r in group.rollouts) for group in batch.groups] == [4, 0, 4]
    assert not any(group.mixed for group in batch.groups)
    assert batch.metrics["rollout/aborted"] == 4
    assert batch.metrics["rollout/abort_retries"] == 8  # max_retries each
    assert batch.metrics["verifier/unparsable"] == 4


def test_retries_are_counted_and_no_response_is_missing():
    async def scenario(server: FakeSGLang):
        made = generator()
        async with client(server) as made.client:
            server.fault("generate", Fault.drop, times=3)
            return await made.generate(step=0, policy_version=0, on_progress=ignore)

    with PlannedServer(lambda index: 2) as server:
        batch = asyncio.run(scenario(server))
    assert [len(group.rollouts) for group in batch.groups] == [4, 4, 4]
    assert batch.metrics["rollout/retries"] == 3


def test_sampling_seeds_differ_within_a_group_and_repeat_over_runs():
    async def scenario(server: FakeSGLang):
        made = generator()
        async with client(server) as made.client:
            await made.generate(step=0, policy_version=0, on_progress=ignore)

    def seeds() -> dict[int, set[int]]:
        with PlannedServer(lambda index: 2) as server:
            asyncio.run(scenario(server))
            found = defaultdict(set)
            for body in server.bodies("generate"):
                found[body["input_ids"][0]].add(body["sampling_params"]["sampling_seed"])
            return found

    first = seeds()
    assert [len(group) for group in first.values()] == [4, 4, 4]
    assert len(set.union(*first.values())) == 12
    assert first == seeds()


def test_evaluation_answers_the_first_problems_in_order():
    async def scenario(server: FakeSGLang):
        made = generator()
        async with client(server) as made.client:
            before = made.state_dict()
            batch = await made.evaluate(policy_version=0, on_progress=seen.append)
            assert made.state_dict() == before
            return batch

    seen: list[Progress] = []
    with PlannedServer(lambda index: index - 50) as server:
        batch = asyncio.run(scenario(server))
        params = server.bodies("generate")[0]["sampling_params"]
    assert [group.prompt.uid for group in batch.groups] == [f"train/{index}" for index in range(50, 55)]
    assert [num_right(group) for group in batch.groups] == [0, 1, 2, 3, 4]
    assert batch.accuracy == 0.5
    assert (params["temperature"], params["top_p"], params["max_new_tokens"]) == (0.5, 1.0, 8)
    assert batch.metrics["rollout/responses"] == 20
    assert seen[-1] == Progress(finished=5, drawn=5, accepted=5, wanted=5, response_tokens=40)


def test_generation_needs_servers():
    with pytest.raises(RolloutError, match="knows no servers yet"):
        asyncio.run(generator().generate(step=0, policy_version=0, on_progress=ignore))


@pytest.mark.parametrize(("enabled", "penalty"), [(True, -0.5), (False, 0.0)])
def test_the_overlong_penalty_stays_beside_the_reward(enabled: bool, penalty: float):
    async def scenario(server: FakeSGLang):
        made = generator(overlong=OverlongConfig(enabled=enabled, max_length=4, buffer=4, factor=1.0))
        async with client(server) as made.client:
            return await made.generate(step=0, policy_version=0, on_progress=ignore)

    with PlannedServer(lambda index: 4) as server:
        batch = asyncio.run(scenario(server))
    assert {(r.penalty, r.reward, r.correctness) for g in batch.groups for r in g.rollouts} == {(penalty, 0.75, 1.0)}
