"""Dynamic sampling: which prompts are drawn and which groups enter the batch, whatever the order of finishing."""

import random

import numpy as np
import pytest

from megatron_rlvr.rollout.selection import GroupSelector, Selection
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup


def group(index: int, *, mixed: bool) -> RolloutGroup:
    rollouts = [
        Rollout(
            response_ids=np.array([1], np.int32),
            rollout_logprobs=np.zeros(1, np.float32),
            text="",
            finish_reason=FinishReason.stop,
            weight_versions=[(0, 0, 1)],
            correctness=float(mixed and sample == 0),
        )
        for sample in range(2)
    ]
    prompt = Prompt(uid=f"train/{index}", text="", input_ids=np.array([1], np.int32), answer="", data_source="t")
    return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)


def sample_step(
    outcomes: list[bool],
    *,
    wanted: int,
    bound: int,
    first: int = 0,
    carried: list[RolloutGroup] | None = None,
    acceptance: float = 1.0,
    order: random.Random | None = None,
) -> tuple[GroupSelector, Selection]:
    """Runs one step in which group i is mixed where ``outcomes[i]``, groups finishing in random order."""
    selector = GroupSelector(
        wanted=wanted, bound=bound, keep=lambda g: g.mixed, carried=carried or [], acceptance=acceptance
    )
    running: list[int] = []
    while not selector.complete:
        indices = list(range(first + selector.num_drawn, first + selector.num_drawn + selector.num_to_draw))
        selector.draw(indices)
        running += indices
        index = running.pop(order.randrange(len(running)) if order else 0)
        selector.finish(group(index, mixed=outcomes[index]))
    return selector, selector.select()


def indices(groups: list[RolloutGroup]) -> list[int]:
    return [group.index for group in groups]


def test_without_expectation_exactly_the_missing_prompts_are_drawn():
    outcomes = [True, False, False, True, False, True, True]
    selector, selection = sample_step(outcomes, wanted=3, bound=30)
    assert indices(selection.groups) == [0, 3, 5]
    assert selector.num_drawn == 6
    assert selection.surplus == []
    assert (selection.num_accepted, selection.num_topped_up, selection.num_carried) == (3, 0, 0)
    assert selection.acceptance == 0.75  # (1 + 3/6) / 2


@pytest.mark.parametrize("acceptance", [1.0, 0.5, 0.3])
def test_the_batch_does_not_depend_on_the_order_of_finishing(acceptance: float):
    draw = random.Random(3)
    outcomes = [draw.random() < 0.4 for _ in range(400)]
    _, reference = sample_step(outcomes, wanted=16, bound=160, acceptance=acceptance)
    for seed in range(20):
        _, selection = sample_step(outcomes, wanted=16, bound=160, acceptance=acceptance, order=random.Random(seed))
        assert indices(selection.groups) == indices(reference.groups)
        assert indices(selection.surplus) == indices(reference.surplus)
        assert selection.acceptance == reference.acceptance


def test_expected_rejections_are_drawn_ahead():
    selector = GroupSelector(wanted=8, bound=80, keep=lambda g: g.mixed, carried=[], acceptance=0.25)
    assert selector.num_to_draw == 32
    selector = GroupSelector(wanted=3, bound=30, keep=lambda g: g.mixed, carried=[], acceptance=0.1)
    assert selector.num_to_draw == 30


def test_over_many_steps_no_accepted_group_is_lost_or_used_twice():
    draw = random.Random(11)
    outcomes = [draw.random() < 0.35 for _ in range(3000)]
    carried: list[RolloutGroup] = []
    acceptance, first, used = 1.0, 0, []
    for _ in range(40):
        selector, selection = sample_step(
            outcomes, wanted=8, bound=80, first=first, carried=carried, acceptance=acceptance, order=draw
        )
        assert len(selection.groups) == 8
        assert selection.num_topped_up == 0
        used += indices(selection.groups)
        first += selector.num_drawn
        carried, acceptance = selection.surplus, selection.acceptance
    expected = [index for index in range(first) if outcomes[index]]
    assert used + indices(carried) == expected


def test_carried_groups_alone_can_fill_a_batch():
    carried = [group(index, mixed=True) for index in (9, 4, 6, 7)]
    selector, selection = sample_step([], wanted=3, bound=3, carried=carried)
    assert selector.num_drawn == 0
    assert indices(selection.groups) == [4, 6, 7]
    assert indices(selection.surplus) == [9]
    assert (selection.num_carried, selection.num_accepted, selection.acceptance) == (3, 0, 1.0)


def test_the_bound_tops_the_batch_up_with_rejected_groups():
    outcomes = [False, False, True, False, False, False, False, False]
    carried = [group(-1, mixed=True)]
    selector, selection = sample_step(outcomes, wanted=4, bound=8, carried=carried)
    assert selector.num_drawn == 8
    assert indices(selection.groups) == [-1, 0, 1, 2]
    assert (selection.num_topped_up, selection.num_carried, selection.num_accepted) == (2, 1, 1)
    assert selection.surplus == []


def test_expected_acceptance_never_falls_below_what_the_bound_can_use():
    acceptance = 1.0
    for _ in range(30):
        _, selection = sample_step([False] * 40, wanted=4, bound=40, acceptance=acceptance)
        acceptance = selection.acceptance
    assert acceptance == 0.1
