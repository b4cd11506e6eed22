"""Packing: invariants of the plan over random inputs, values of the packed tensors, and the way back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rlvr.data.packing import (
    PackedSequence,
    build_microbatch,
    plan_microbatches,
    split_by_label,
    unpack_responses,
)


def check_plan(plan, lengths, *, dp_size, max_tokens, multiple_of):
    assert len(plan) == dp_size
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1
    num_micro = counts.pop()
    assert num_micro % multiple_of == 0
    assert sorted(index for rank in plan for micro in rank for index in micro) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in micro) for rank in plan for micro in rank) <= max_tokens
    empty = sum(not micro for rank in plan for micro in rank)
    assert empty == max(0, dp_size * num_micro - len(lengths))


@pytest.mark.parametrize("seed", range(60))
def test_plan_keeps_its_promises_on_random_lengths(seed):
    rng = np.random.default_rng(seed)
    max_tokens = int(rng.integers(8, 400))
    lengths = rng.integers(1, max_tokens + 1, size=int(rng.integers(1, 120))).tolist()
    settings = {"dp_size": int(rng.integers(1, 9)), "max_tokens": max_tokens, "multiple_of": int(rng.integers(1, 5))}
    parity = float(rng.choice([np.inf, 64.0]))
    plan = plan_microbatches(lengths, **settings, attention_parity_length=parity)
    check_plan(plan, lengths, **settings)
    assert plan == plan_microbatches(list(lengths), **settings, attention_parity_length=parity)


def test_plan_uses_few_microbatches_when_lengths_fit_exactly():
    lengths = [6, 4, 7, 3, 5, 5, 8, 2]  # four pairs of ten
    plan = plan_microbatches(lengths, dp_size=2, max_tokens=10)
    check_plan(plan, lengths, dp_size=2, max_tokens=10, multiple_of=1)
    assert len(plan[0]) == 2


def test_plan_balances_ranks_by_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 2000, size=512).tolist()
    plan = plan_microbatches(lengths, dp_size=8, max_tokens=16384)
    loads = [sum(lengths[i] for micro in rank for i in micro) for rank in plan]
    assert max(loads) / np.mean(loads) < 1.01


def test_plan_balances_attention_cost_when_asked():
    lengths = [1000] + [100] * 20
    parity = 100.0
    plan = plan_microbatches(lengths, dp_size=2, max_tokens=4000, attention_parity_length=parity)
    alone = next(rank for rank in plan if 0 in rank[0])
    assert alone == [[0]]  # 1,000 tokens of one sequence cost 11,000 units, the other twenty 4,000 together
    by_tokens = plan_microbatches(lengths, dp_size=2, max_tokens=4000)
    assert {sum(lengths[i] for i in rank[0]) for rank in by_tokens} == {1500}


def test_plan_represents_fewer_sequences_than_microbatches():
    plan = plan_microbatches([3, 5], dp_size=4, max_tokens=8, multiple_of=2)
    check_plan(plan, [3, 5], dp_size=4, max_tokens=8, multiple_of=2)
    assert [len(rank) for rank in plan] == [2] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, 11], "dp_size": 1, "max_tokens": 10}, "train.max_tokens_per_microbatch.*got 10.*11 tokens"),
        ({"lengths": [], "dp_size": 1, "max_tokens": 10}, "lengths must name at least one"),
        ({"lengths": [0], "dp_size": 1, "max_tokens": 10}, "lengths must be at least 1, got 0"),
        ({"lengths": [1], "dp_size": 0, "max_tokens": 10}, "dp_size must be at least 1, got 0"),
        ({"lengths": [1], "dp_size": 1, "max_tokens": 10, "multiple_of": 0}, "multiple_of must be at least 1"),
    ],
)
def test_plan_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_microbatches(**arguments)


def make_sequence(prompt, response, trajectory, advantage=1.0, weight=1.0):
    return PackedSequence(
        prompt_ids=np.array(prompt, np.int32),
        response_ids=np.array(response, np.int32),
        advantage=advantage,
        weight=weight,
        rollout_logprobs=-np.array(response, np.float32) / 10,
        trajectory=trajectory,
    )


def test_microbatch_values_by_hand():
    micro = build_microbatch(
        [make_sequence([1, 2, 3], [4, 5], 7, advantage=0.5, weight=0.25), make_sequence([6], [9], 2, advantage=-1.0)],
        pad_to_multiple=4,
    )
    assert micro.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 9, 0]
    assert micro.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
    assert micro.cu_seqlens.tolist() == [0, 5, 7, 8]
    assert micro.max_seqlen == 5
    assert micro.targets_T.tolist() == [2, 3, 4, 5, 0, 9, 0, 0]
    assert micro.loss_mask_T.tolist() == [False, False, True, True, False, True, False, False]
    assert micro.advantages_T.tolist() == [0, 0, 0.5, 0.5, 0, -1.0, 0, 0]
    assert micro.weights_T.tolist() == [0, 0, 0.25, 0.25, 0, 1.0, 0, 0]
    torch.testing.assert_close(micro.rollout_logprobs_T, torch.tensor([0, 0, -0.4, -0.5, 0, -0.9, 0, 0]))
    assert micro.trajectory_T.tolist() == [7, 7, 7, 7, 7, 2, 2, -1]
    assert micro.response_position_T.tolist() == [-1, -1, 0, 1, -1, 0, -1, -1]
    assert (micro.tokens_T.dtype, micro.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert (micro.advantages_T.dtype, micro.loss_mask_T.dtype) == (torch.float32, torch.bool)


def test_values_are_split_by_the_label_of_their_sequence():
    sequences = [make_sequence([1], [2, 3], 0), make_sequence([4], [5], 1), make_sequence([6, 7], [8, 9], 2)]
    labels = ["words", "sums", "words"]
    for sequence, label in zip(sequences, labels, strict=True):
        sequence.source = label
    micro = build_microbatch(sequences, pad_to_multiple=16)
    assert micro.sources == labels
    parts = split_by_label(micro.targets_T, micro, micro.sources)
    assert {name: part.tolist() for name, part in parts.items()} == {"sums": [5], "words": [2, 3, 8, 9]}
    empty = build_microbatch([], pad_to_multiple=4)
    assert split_by_label(empty.targets_T, empty, empty.sources) == {}


def shared(prompt, response, trajectory, number=0):
    return replace(make_sequence(prompt, response, trajectory), shared_prompt=number)


def test_a_shared_prompt_is_packed_once_and_continued_by_every_response():
    sequences = [
        make_sequence([1, 2], [3], 0),
        shared([4, 5, 6], [7, 8], 1),
        shared([4, 5, 6], [9], 2),
        shared([4, 5, 6], [1], 3, number=1),  # a neighbour, but of nobody's prompt
    ]
    micro = build_microbatch(sequences, pad_to_multiple=16)
    assert micro.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 6, 9, 4, 5, 6, 1, 0, 0]
    assert micro.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3, 0, 1]
    assert micro.cu_seqlens.tolist() == [0, 3, 5, 8, 10, 14, 16]
    assert micro.prefixes == [-1, -1, 1, 1, -1, -1]
    assert micro.max_seqlen == 5
    assert micro.num_shared_tokens == 2
    assert micro.targets_T.tolist() == [2, 3, 0, 5, 0, 7, 8, 0, 9, 0, 5, 6, 1, 0, 0, 0]
    assert micro.loss_mask_T.nonzero().squeeze(1).tolist() == [1, 5, 6, 8, 12]
    assert micro.trajectory_T.tolist() == [0, 0, 0, -1, -1, 1, 1, 1, 2, 2, 3, 3, 3, 3, -1, -1]
    found = unpack_responses(micro.targets_T, micro)
    assert {number: part.tolist() for number, part in found.items()} == {0: [3], 1: [7, 8], 2: [9], 3: [1]}
    np.testing.assert_array_equal(
        np.concatenate(list(unpack_responses(micro.rollout_logprobs_T, micro).values())),
        np.concatenate([s.rollout_logprobs for s in sequences]),
    )


def test_labels_of_shared_prompts_are_those_of_their_responses():
    sequences = [shared([1, 2], [3], 0), shared([1, 2], [4, 5], 1), make_sequence([6], [7], 2)]
    for sequence, label in zip(sequences, ["sums", "sums", "words"], strict=True):
        sequence.source = sequence.regime = label
    micro = build_microbatch(sequences, pad_to_multiple=8)
    assert micro.sources == micro.regimes == ["sums", "sums", "sums", "words"]
    parts = split_by_label(micro.targets_T, micro, micro.sources)
    assert {name: part.tolist() for name, part in parts.items()} == {"sums": [3, 4, 5], "words": [7]}


def test_a_prompt_of_one_token_has_nothing_to_share():
    micro = build_microbatch([shared([1], [2], 0), shared([1], [3], 1)])
    assert micro.tokens_T.tolist() == [1, 2, 1, 3]
    assert micro.prefixes == [-1, -1]


def test_microbatch_refuses_to_share_what_differs():
    with pytest.raises(ValueError, match="sequences of shared_prompt 0 must have the same prompt_ids"):
        build_microbatch([shared([1, 2], [3], 0), shared([1, 4], [3], 1)])


@pytest.mark.parametrize("pad_to_multiple", [1, 8])
def test_microbatch_without_sequences_is_all_padding(pad_to_multiple):
    micro = build_microbatch([], pad_to_multiple=pad_to_multiple)
    assert micro.num_tokens == pad_to_multiple
    assert micro.cu_seqlens.tolist() == [0, pad_to_multiple]
    assert micro.max_seqlen == pad_to_multiple
    assert not micro.loss_mask_T.any()
    assert micro.trajectory_T.tolist() == [-1] * pad_to_multiple
    assert unpack_responses(micro.weights_T, micro) == {}


def test_microbatch_needs_no_padding_when_it_fits():
    micro = build_microbatch([make_sequence([1, 2], [3, 4], 0)], pad_to_multiple=4)
    assert micro.num_tokens == 4
    assert micro.cu_seqlens.tolist() == [0, 4]


def test_responses_come_back_from_any_packing():
    rng = np.random.default_rng(1)
    sequences = [
        make_sequence(rng.integers(1, 50, rng.integers(1, 9)), rng.integers(1, 50, rng.integers(1, 9)), trajectory)
        for trajectory in rng.permutation(40)
    ]
    lengths = [sequence.num_tokens for sequence in sequences]
    found, targets = {}, {}
    for rank in plan_microbatches(lengths, dp_size=3, max_tokens=64):
        for indices in rank:
            micro = build_microbatch([sequences[i] for i in indices], pad_to_multiple=8)
            found |= unpack_responses(micro.rollout_logprobs_T, micro)
            targets |= unpack_responses(micro.targets_T, micro)
    assert sorted(found) == list(range(40))
    for sequence in sequences:
        np.testing.assert_array_equal(found[sequence.trajectory], sequence.rollout_logprobs)
        np.testing.assert_array_equal(targets[sequence.trajectory], sequence.response_ids)


def test_unpack_responses_refuses_misfit():
    micro = build_microbatch([make_sequence([1], [2, 3], 4)])
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2,\)"):
        unpack_responses(torch.zeros(2), micro)


@pytest.mark.parametrize(
    ("prompt", "response", "trajectory", "message"),
    [
        ([], [1], 0, "at least one prompt token"),
        ([1], [], 0, "at least one response token"),
        ([1], [2], -1, "trajectory must be at least 0"),
    ],
)
def test_microbatch_refuses(prompt, response, trajectory, message):
    with pytest.raises(ValueError, match=message):
        build_microbatch([make_sequence(prompt, response, trajectory)])


def test_microbatch_refuses_logprobs_of_another_length():
    sequence = make_sequence([1], [2, 3], 0)
    sequence.rollout_logprobs = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"one rollout log-prob per response token, got 3 for 2"):
        build_microbatch([sequence])
