"""Advantages against the published definitions, exact where the rule is an integer comparison."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rlvr.ops import group_advantages
from megatron_rlvr.ops.exact import parse_level, parse_quantile_level, quantile_rank

pytestmark = pytest.mark.usefixtures("ops_backend")

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())
MEAN_BASELINES = ("grpo", "dr_grpo", "rloo", "gpg")


def advantages(rewards, **options):
    return group_advantages(rewards, [len(rewards)], **options).numpy()


def binary(num_right, size):
    return [1.0] * num_right + [0.0] * (size - num_right)


@pytest.mark.parametrize("case", VECTORS["A1_qae_binary"], ids=lambda c: f"G{c['G']}-K{c['K']}-n{c['n1']}")
def test_binary_qae(case):
    for std in ("sample", "population"):
        key = {"sample": "adv_sample_eps1e-6", "population": "adv_pop_eps1e-6"}[std]
        ours = advantages(case["rewards"], K=case["K"], std=std)
        np.testing.assert_allclose(ours, case[key], rtol=1e-12, atol=0)
    assert quantile_rank(Fraction(case["K"]), case["G"]) == case["m"]
    assert int(np.count_nonzero(advantages(case["rewards"], K=case["K"]))) == case["n_nonzero"]
    linear = advantages(case["rewards"], K=case["K"], quantile="linear", std="none")
    expected = np.array(case["rewards"]) - case["torch_linear_baseline"] if 0 < case["n1"] < case["G"] else 0.0
    np.testing.assert_allclose(linear, expected * np.ones(case["G"]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", VECTORS["A2_qae_boundary_traps"], ids=lambda c: f"G{c['G']}-K{c['K']}-n{c['n1']}")
@pytest.mark.parametrize("kind", [str, float])
def test_boundary_of_the_regimes_is_exact(case, kind):
    ours = advantages(binary(case["n1"], case["G"]), K=kind(case["K"]), std="none")
    np.testing.assert_array_equal(ours, np.array(binary(case["n1"], case["G"])) - case["baseline"])
    assert quantile_rank(parse_quantile_level(kind(case["K"])), case["G"]) == case["m"]


def test_levels_are_parsed_exactly():
    given = {"0.4": "0.4", "2/5": "2/5", "float 0.28 -> repr -> 0.28": 0.28, "float 0.07 -> repr -> 0.07": 0.07}
    cases = {case["given"]: case for case in VECTORS["A2b_K_parsing"]}
    for name, value in given.items():
        level = parse_quantile_level(value)
        assert level == Fraction(cases[name]["as_exact"])
        for size, rank in cases[name]["m_at_G"].items():
            assert quantile_rank(level, int(size)) == rank


@pytest.mark.parametrize("case", VECTORS["A3_qae_real_valued"], ids=lambda c: f"{c['case']}-K{c['K']}")
def test_real_valued_rewards(case):
    ours = advantages(case["reward"], K=case["K"])
    np.testing.assert_allclose(ours, case["adv_sample_eps1e-6"], rtol=1e-12, atol=1e-15)
    linear = advantages(case["reward"], K=case["K"], quantile="linear", std="none")
    np.testing.assert_allclose(linear, np.array(case["reward"]) - case["torch_linear_baseline"], rtol=1e-12, atol=1e-14)
    gated = case.get("gate_on_correctness_adv_sample_eps1e-6")
    if gated is not None:
        correctness = [float(reward == 1) for reward in case["base_reward"]]
        ours = advantages(case["reward"], K=case["K"], gate_on="correctness", correctness_N=correctness)
        np.testing.assert_allclose(ours, gated, rtol=1e-12, atol=1e-15)


def test_overlong_penalty_enters_additively():
    options = {"K": "0.4", "gate_on": "correctness", "correctness_N": [1, 0, 0, 0]}
    penalty = [0.0, -0.5, 0.0, -1.0]
    plain = advantages([0.0] * 4, **options)
    shaped = advantages([0.0] * 4, penalty_N=penalty, **options)
    spread = np.std([1, 0, 0, 0], ddof=1) + 1e-6
    np.testing.assert_allclose(shaped, plain + np.array(penalty) / (2 * spread), rtol=1e-14)
    dropped = advantages([0.0] * 4, penalty_N=penalty, penalty_additive=False, **options)
    np.testing.assert_array_equal(dropped, plain)
    # On DAPO's scale (+-1 plus penalty) the mean-baseline-free part is the same.
    both = advantages([0.0] * 4, gate_on="correctness", correctness_N=[1, 1, 1, 1], penalty_N=penalty)
    np.testing.assert_array_equal(both, np.zeros(4))


@pytest.mark.parametrize("case", VECTORS["A5_masks"], ids=lambda c: f"G{c['G']}-n{c['n1']}-K{c['K']}")
@pytest.mark.parametrize("mask", ["qae", "pos_mask", "neg_mask", "none"])
def test_masks(case, mask):
    ours = advantages(case["rewards"], K=case["K"], mask=mask, std="population", eps=0.0)
    np.testing.assert_allclose(ours, case[mask], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", VECTORS["A6_limits"], ids=lambda c: f"G{c['G']}")
def test_extreme_levels_are_psr_and_nsr(case):
    size = case["G"]
    for num_right in range(1, size):
        rewards = binary(num_right, size)
        assert (advantages(rewards, K=case["PSR_for_K_up_to_incl"]) >= 0).all()
        above = Fraction(case["NSR_for_K_above"]) + Fraction(1, 1000)
        assert (advantages(rewards, K=str(above)) <= 0).all()


@pytest.mark.parametrize("case", VECTORS["A4_query_weights"], ids=lambda c: f"G{c['G']}-n{c['n1']}-K{c['K']}")
def test_objective_weight_of_a_query(case):
    if not 0 < case["n1"] < case["G"]:
        pytest.skip("no weight for uniform groups")
    rewards = np.array(binary(case["n1"], case["G"]))
    for std, key in {"population": "weight_qae", "sample": "weight_qae_sample_std"}.items():
        ours = advantages(rewards, K=case["K"], std=std, eps=0.0)
        np.testing.assert_allclose(np.abs(ours).sum() / case["G"], case[key], rtol=1e-12)


@pytest.mark.parametrize("case", VECTORS["A7_sparsity"], ids=lambda c: f"G{c['G']}-K{c['K']}")
def test_sparsity(case):
    size = case["G"]
    shares = [np.count_nonzero(advantages(binary(n, size), K=case["K"])) for n in range(1, size)]
    np.testing.assert_allclose(np.mean(shares) / size, case["nonzero_frac_uniform"], rtol=1e-12)
    assert max(shares) == case["max_nonzero_in_a_group"]


@pytest.mark.parametrize("case", VECTORS["E4_estimators"], ids=lambda c: f"n{sum(c['rewards'])}")
def test_other_estimators(case):
    names = {"grpo": "grpo", "dr_grpo": "grpo_no_std(dr_grpo advantage)", "rloo": "rloo", "psr": "psr", "nsr": "nsr"}
    for name, key in {**names, "w_reinforce": "w_reinforce_0.1"}.items():
        ours = advantages(case["rewards"], estimator=name)
        np.testing.assert_allclose(ours, case[key], rtol=1e-12, atol=1e-15)
    for level in ("0.4", "0.6"):
        np.testing.assert_allclose(advantages(case["rewards"], K=level), case[f"qae_{level}"], rtol=1e-12)


def test_whitened_estimators():
    case = VECTORS["E5_reinforce_pp"]
    sizes = [case["group"].count(0), case["group"].count(1)]
    for name, key in {"reinforce_pp": "reinforce_pp", "reinforce_pp_baseline": "rf_pp_baseline"}.items():
        ours = group_advantages(case["rewards"], sizes, estimator=name, lengths_N=case["lengths"]).numpy()
        np.testing.assert_allclose(ours, case[key], rtol=1e-12)


def test_opo_and_gpg_by_hand():
    rewards, lengths = [1.0, 0.0, 0.5, 0.0], [2, 4, 6, 8]
    baseline = (2 * 1.0 + 6 * 0.5) / 20
    np.testing.assert_allclose(advantages(rewards, estimator="opo", lengths_N=lengths), np.array(rewards) - baseline)
    np.testing.assert_allclose(advantages(rewards, estimator="gpg"), (4 / 2) * (np.array(rewards) - 0.375))


@pytest.mark.parametrize("reward", [0.1, 0.3, -1.7, 1e9, 0.0])
@pytest.mark.parametrize("estimator", ["qae", *MEAN_BASELINES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exact_zeros(reward, estimator, dtype):
    rewards = torch.full((8,), reward, dtype=dtype)
    ours = group_advantages(rewards, 8, estimator=estimator)
    assert ours.dtype == dtype
    assert (ours == 0).all()


def test_ragged_groups_are_independent_and_order_does_not_matter():
    generator = np.random.default_rng(0)
    sizes = [3, 1, 8, 2, 5]
    groups = [generator.normal(size=size).round(1) for size in sizes]
    whole = group_advantages(np.concatenate(groups), sizes, K="0.3").numpy()
    np.testing.assert_array_equal(whole, np.concatenate([advantages(group, K="0.3") for group in groups]))
    shuffle = generator.permutation(8)
    np.testing.assert_allclose(advantages(groups[2][shuffle], K="0.3"), advantages(groups[2], K="0.3")[shuffle])
    assert advantages(groups[1])[0] == 0.0


def test_invalid_responses_get_zero_and_count_nowhere():
    rewards, valid = [1.0, 9.0, 0.0, 0.0, -9.0, 1.0], [True, False, True, True, False, True]
    for estimator in ("qae", "grpo", "rloo"):
        ours = advantages(rewards, estimator=estimator, valid_N=valid)
        np.testing.assert_array_equal(ours[valid], advantages([1.0, 0.0, 0.0, 1.0], estimator=estimator))
        assert (ours[~np.array(valid)] == 0).all()
    lonely = advantages([1.0, 0.0], valid_N=[True, False])
    np.testing.assert_array_equal(lonely, [0.0, 0.0])


def test_plus_minus_one_equals_zero_one():
    for num_right, level in itertools.product(range(9), ("0.2", "0.4", "0.5", "0.6", "0.8")):
        rewards = np.array(binary(num_right, 8))
        np.testing.assert_allclose(advantages(rewards * 2 - 1, K=level), advantages(rewards, K=level), rtol=1e-5)


def test_sign_of_a_group_is_that_of_its_regime():
    for num_right, level in itertools.product(range(1, 16), ("0.2", "0.4", "0.5", "0.6", "0.8")):
        ours = advantages(binary(num_right, 16), K=level)
        hard = 16 - num_right >= quantile_rank(Fraction(level), 16)
        assert (ours.sum() > 0) == hard
        assert np.count_nonzero(ours) == (num_right if hard else 16 - num_right)


def test_rank_grows_with_the_level():
    ranks = [quantile_rank(Fraction(level, 1000), 16) for level in range(1, 1000)]
    assert ranks == sorted(ranks)
    assert set(ranks) == set(range(1, 17))


def test_arrays_tensors_and_lists_agree():
    rewards = [1.0, 0.0, 0.5, 0.25]
    expected = advantages(rewards)
    assert torch.equal(group_advantages(rewards, np.int64(4), K=np.float64(0.4)), torch.from_numpy(expected))
    for given in (np.array(rewards), torch.tensor(rewards, dtype=torch.float64), tuple(rewards)):
        np.testing.assert_array_equal(group_advantages(given, torch.tensor([4])).numpy(), expected)
    single = group_advantages(torch.tensor(rewards), 4)
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-6)
    assert group_advantages([], []).shape == (0,)


@pytest.mark.parametrize("level", ["0", "1", 0.0, 1.0, "1.5", -0.2, "0.0", "nan", "a", "1/0", 2])
def test_level_outside_the_open_unit_interval_is_refused(level):
    with pytest.raises(ValueError, match=f"K must be .*{level}"):
        group_advantages([1.0, 0.0], 2, K=level)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "nope"}, "estimator must be one of .*'nope'"),
        ({"quantile": "midpoint"}, "quantile must be one of .*'midpoint'"),
        ({"std": "batch"}, "std must be one of .*'batch'"),
        ({"estimator": "grpo", "std": "none"}, "std must be one of .*'none'"),
        ({"eps": -1.0}, "eps must be 0 or above, got -1.0"),
        ({"mask": "x"}, "mask must be one of .*'x'"),
        ({"mask": "none", "quantile": "linear"}, "mask must be 'qae' with quantile='linear'"),
        ({"gate_on": "x"}, "gate_on must be one of .*'x'"),
        ({"gate_on": "reward", "penalty_N": [0, 0, 0, 0]}, "penalty_N has no effect"),
        ({"correctness_N": [1, 0, 0.5, 0]}, "correctness_N must be 0 or 1, got 0.5"),
        ({"correctness_N": [1, 0]}, r"correctness_N must have shape \[4\]"),
        ({"correctness_N": [1, 0, 0, 0], "penalty_N": [0, 0, 0, 1.0]}, "penalty_N must be 0 or below, got 1.0"),
        ({"valid_N": [1, 0, 1, 1]}, "valid_N must be bool"),
        ({"estimator": "reinforce_pp"}, "lengths_N must be given"),
        ({"estimator": "opo", "lengths_N": [1.0, 2.0, 3.0, 4.0]}, "lengths_N must be integers"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages([1.0, 0.0, 0.0, 1.0], 4, **options)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [("grpo", {"K": "0.4"}), ("rloo", {"eps": 1e-6}), ("qae", {"lengths_N": [1, 1]}), ("qae", {"k": "0.4"})],
)
def test_options_without_effect_are_refused(estimator, options):
    name = next(iter(options))
    with pytest.raises(TypeError, match=f"estimator '{estimator}' has no option '{name}'"):
        group_advantages([1.0, 0.0], 2, estimator=estimator, **options)


def test_masks_need_two_valued_groups():
    with pytest.raises(ValueError, match="mask must be 'qae' where a group has more than two distinct rewards"):
        group_advantages([1.0, 0.5, 0.0], 3, mask="none")


@pytest.mark.parametrize(
    ("rewards", "sizes", "message"),
    [
        ([1.0, 0.0, 1.0], 2, "group_sizes must divide the 3 rewards, got 2"),
        ([1.0, 0.0, 1.0], [2, 2], "group_sizes must add up to the 3 rewards, got a sum of 4"),
        ([1.0, 0.0], [3, -1], "group_sizes must be integers, 0 or above"),
        ([1.0, float("nan")], 2, "rewards_N must be finite, got nan"),
        ([[1.0], [0.0]], 2, "rewards_N must have 1 dimension"),
    ],
)
def test_bad_shapes_are_named(rewards, sizes, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, sizes)


def test_level_must_be_a_number():
    with pytest.raises(TypeError, match="K must be a number"):
        parse_level(True, name="K")
