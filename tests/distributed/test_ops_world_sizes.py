"""Ops over 1, 2 and 4 gloo processes: bitwise equal selections, and one vocabulary however it is sharded.

Run as a script, this file is one rank; the tests start the ranks and compare what they wrote.
"""

import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rlvr.config.schema import ClipCovConfig, KlCovConfig, LossConfig
from megatron_rlvr.ops import (
    select_tokens,
    set_backend,
    token_covariance,
    top_shares,
    vocab_parallel_logprob_entropy,
)
from megatron_rlvr.ops.backend import BACKENDS
from megatron_rlvr.trainer.update.selection import TokenSelector
from megatron_rlvr.types import MicroBatch
from tests.distributed.ranks import run_ranks

WORLD_SIZES = (1, 2, 4)
SELECTIONS = {
    "kl_cov": {"method": "kl_cov", "ratio": "0.013"},
    "kl_cov_most": {"method": "kl_cov", "ratio": "0.61"},
    "kl_cov_all": {"method": "kl_cov", "ratio": "1"},
    "clip_cov": {"method": "clip_cov", "ratio": "2e-2", "lower": 0.3, "upper": 5.0, "seed": 5, "step": 9},
    "clip_cov_scarce": {"method": "clip_cov", "ratio": "0.9", "lower": 0.9, "upper": 1.1, "seed": 5, "step": 9},
    "clip_cov_one": {"method": "clip_cov", "ratio": "1e-6", "lower": 0.0, "upper": 5.0},
}
# The trainer's own choice, sized or bounded by the covariance of all ranks; some tokens have advantage 0.
SCALE_FREE = {
    "share of the mass": LossConfig(name="kl_cov", cov_mass=0.37, kl_cov=KlCovConfig(ratio="1")),
    "without zero advantages": LossConfig(
        name="kl_cov", cov_mass=0.9, kl_cov=KlCovConfig(ratio="0.05", skip_zero_advantage=True)
    ),
    "relative bounds": LossConfig(
        name="clip_cov",
        cov_mass=0.5,
        clip_cov=ClipCovConfig(ratio="0.3", lower=0.5, upper=3.0, relative_bounds=True),
    ),
}
TOP_SHARES = [Fraction(1, 2), Fraction(1, 50), Fraction(1, 5000)]
LAYOUTS = ("round_robin", "blocks", "all_on_last")
VOCAB = 24
NUM_TOKENS = 9
SPLITS = {1: {"whole": [24]}, 2: {"equal": [12, 12], "odd": [7, 17]}, 4: {"equal": [6] * 4, "odd": [5, 1, 11, 7]}}


def token_batch() -> dict[str, torch.Tensor]:
    """60 responses of 1 to 50 tokens; coarse log-probs make many ties."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 51, (60,), generator=generator)
    trajectory = torch.repeat_interleave(torch.arange(60), lengths)
    position = torch.cat([torch.arange(length) for length in lengths.tolist()])
    logprobs = -torch.rand(len(trajectory), generator=generator) * 4
    logprobs = torch.where(torch.rand(len(trajectory), generator=generator) < 0.5, (4 * logprobs).round() / 4, logprobs)
    advantages = torch.randn(60, generator=generator).mul(4).round().div(3)[trajectory]
    return {
        "logprobs_T": logprobs,
        "advantages_T": advantages,
        "mask_T": torch.rand(len(trajectory), generator=generator) < 0.9,
        "ratio_clipped_T": torch.rand(len(trajectory), generator=generator) < 0.1,
        "trajectory_T": trajectory,
        "position_T": position,
    }


def share_of(rank: int, world_size: int, layout: str) -> torch.Tensor:
    """Indices of a rank's tokens, in an order of its own."""
    trajectory = token_batch()["trajectory_T"]
    owner = {
        "round_robin": trajectory % world_size,
        "blocks": trajectory * world_size // 60,
        "all_on_last": torch.full_like(trajectory, world_size - 1),
    }[layout]
    mine = (owner == rank).nonzero()[:, 0]
    return mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(rank))]


def vocabulary_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (some columns and one whole stretch masked), targets, upstream gradients."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(NUM_TOKENS, VOCAB, dtype=torch.float64, generator=generator)
    logits[2, 12:] = -torch.inf
    logits[3, :12] = -torch.inf
    logits[:, 23] = -torch.inf
    logits[5] += 1000
    targets = torch.tensor([0, 11, 3, 12, 22, 7, 18, 5, 13])
    return logits, targets, torch.randn(2, NUM_TOKENS, dtype=torch.float64, generator=generator)


def micro_of(batch: dict[str, torch.Tensor]) -> MicroBatch:
    """Of the fields, those that a selection reads have values."""
    empty = torch.zeros_like(batch["logprobs_T"])
    return MicroBatch(
        tokens_T=torch.zeros_like(batch["trajectory_T"]),
        position_ids_T=batch["position_T"],
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        prefixes=[],
        max_seqlen=0,
        sources=[],
        regimes=[],
        targets_T=torch.zeros_like(batch["trajectory_T"]),
        loss_mask_T=batch["mask_T"],
        advantages_T=batch["advantages_T"],
        weights_T=empty,
        rollout_logprobs_T=empty,
        trajectory_T=batch["trajectory_T"],
        response_position_T=batch["position_T"],
        old_logprobs_T=batch["logprobs_T"],
    )


def run_selections(rank: int, world_size: int) -> dict[str, object]:
    results: dict[str, object] = {}
    for layout in LAYOUTS:
        mine = share_of(rank, world_size, layout)
        batch = {name: values[mine] for name, values in token_batch().items()}
        clipped = batch.pop("ratio_clipped_T")
        for name, options in SELECTIONS.items():
            extra = {"ratio_clipped_T": clipped} if options["method"] == "clip_cov" else {}
            selected = select_tokens(**batch, **options, **extra, group=dist.group.WORLD)
            results[f"{layout}/{name}"] = sorted(mine[selected].tolist())
        for name, loss in SCALE_FREE.items():
            selector = TokenSelector(loss, seed=5, group=dist.group.WORLD)
            [selected] = selector.choose([micro_of(batch)], step=9, everywhere=True)
            results[f"{layout}/{name}"] = sorted(mine[selected].tolist())
        covariance = token_covariance(
            batch["logprobs_T"], batch["advantages_T"], batch["mask_T"], group=dist.group.WORLD
        )
        results[f"{layout}/statistics"] = [
            covariance.num_tokens,
            covariance.mean_logprob.hex(),
            covariance.mean_advantage.hex(),
            covariance.mean.hex(),
        ]
        masked = covariance.cov_T[batch["mask_T"]]
        tops = top_shares(masked, TOP_SHARES, group=dist.group.WORLD)
        results[f"{layout}/tops"] = [(top.count, top.threshold, round(top.mean, 10)) for top in tops]
    bad = {name: values.clone() for name, values in batch.items()}
    if rank == world_size - 1:
        bad["logprobs_T"][:] = torch.nan
    results["error/selection"] = message_of(
        lambda: select_tokens(**bad, method="kl_cov", ratio="0.1", group=dist.group.WORLD)
    )
    return results


def run_vocabulary(rank: int, world_size: int) -> dict[str, object]:
    results: dict[str, object] = {}
    logits, targets, upstream = vocabulary_batch()
    for name, widths in SPLITS[world_size].items():
        shard = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            local = logits[:, shard].to(dtype).requires_grad_()
            logprobs, entropy = vocab_parallel_logprob_entropy(local, targets, temperature=0.8, group=dist.group.WORLD)
            (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
            results[f"{name}/{dtype}"] = (logprobs.detach(), entropy.detach(), local.grad)
        local = logits[:, shard]
        results[f"error/targets/{name}"] = message_of(
            lambda local=local: vocab_parallel_logprob_entropy(local, targets + 5, group=dist.group.WORLD)
        )
        poisoned = local.clone()
        if rank == world_size - 1:
            poisoned[4, 0] = torch.nan
        results[f"error/nan/{name}"] = message_of(
            lambda poisoned=poisoned: vocab_parallel_logprob_entropy(poisoned, targets, group=dist.group.WORLD)
        )
    return results


def message_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    try:
        for backend in BACKENDS:
            set_backend(backend)
            results[backend] = {
                "selection": run_selections(rank, world_size),
                "vocabulary": run_vocabulary(rank, world_size),
            }
    finally:
        dist.destroy_process_group()
    torch.save(results, folder / f"{world_size}_{rank}.pt")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What every rank of every world wrote: written[world_size][rank][backend]."""
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in WORLD_SIZES:
        run_ranks(Path(__file__), [str(folder)], world_size=world_size)
    return {
        size: [torch.load(folder / f"{size}_{rank}.pt", weights_only=False) for rank in range(size)]
        for size in WORLD_SIZES
    }


@pytest.fixture(params=BACKENDS)
def results(request, written):
    """Of one backend: results[world_size][rank]."""
    return {size: [rank[request.param] for rank in ranks] for size, ranks in written.items()}


@pytest.mark.parametrize("name", [*SELECTIONS, *SCALE_FREE])
def test_selected_sets_do_not_depend_on_the_layout(results, name):
    sets = {
        (world_size, layout): sorted(index for rank in ranks for index in rank["selection"][f"{layout}/{name}"])
        for world_size, ranks in results.items()
        for layout in LAYOUTS
    }
    expected = sets[1, "blocks"]
    assert expected
    assert all(chosen == expected for chosen in sets.values())


def test_top_shares_do_not_depend_on_the_layout(results):
    batch = token_batch()
    covariance = token_covariance(batch["logprobs_T"], batch["advantages_T"], batch["mask_T"])
    values = covariance.cov_T[batch["mask_T"]].float().double().sort(descending=True).values
    expected = []
    for share in TOP_SHARES:
        count = max(1, int(share * len(values)))
        expected.append((count, float(values[count - 1]), round(float(values[:count].mean()), 10)))
    for ranks in results.values():
        for rank in ranks:
            assert all(rank["selection"][f"{layout}/tops"] == expected for layout in LAYOUTS)


def test_selection_agrees_with_brute_force(results):
    batch = token_batch()
    cov = token_covariance(batch["logprobs_T"], batch["advantages_T"], batch["mask_T"]).cov_T.float()
    masked = batch["mask_T"].nonzero()[:, 0].tolist()
    best = sorted(masked, key=lambda i: (-float(cov[i]), int(batch["trajectory_T"][i]), int(batch["position_T"][i])))
    for name in ("kl_cov", "kl_cov_most"):
        count = int(float(SELECTIONS[name]["ratio"]) * len(masked))
        assert results[1][0]["selection"][f"blocks/{name}"] == sorted(best[:count])
    eligible = [i for i in masked if 0.9 < float(cov[i]) < 1.1 and not batch["ratio_clipped_T"][i]]
    assert results[1][0]["selection"]["blocks/clip_cov_scarce"] == eligible


def test_statistics_are_bitwise_equal(results):
    found = {
        tuple(rank["selection"][f"{layout}/statistics"])
        for ranks in results.values()
        for rank in ranks
        for layout in LAYOUTS
    }
    assert len(found) == 1


def test_every_rank_raises_the_same_error(results):
    for ranks in results.values():
        assert {rank["selection"]["error/selection"] for rank in ranks} != {"no error"}
        assert len({rank["selection"]["error/selection"] for rank in ranks}) == 1
        for name in SPLITS[len(ranks)]:
            messages = {rank["vocabulary"][f"error/targets/{name}"] for rank in ranks}
            assert messages == {"targets_T must be in [0, 24), got 27"}
            (message,) = {rank["vocabulary"][f"error/nan/{name}"] for rank in ranks}
            assert message.startswith("logits_TV must be finite")
            assert message.endswith("row 4")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sharded_vocabulary_equals_the_whole(results, dtype):
    logits, targets, upstream = vocabulary_batch()
    exact = logits.to(dtype).double().requires_grad_()
    log_p = torch.log_softmax(exact / 0.8, dim=1)
    entropy = -torch.where(log_p > -1e30, log_p.exp() * log_p.clamp_min(-1e30), 0.0).sum(dim=1)
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    # One rounding of the gradient to the logits' dtype.
    resolution = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7}[dtype]
    for world_size, ranks in results.items():
        for name in SPLITS[world_size]:
            parts = [rank["vocabulary"][f"{name}/{dtype}"] for rank in ranks]
            for part in parts:
                assert torch.equal(part[0], parts[0][0])
                assert torch.equal(part[1], parts[0][1])
            torch.testing.assert_close(parts[0][0].double(), logprobs.detach(), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(parts[0][1].double(), entropy.detach(), rtol=tolerance, atol=tolerance)
            grad = torch.cat([part[2] for part in parts], dim=1)
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.double(), exact.grad, rtol=resolution, atol=resolution)


if __name__ == "__main__":
    main()
