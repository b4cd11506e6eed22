"""The extension's ops over responses and tokens against the reference, and as operators of torch."""

import math

import numpy as np
import pytest
import torch

from megatron_rlvr.metrics import values
from megatron_rlvr.ops import (
    get_backend,
    group_advantages,
    policy_loss,
    ratio_clipped,
    select_tokens,
    set_backend,
    token_covariance,
)
from megatron_rlvr.ops.advantage_options import ESTIMATOR_NAMES, OPTIONS_OF
from megatron_rlvr.ops.loss_options import LOSS_NAMES


@pytest.fixture(autouse=True)
def restore_backend():
    before = get_backend()
    yield
    set_backend(before)


def with_both(call):
    """What the call returns with native and with reference."""
    results = []
    for backend in ("native", "reference"):
        set_backend(backend)
        results.append(call())
    return results


def token_batch(num_tokens, dtype=torch.float32, seed=0):
    """Coarse log-probs and few advantages make ties; every third token is unmasked and holds garbage."""
    generator = torch.Generator().manual_seed(seed)
    trajectory = torch.sort(torch.randint(0, 1 + num_tokens // 20, (num_tokens,), generator=generator)).values
    logprobs = -torch.rand(num_tokens, generator=generator, dtype=dtype).pow(3) * 6
    logprobs = torch.where(torch.rand(num_tokens, generator=generator) < 0.6, (logprobs * 8).round() / 8, logprobs)
    mask = torch.arange(num_tokens) % 3 != 1
    advantages = torch.randn(2 + num_tokens // 20, generator=generator, dtype=dtype).mul(4).round() / 4
    return {
        "logprobs_T": torch.where(mask, logprobs, torch.nan),
        "advantages_T": advantages[trajectory],
        "mask_T": mask,
        "trajectory_T": trajectory,
        "position_T": torch.arange(num_tokens),
    }


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 1000, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", ["1e-5", "0.02", "0.5", "1"])
def test_selected_sets_are_equal(num_tokens, dtype, ratio):
    batch = token_batch(num_tokens, dtype)
    native, reference = with_both(lambda: select_tokens(**batch, method="kl_cov", ratio=ratio))
    assert torch.equal(native, reference)
    clipped = torch.arange(num_tokens) % 7 == 0
    bounds = {"lower": 0.1, "upper": 2.0, "seed": 2**64 - 1, "step": num_tokens}
    native, reference = with_both(
        lambda: select_tokens(**batch, method="clip_cov", ratio=ratio, ratio_clipped_T=clipped, **bounds)
    )
    assert torch.equal(native, reference)


@pytest.mark.parametrize("method", ["kl_cov", "clip_cov"])
def test_excluded_tokens_count_and_are_never_selected(method):
    batch = token_batch(5000)
    excluded = batch["advantages_T"] > 0
    native, reference = with_both(lambda: select_tokens(**batch, method=method, ratio="0.4", excluded_T=excluded))
    assert torch.equal(native, reference)
    assert not (native & excluded).any()
    if method == "kl_cov":
        assert int(native.sum()) == int(0.4 * int(batch["mask_T"].sum())), "as many as without"
        with pytest.raises(ValueError, match="excluded_T must have 5000 entries"):
            select_tokens(**batch, method=method, ratio="0.4", excluded_T=excluded[:7])


def test_shuffled_tokens_and_narrow_types_give_the_same_set():
    batch = token_batch(5000)
    set_backend("native")
    expected = select_tokens(**batch, method="kl_cov", ratio="0.03")
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(1))
    shuffled = {name: tensor[order] for name, tensor in batch.items()}
    shuffled |= {name: shuffled[name].int() for name in ("trajectory_T", "position_T")}
    assert torch.equal(select_tokens(**shuffled, method="kl_cov", ratio="0.03"), expected[order])
    strided = {name: torch.stack([tensor, tensor], dim=1)[:, 0] for name, tensor in batch.items()}
    assert torch.equal(select_tokens(**strided, method="kl_cov", ratio="0.03"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_covariance_is_bitwise_equal(dtype):
    batch = token_batch(10_000, dtype)
    tensors = [batch[name] for name in ("logprobs_T", "advantages_T", "mask_T")]
    native, reference = with_both(lambda: token_covariance(*tensors))
    assert torch.equal(native.cov_T, reference.cov_T)
    assert native.mean == reference.mean
    assert native.mean_logprob == reference.mean_logprob


@pytest.mark.parametrize(("low", "high"), [(-320, -300), (-30, 30), (280, 300)])
def test_exact_sums_at_all_magnitudes(low, high):
    """Subnormals and huge numbers; products that overflow are refused alike."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(low, high, (500,), generator=generator).double()
    logprobs = -torch.rand(500, dtype=torch.float64, generator=generator) * 10.0**exponents
    advantages = torch.randn(500, dtype=torch.float64, generator=generator)
    mask = torch.ones(500, dtype=torch.bool)
    native, reference = with_both(lambda: token_covariance(logprobs, advantages, mask))
    assert (native.mean_logprob, native.mean) == (reference.mean_logprob, reference.mean)
    for backend in ("native", "reference"):
        set_backend(backend)
        with pytest.raises(ValueError, match="logprobs_T and advantages_T must be finite on masked tokens, got 500"):
            token_covariance(torch.full((500,), -1e300, dtype=torch.float64) * 1e10, advantages, mask)


LOSS_CASES = [
    ("ppo", {}),
    ("ppo", {"dual_clip": 1.5, "eps_low": 0.1, "eps_high": 0.1}),
    ("clip_cov", {}),
    ("clip_cov", {"eps_low": 0.2, "eps_high": 0.2}),
    *[("kl_cov", {"kl": kind, "beta": 0.7}) for kind in ("abs", "k1", "k2", "k3")],
    ("gspo", {"eps_low": 0.02, "eps_high": 0.03, "dual_clip": 1.2}),
    ("cispo", {"eps_low": 0.3}),
]


@pytest.mark.parametrize(("loss", "options"), LOSS_CASES)
@pytest.mark.parametrize("num_tokens", [0, 1, 33, 20_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_gradients_and_metrics_agree(loss, options, num_tokens, dtype):
    generator = torch.Generator().manual_seed(num_tokens)
    batch = token_batch(num_tokens, dtype, seed=3)
    old = batch["logprobs_T"] + 0.5 * torch.randn(num_tokens, generator=generator, dtype=dtype)
    old[::50] = batch["logprobs_T"][::50]
    old[7::50] -= 30
    extra = {}
    if loss in ("clip_cov", "kl_cov"):
        extra["selected_T"] = torch.rand(num_tokens, generator=generator) < 0.3
    if loss == "gspo":
        extra["trajectory_T"] = batch["trajectory_T"]
    upstream = torch.randn(num_tokens, generator=generator, dtype=dtype)

    def call():
        logprobs = batch["logprobs_T"].clone().requires_grad_()
        token_loss, metrics = policy_loss(
            logprobs, old, batch["advantages_T"], batch["mask_T"], loss=loss, **options, **extra
        )
        (token_loss * upstream).sum().backward()
        return token_loss.detach(), logprobs.grad, values(metrics)

    native, reference = with_both(call)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(native[0], reference[0], **tolerance)
    torch.testing.assert_close(native[1], reference[1], **tolerance)
    assert native[2].keys() == reference[2].keys()
    for key, value in reference[2].items():
        assert math.isclose(native[2][key], value, rel_tol=1e-5) or math.isnan(value), key


def test_ratio_clipped_agrees():
    batch = token_batch(3000)
    old = batch["logprobs_T"] + 0.5 * torch.randn(3000, generator=torch.Generator().manual_seed(0))
    native, reference = with_both(
        lambda: ratio_clipped(batch["logprobs_T"], old, batch["advantages_T"], batch["mask_T"], eps_high=0.2)
    )
    assert torch.equal(native, reference)
    assert native.any()


def test_sums_do_not_depend_on_the_number_of_threads():
    batch = token_batch(200_000)
    old = batch["logprobs_T"] * 0.9
    set_backend("native")
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            metrics = policy_loss(batch["logprobs_T"], old, batch["advantages_T"], batch["mask_T"], loss="ppo")[1]
            covariance = token_covariance(batch["logprobs_T"], batch["advantages_T"], batch["mask_T"])
            found.append((values(metrics), covariance.mean))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_estimators_agree_on_ragged_groups(estimator):
    generator = np.random.default_rng(0)
    sizes = [*generator.integers(0, 20, size=200).tolist(), 1, 0, 2]
    rewards = generator.integers(0, 3, size=sum(sizes)) / 2
    options = {"valid_N": generator.random(sum(sizes)) < 0.9}
    if "lengths_N" in OPTIONS_OF[estimator]:
        options["lengths_N"] = generator.integers(0, 50, size=sum(sizes))
    native, reference = with_both(lambda: group_advantages(rewards, sizes, estimator=estimator, **options))
    torch.testing.assert_close(native, reference, rtol=1e-12, atol=1e-14)
    native, reference = with_both(lambda: group_advantages([], [], estimator=estimator, **_empty(options)))
    assert native.shape == reference.shape == (0,)


def _empty(options):
    return {name: array[:0] for name, array in options.items()}


@pytest.mark.parametrize("level", ["1/16", "0.3", "0.4", "0.55", "15/16", "0.123456789012345678901234567890"])
@pytest.mark.parametrize("quantile", ["inf", "linear"])
@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_quantile_baselines_agree(level, quantile, std):
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 33, size=300).tolist()
    rewards = generator.normal(size=sum(sizes)).round(1)
    options = {"K": level, "quantile": quantile, "std": std}
    native, reference = with_both(lambda: group_advantages(rewards, sizes, **options))
    torch.testing.assert_close(native, reference, rtol=1e-12, atol=1e-14)
    correctness = (rewards > 0).astype(float)
    options |= {"correctness_N": correctness, "penalty_N": -np.abs(rewards)}
    native, reference = with_both(lambda: group_advantages(rewards, sizes, **options))
    torch.testing.assert_close(native, reference, rtol=1e-12, atol=1e-14)


def test_refusals_are_the_same():
    messages = []
    for backend in ("native", "reference"):
        set_backend(backend)
        with pytest.raises(ValueError, match="mask must be 'qae'") as caught:
            group_advantages([1.0, 0.5, 0.0], 3, mask="pos_mask")
        messages.append(str(caught.value).splitlines()[0])
    assert messages[0] == messages[1]


def test_operators_satisfy_torch():
    """Schema, meta kernel and autograd registration."""
    set_backend("native")
    ops = torch.ops.megatron_rlvr
    logprobs = -torch.rand(50, dtype=torch.float64)
    old, advantages = logprobs + 0.1, torch.randn(50, dtype=torch.float64)
    mask, chosen = torch.rand(50) < 0.8, torch.rand(50) < 0.3
    for loss in range(len(LOSS_NAMES)):
        selected = chosen if loss in (1, 2) else None
        sequence = torch.randn(50, dtype=torch.float64) if loss == 3 else None
        tensors = (logprobs.clone().requires_grad_(), old, advantages, mask, selected, sequence)
        torch.library.opcheck(ops.policy_loss.default, (*tensors, loss, 0.2, 0.2, None, 20.0, 1.0, 2))
    torch.library.opcheck(ops.ratio_clipped.default, (logprobs, old, advantages, mask, 0.2, 0.2, 20.0))
    trajectory = torch.arange(50) // 7
    torch.library.opcheck(ops.sequence_logratio.default, (logprobs, old, mask, trajectory))
    torch.library.opcheck(ops.covariance_sums.default, (logprobs, advantages, mask))
    torch.library.opcheck(ops.selection_digits.default, (trajectory, 0, 2, 3))
    torch.library.opcheck(ops.selection_mark.default, (trajectory, trajectory, trajectory, 3, 3, 50))
    sizes, ranks = torch.tensor([20, 30]), torch.tensor([8, 12])
    arrays = (advantages, sizes, ranks, ranks - 1, torch.zeros(2).double(), mask, None, None, None)
    torch.library.opcheck(ops.group_advantages.default, (*arrays, 0, 0, 0, 1e-6, 0.1, True))


def plain(values):
    return values, values, values, values > 0, None, None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, x: ops.covariance_sums(x, x.double(), x > 0), "advantages_T must have dtype Float, got Double"),
        (lambda ops, x: ops.covariance_sums(x, x[:3], x > 0), r"advantages_T must have shape \[8\] .* got \[3\]"),
        (lambda ops, x: ops.covariance_sums(x[::2], x[::2], x[::2] > 0), "logprobs_T must be contiguous"),
        (lambda ops, x: ops.selection_digits(x.long(), 0, 60, 11), r"shift must be in \[0, 64 - bits\], got 60"),
        (lambda ops, x: ops.policy_loss(*plain(x), 9, 0, 0, None, 1, 0, 0), r"loss must be in \[0, 4\]"),
        (lambda ops, x: ops.policy_loss(*plain(x), 2, 0, 0, None, 1, 0, 0), "selected_T must be given"),
        (
            lambda ops, x: ops.group_advantages(
                x.double(), torch.tensor([9]), *[torch.tensor([1])] * 2, torch.zeros(1).double(),
                None, None, None, None, 0, 0, 0, 0.0, 0.0, True,
            ),
            "group_sizes must be 0 or above and add up to 8, got 9",
        ),
    ],
)  # fmt: skip
def test_operators_check_for_themselves(call, message):
    set_backend("native")
    with pytest.raises(ValueError, match=message):
        call(torch.ops.megatron_rlvr, torch.rand(8))
