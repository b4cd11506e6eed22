"""Which responses share their prompt, what stays together, and that no micro-batch outgrows its budget."""

import numpy as np
import pytest

from megatron_rlvr.config.training import SharedPrompts
from megatron_rlvr.data.packing import PackedSequence, build_microbatch
from megatron_rlvr.trainer.update import prompt_sharing
from megatron_rlvr.trainer.update.batch import DealOptions, plan_sequences
from megatron_rlvr.trainer.update.prompt_sharing import KEYS_PER_TOKEN, plan_prompts, unit_cost, units


def group_of(number, prompt, responses):
    ids = np.arange(prompt, dtype=np.int32) + 100 * number
    return [
        PackedSequence(
            prompt_ids=ids,
            response_ids=np.zeros(length, np.int32),
            advantage=1.0,
            weight=1.0,
            rollout_logprobs=np.zeros(length, np.float32),
            trajectory=100 * number + index,
            group=number,
        )
        for index, length in enumerate(responses)
    ]


def shapes(made):
    return [[(s.group, s.trajectory % 100, s.shared_prompt) for s in unit] for unit in made]


def test_a_group_stays_together_where_it_fits():
    batch = [s for number in range(8) for s in group_of(number, 10, [3, 4, 5])]
    made = units(batch, dp_size=1, max_tokens=1000)
    assert shapes(made) == [[(n, i, n) for i in range(3)] for n in range(8)]
    assert [unit_cost(unit) for unit in made] == [9 + 4 + 5 + 6] * 8


def test_a_group_is_cut_where_it_is_too_large_for_a_micro_batch():
    made = units(group_of(0, 10, [9] * 16), dp_size=1, max_tokens=30)
    assert shapes(made) == [[(0, 2 * n, n), (0, 2 * n + 1, n)] for n in range(8)]
    assert [build_microbatch(unit).num_tokens for unit in made] == [29] * 8


def test_a_few_groups_are_cut_for_the_sake_of_balance():
    batch = [s for number in range(2) for s in group_of(number, 10, [9] * 8)]
    pieces = units(batch, dp_size=2, max_tokens=1000)
    assert len(pieces) >= 8
    assert sorted(s.trajectory for unit in pieces for s in unit) == sorted(s.trajectory for s in batch)


@pytest.mark.parametrize(
    "group",
    [
        group_of(0, 10, [50]),  # nobody to share with
        group_of(0, 1, [5, 5]),  # nothing to share
        group_of(0, 5, [100, 100]),  # 4 of 210 tokens
    ],
)
def test_what_saves_nothing_is_not_shared(group):
    made = units(group, dp_size=1, max_tokens=1000)
    assert shapes(made) == [[(0, index, None)] for index in range(len(group))]


def test_a_mask_that_is_too_large_keeps_a_response_alone(monkeypatch):
    monkeypatch.setattr(prompt_sharing, "LARGEST_MASK", 40 * 60)
    made = units(group_of(0, 30, [5, 60, 5, 6]), dp_size=1, max_tokens=10_000)
    assert shapes(made) == [[(0, 0, None)], [(0, 1, None)], [(0, 2, 2), (0, 3, 2)]]


@pytest.mark.parametrize("seed", range(20))
def test_plans_hold_every_response_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    batch = [
        s
        for number in range(int(rng.integers(1, 20)))
        for s in group_of(number, int(rng.integers(1, 60)), rng.integers(1, 40, int(rng.integers(1, 17))).tolist())
    ]
    budget, dp_size = int(rng.integers(100, 400)), int(rng.integers(1, 5))
    options = DealOptions(
        updates_per_rollout=1,
        aggregation="token-mean",
        max_response_tokens=64,
        max_tokens_per_microbatch=budget,
        dp_size=dp_size,
        micro_batch_multiple=1,
        elide_zero_advantage=False,
        share_prompts=True,
    )
    plan = plan_sequences(batch, options)
    assert len({len(rank) for rank in plan}) == 1
    packed = [build_microbatch(sequences) for rank in plan for sequences in rank]
    assert max(micro.num_tokens for micro in packed) <= budget
    assert sorted(s.trajectory for rank in plan for m in rank for s in m) == sorted(s.trajectory for s in batch)
    saved = sum(micro.num_shared_tokens for micro in packed)
    assert sum(micro.num_tokens for micro in packed if micro.loss_mask_T.any()) == (
        sum(s.num_tokens for s in batch) - saved
    )
    for rank in plan:
        for sequences in rank:
            assert sum(s.num_tokens for s in sequences) <= KEYS_PER_TOKEN * budget


def test_where_prompts_can_be_shared():
    auto, always = SharedPrompts.auto, SharedPrompts.always
    assert str(plan_prompts(auto, attends_packed=True, has_auxiliary_loss=False)) == (
        "once for all responses of a group"
    )
    fused = plan_prompts(auto, attends_packed=False, has_auxiliary_loss=False)
    assert not fused.is_on
    assert str(fused) == "for every response: transformer-engine's attention has no keys in common"
    assert not plan_prompts(auto, attends_packed=True, has_auxiliary_loss=True).is_on
    assert not plan_prompts(SharedPrompts.never, attends_packed=True, has_auxiliary_loss=False).is_on
    with pytest.raises(ValueError, match=r"train\.share_prompts must be auto or never here, got 'always'"):
        plan_prompts(always, attends_packed=False, has_auxiliary_loss=False)
