"""The CPU platform's sampling: a function of weights, seed and position, and of nothing else."""

from __future__ import annotations

import torch

from megatron_rlvr.rollout.platform import seeded_choice


def choose(weights: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    chosen_B1 = seeded_choice(weights, seeds, positions)
    assert chosen_B1.shape == (len(seeds), 1)
    assert chosen_B1.dtype == torch.int64
    return chosen_B1[:, 0]


def test_frequencies_follow_the_weights() -> None:
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3])
    count = 40_000
    for seeds, positions in (
        (torch.arange(count), torch.zeros(count, dtype=torch.int64)),
        (torch.full((count,), 7), torch.arange(count)),
    ):
        chosen = choose(weights.expand(count, 4), seeds, positions)
        share = torch.bincount(chosen, minlength=4) / count
        # five standard deviations of the largest share
        torch.testing.assert_close(share, weights, atol=5 * (0.25 / count) ** 0.5, rtol=0.0)
        assert share[1] == 0.0


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(9, 1000, generator=generator)
    seeds, positions = torch.arange(9) * 2**58 - 2**60, torch.arange(9) % 4
    together = choose(weights, seeds, positions)
    order = torch.randperm(9, generator=generator)
    assert torch.equal(choose(weights[order], seeds[order], positions[order]), together[order])
    alone = torch.cat([choose(weights[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(9)])
    assert torch.equal(alone, together)


def test_weights_need_no_sum_of_one_and_zeros_are_never_chosen() -> None:
    weights = torch.zeros(64, 50)
    weights[:, 17] = 1e-30
    chosen = choose(weights, torch.arange(64), torch.arange(64))
    assert (chosen == 17).all()
