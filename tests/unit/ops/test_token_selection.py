"""Clip-Cov's draw and KL-Cov's top tokens, exact sets against the vectors and brute force."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_rlvr.ops import ratio_clipped, select_tokens, token_covariance
from megatron_rlvr.ops.exact import exact_sum_limbs, limbs_to_fraction, parse_ratio, selection_count
from megatron_rlvr.ops.reference.token_selection import mix64, ordered_key, selection_key

pytestmark = pytest.mark.usefixtures("ops_backend")

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())


def tokens(given, dtype=torch.float64):
    """Flat tensors of a vector's padded rows."""
    mask = torch.tensor(given["mask"], dtype=torch.bool)
    rows, columns = mask.shape
    return {
        "logprobs_T": torch.tensor(given["logp"], dtype=dtype).flatten(),
        "old_logprobs_T": torch.tensor(given["old_logp"], dtype=dtype).flatten(),
        "advantages_T": torch.tensor(given["seq_adv"], dtype=dtype)[:, None].expand(rows, columns).flatten(),
        "mask_T": mask.flatten(),
        "trajectory_T": torch.arange(rows)[:, None].expand(rows, columns).flatten(),
        "position_T": torch.arange(columns).expand(rows, columns).flatten(),
    }


def select(batch, **options):
    names = ("logprobs_T", "advantages_T", "mask_T", "trajectory_T", "position_T")
    return select_tokens(**{name: batch[name] for name in names}, **options)


def places(selected_T, columns=8):
    return [[int(index) // columns, int(index) % columns] for index in selected_T.nonzero()]


def test_hash_vectors():
    for value, expected in VECTORS["B0_hash"]["mix64"]:
        assert mix64(int(value)) == int(expected)
    for seed, step, trajectory, position, expected in VECTORS["B0_hash"]["sel_key"]:
        token = torch.tensor([(trajectory << 32) | position])
        key = int(selection_key(token, seed=seed, step=step)) + (1 << 63)
        assert key == int(expected)


def test_counts():
    for row in VECTORS["B1_counts"]["rows"]:
        assert selection_count(parse_ratio(row["ratio"]), row["N"]) == row["n"]
        assert selection_count(parse_ratio(float(row["ratio"])), row["N"]) == row["n"]


@pytest.mark.parametrize("case", VECTORS["B2_clip_cov"]["cases"], ids=lambda c: f"r{c['ratio']}-{c['clip_low']}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clip_cov_vectors(case, dtype):
    batch = tokens(VECTORS["B2_clip_cov"]["input"], dtype)
    clipped_T = ratio_clipped(
        batch["logprobs_T"],
        batch["old_logprobs_T"],
        batch["advantages_T"],
        batch["mask_T"],
        eps_low=case["clip_low"],
        eps_high=case["clip_high"],
    )
    assert places(clipped_T) == case["ratio_clipped"]
    options = {"lower": case["cov_lb"], "upper": case["cov_ub"], "ratio_clipped_T": clipped_T}
    draw = {"seed": case["seed"], "step": case["step"]}
    assert places(select(batch, method="clip_cov", ratio=case["ratio"], **options, **draw)) == case["selected"]
    everything = select(batch, method="clip_cov", ratio="1", **options, **draw)
    assert places(everything) == case["eligible"]


@pytest.mark.parametrize("case", VECTORS["B3_kl_cov"]["cases"], ids=lambda c: f"r{c['ratio']}-{c['kl']}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_cov_vectors(case, dtype):
    batch = tokens(VECTORS["B3_kl_cov"]["input"], dtype)
    assert places(select(batch, method="kl_cov", ratio=case["ratio"])) == case["selected"]


def test_covariance_vectors():
    case = VECTORS["B3_kl_cov"]["cases"][0]
    batch = tokens(VECTORS["B3_kl_cov"]["input"])
    ours = token_covariance(batch["logprobs_T"], batch["advantages_T"], batch["mask_T"])
    assert ours.num_tokens == case["N"]
    assert math.isclose(ours.mean_logprob, case["mean_logp"], rel_tol=1e-12)
    assert math.isclose(ours.mean_advantage, case["mean_adv"], rel_tol=1e-12)
    torch.testing.assert_close(
        ours.cov_T, torch.tensor(case["cov"], dtype=torch.float64).flatten(), rtol=1e-12, atol=1e-15
    )
    assert math.isclose(ours.mean, VECTORS["B5_micro_vs_global"]["reduced"]["batch_cov"], rel_tol=1e-12)


def test_micro_scope_differs_from_the_global_one():
    case = VECTORS["B5_micro_vs_global"]
    batch = tokens(case["input"])
    assert places(select(batch, method="kl_cov", ratio=case["ratio"])) == case["global_selected"]
    for micro in case["micro"]:
        start, stop = (8 * row for row in micro["rows"])
        part = {name: values[start:stop] for name, values in batch.items()}
        chosen = select(part, method="kl_cov", ratio=case["ratio"])
        found = [[row + micro["rows"][0], column] for row, column in places(chosen)]
        assert found == micro["selected_global_index"]


def test_ordered_keys_and_ties():
    case = VECTORS["B6_distributed_topn"]
    values = torch.tensor(case["values_f32"])
    assert ordered_key(values).tolist() == case["keys"]
    order = sorted(range(len(values)), key=lambda i: (-case["keys"][i], i))
    for row in case["rows"]:
        assert sorted(order[: row["n"]]) == row["selected"]


@pytest.mark.parametrize("num_ties", [1, 7, 50])
def test_ties_go_to_the_first_trajectory_and_position(num_ties):
    """Equal log-probs and advantages give equal Cov; the storage order must not matter."""
    generator = torch.Generator().manual_seed(num_ties)
    logprobs = torch.full((60,), -0.25)
    logprobs[num_ties:] = -2.0
    advantages = torch.ones(60)
    advantages[-1] = -3.0
    shuffle = torch.randperm(60, generator=generator)
    trajectory, position = torch.arange(60) // 7, torch.arange(60) % 7
    chosen = select_tokens(
        logprobs[shuffle],
        advantages[shuffle],
        torch.ones(60, dtype=torch.bool),
        method="kl_cov",
        ratio=Fraction(5, 60),
        trajectory_T=trajectory[shuffle],
        position_T=position[shuffle],
    )
    cov = token_covariance(logprobs, advantages, torch.ones(60, dtype=torch.bool)).cov_T.float()
    expected = sorted(range(60), key=lambda i: (-float(cov[i]), i))[:5]
    assert sorted(shuffle[chosen].tolist()) == sorted(expected)


def test_sums_are_exact():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            torch.randn(1000, dtype=torch.float64, generator=generator) * 1e200,
            torch.randn(1000, dtype=torch.float64, generator=generator) * 1e-200,
            torch.randn(1000, dtype=torch.float64, generator=generator),
            torch.tensor(
                [0.0, -0.0, 5e-324, -1e-310, 2.2250738585072014e-308, 1.7976931348623157e308], dtype=torch.float64
            ),
        ]
    )
    expected = sum((Fraction(value) for value in values.tolist()), Fraction(0))
    assert limbs_to_fraction(exact_sum_limbs(values)) == expected
    halves = exact_sum_limbs(values[:1234]) + exact_sum_limbs(values[1234:])
    assert limbs_to_fraction(halves) == expected
    assert limbs_to_fraction(exact_sum_limbs(values[:0])) == 0


def test_draw_is_uniform_and_differs_by_step():
    """Of 80 eligible tokens one is drawn at each of 800 steps: each about ten times."""
    logprobs, advantages = torch.full((80,), -3.0), torch.full((80,), -2.0)
    logprobs[40:], advantages[40:] = -0.5, 1.0
    everything = torch.ones(80, dtype=torch.bool)
    assert (token_covariance(logprobs, advantages, everything).cov_T == 1.875).all()
    counts = torch.zeros(80)
    for step in range(800):
        counts += select_tokens(
            logprobs,
            advantages,
            everything,
            method="clip_cov",
            ratio=Fraction(1, 80),
            trajectory_T=torch.arange(80),
            position_T=torch.zeros(80, dtype=torch.int64),
            step=step,
        )
    assert counts.sum() == 800
    chi_square = float(((counts - 10.0) ** 2 / 10.0).sum())
    assert chi_square < 124.8  # the 99.9% quantile with 79 degrees of freedom; the draws are fixed by their seed


def test_no_tokens_and_nothing_eligible():
    empty = torch.zeros(0)
    none = torch.zeros(0, dtype=torch.int64)
    for method in ("kl_cov", "clip_cov"):
        chosen = select_tokens(
            empty, empty, none.bool(), method=method, ratio="0.1", trajectory_T=none, position_T=none
        )
        assert chosen.shape == (0,)
    batch = tokens(VECTORS["B2_clip_cov"]["input"])
    assert not select(batch, method="clip_cov", ratio="0.5", lower=50.0, upper=60.0).any()
    batch["mask_T"] = torch.zeros_like(batch["mask_T"])
    assert not select(batch, method="kl_cov", ratio="0.5").any()


def test_unmasked_tokens_may_hold_anything():
    batch = tokens(VECTORS["B3_kl_cov"]["input"])
    expected = select(batch, method="kl_cov", ratio="0.1")
    for name in ("logprobs_T", "advantages_T"):
        batch[name] = torch.where(batch["mask_T"], batch[name], torch.nan)
    batch["trajectory_T"] = torch.where(batch["mask_T"], batch["trajectory_T"], -1)
    assert torch.equal(select(batch, method="kl_cov", ratio="0.1"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": "0"}, r"ratio must be in \(0, 1\], got '0'"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"ratio": "x"}, "ratio must be a number or a string .* got 'x'"),
        ({"method": "top"}, "method must be one of .*'top'"),
        ({"method": "kl_cov", "lower": 0.5}, "no effect with method='kl_cov'"),
        ({"lower": 5.0, "upper": 1.0}, "lower must be below upper, got 5.0 and 1.0"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"trajectory_T": torch.full((48,), -1)}, r"trajectory_T must be in \[0, 2\*\*31\)"),
        ({"position_T": torch.zeros(3, dtype=torch.int64)}, "position_T must have 48 entries .* got 3"),
        ({"mask_T": torch.ones(48)}, "mask_T must have dtype torch.bool, got torch.float32"),
        ({"logprobs_T": torch.full((48,), torch.nan)}, "logprobs_T and advantages_T must be finite .* got 37"),
        ({"advantages_T": torch.zeros(2, 24)}, r"advantages_T must have 1 dimension\(s\), got shape \[2, 24\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    batch = tokens(VECTORS["B2_clip_cov"]["input"])
    options = {"method": "clip_cov", "ratio": "0.1"}
    for name, value in change.items():
        (batch if name.endswith("_T") else options)[name] = value
    with pytest.raises(ValueError, match=message):
        select(batch, **options)
