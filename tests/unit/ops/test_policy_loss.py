"""Policy losses and their derivatives against the vectors, finite differences and independent formulas."""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_rlvr.metrics import merge, values
from megatron_rlvr.ops import policy_loss, ratio_clipped

pytestmark = pytest.mark.usefixtures("ops_backend")

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())
DTYPES = [torch.float64, torch.float32]


def tolerance(dtype):
    return {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-6}


def batch_of(given, dtype):
    mask = torch.tensor(given["mask"], dtype=torch.bool)
    advantages = torch.tensor(given["seq_adv"], dtype=dtype)[:, None].expand(mask.shape)
    return [
        torch.tensor(given["logp"], dtype=dtype).flatten().requires_grad_(),
        torch.tensor(given["old_logp"], dtype=dtype).flatten(),
        advantages.flatten(),
        mask.flatten(),
    ]


def selected_of(places, shape=(6, 8)):
    selected = torch.zeros(shape, dtype=torch.bool)
    for row, column in places:
        selected[row, column] = True
    return selected.flatten()


@pytest.mark.parametrize("case", VECTORS["E1_ppo_clip"], ids=lambda c: f"A{c['A']}-r{c['ratio']}")
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("sym0.2", {"eps_low": 0.2, "eps_high": 0.2}),
        ("higher0.28", {}),
        ("higher0.28_dual3", {"dual_clip": 3.0}),
        ("higher0.28_dual10", {"dual_clip": 10}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ppo_vectors(case, key, options, dtype):
    logprobs = torch.tensor([math.log(case["ratio"]) - 1.5], dtype=dtype, requires_grad=True)
    old = torch.tensor([-1.5], dtype=dtype)
    advantages = torch.tensor([case["A"]], dtype=dtype)
    loss, _ = policy_loss(logprobs, old, advantages, torch.tensor([True]), loss="ppo", **options)
    loss.sum().backward()
    assert loss.dtype == dtype
    torch.testing.assert_close(float(loss), case[key]["loss"], **tolerance(dtype))
    torch.testing.assert_close(float(logprobs.grad), case[key]["dloss_dlogp"], **tolerance(dtype))


@pytest.mark.parametrize("case", VECTORS["B2_clip_cov"]["cases"], ids=lambda c: f"r{c['ratio']}-{c['clip_low']}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_cov_vectors(case, dtype):
    batch = batch_of(VECTORS["B2_clip_cov"]["input"], dtype)
    eps = {"eps_low": case["clip_low"], "eps_high": case["clip_high"]}
    loss, metrics = policy_loss(*batch, loss="clip_cov", selected_T=selected_of(case["selected"]), **eps)
    check_loss(loss, batch, case, dtype)
    shares = values(metrics)
    assert math.isclose(shares["cov/selected_fraction"], len(case["selected"]) / case["N"])
    clipped = shares["clip/high_fraction"] + shares["clip/low_fraction"]
    assert math.isclose(clipped, len(case["ratio_clipped"]) / case["N"])
    assert shares["cov/selected_ratio_clipped"] == 0.0  # the exact eligible set leaves them out


@pytest.mark.parametrize("case", VECTORS["B3_kl_cov"]["cases"], ids=lambda c: f"r{c['ratio']}-{c['kl']}-{c['beta']}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_cov_vectors(case, dtype):
    batch = batch_of(VECTORS["B3_kl_cov"]["input"], dtype)
    options = {"beta": case["beta"], "kl": case["kl"], "selected_T": selected_of(case["selected"])}
    loss, _ = policy_loss(*batch, loss="kl_cov", **options)
    check_loss(loss, batch, case, dtype)


def check_loss(loss, batch, case, dtype):
    flat = {key: torch.tensor(case[key], dtype=dtype).flatten() for key in ("token_loss", "dloss_dlogp")}
    torch.testing.assert_close(loss.detach(), flat["token_loss"], **tolerance(dtype))
    mean = loss.sum() / case["N"]
    torch.testing.assert_close(float(mean), case["loss_token_mean"], **tolerance(dtype))
    mean.backward()
    torch.testing.assert_close(batch[0].grad, flat["dloss_dlogp"], **tolerance(dtype))


@pytest.mark.parametrize("kl", ["abs", "k2", "k3"])
def test_kl_cov_does_nothing_on_policy(kl):
    logprobs, old, advantages, mask = batch_of(VECTORS["B4_kl_cov_on_policy_noop"]["input"], torch.float64)
    with torch.no_grad():
        logprobs.copy_(old)
    loss, metrics = policy_loss(logprobs, old, advantages, mask, loss="kl_cov", kl=kl, selected_T=mask)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages, 0.0), rtol=0, atol=0)
    assert metrics["cov/selected_on_policy"].value == 1.0


def test_k1_pushes_with_a_constant():
    logprobs, old, advantages, mask = batch_of(VECTORS["B3_kl_cov"]["input"], torch.float64)
    loss, _ = policy_loss(logprobs, old, advantages * 0, mask, loss="kl_cov", kl="k1", beta=0.5, selected_T=mask)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -0.5, 0.0).double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("ppo", {}),
        ("ppo", {"dual_clip": 3.0}),
        ("clip_cov", {"eps_low": 0.2, "eps_high": 0.2}),
        ("kl_cov", {}),
        ("kl_cov", {"kl": "k3", "beta": 0.3}),
    ],
)
def test_gradient_is_the_derivative(loss, options):
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(40, dtype=torch.float64, generator=generator) * 3
    old = logprobs + 0.4 * torch.randn(40, dtype=torch.float64, generator=generator)
    advantages = torch.randn(40, dtype=torch.float64, generator=generator)
    mask = torch.rand(40, generator=generator) < 0.8
    if loss in ("clip_cov", "kl_cov"):
        options["selected_T"] = torch.rand(40, generator=generator) < 0.3
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, loss=loss, **options)[0], (logprobs.requires_grad_(),)
    )


def test_gradient_on_the_bounds_is_that_of_the_unclipped_branch():
    """Dyadic bounds, so that r meets them exactly."""
    logprobs = torch.tensor([math.log(1.5), math.log(0.5)], dtype=torch.float64, requires_grad=True)
    ratios = logprobs.detach().exp()
    eps = {"eps_low": float(1 - ratios[1]), "eps_high": float(ratios[0] - 1)}
    advantages = torch.tensor([2.0, -2.0], dtype=torch.float64)
    arguments = (torch.zeros(2, dtype=torch.float64), advantages, torch.ones(2, dtype=torch.bool))
    loss, _ = policy_loss(logprobs, *arguments, loss="ppo", **eps)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages * ratios, rtol=0, atol=0)
    assert not ratio_clipped(logprobs, *arguments, **eps).any()


@pytest.mark.parametrize("loss", ["ppo", "kl_cov", "clip_cov"])
def test_log_ratio_is_clamped(loss):
    logprobs = torch.tensor([30.0, -30.0, 20.0], dtype=torch.float64, requires_grad=True)
    zeros, advantages = torch.zeros(3, dtype=torch.float64), torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    options = {} if loss == "ppo" else {"selected_T": torch.zeros(3, dtype=torch.bool)}
    token_loss, _ = policy_loss(logprobs, zeros, advantages, torch.ones(3, dtype=torch.bool), loss=loss, **options)
    token_loss.sum().backward()
    torch.testing.assert_close(token_loss.detach(), -advantages * torch.tensor([20.0, -20.0, 20.0]).double().exp())
    assert logprobs.grad[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(float(logprobs.grad[2]), math.exp(20.0))


def test_gspo_follows_its_definition():
    generator = torch.Generator().manual_seed(1)
    logprobs = (-torch.rand(12, dtype=torch.float64, generator=generator)).requires_grad_()
    old = logprobs.detach() + 0.01 * torch.randn(12, dtype=torch.float64, generator=generator)
    trajectory = torch.tensor([4] * 5 + [2] * 4 + [7] * 3)
    mask = torch.ones(12, dtype=torch.bool)
    mask[[0, 6]] = False
    advantages = torch.where(trajectory == 2, -1.0, 2.0).double()
    options = {"eps_low": 3e-3, "eps_high": 4e-3, "trajectory_T": trajectory}
    loss, _ = policy_loss(logprobs, old, advantages, mask, loss="gspo", **options)
    loss.sum().backward()
    for sequence in (4, 2, 7):
        members = (trajectory == sequence) & mask
        ratio = float((logprobs.detach() - old)[members].mean().exp())
        advantage = float(advantages[members][0])
        bounded = min(max(ratio, 1 - 3e-3), 1 + 4e-3)
        clipped = -advantage * bounded > -advantage * ratio
        expected = max(-advantage * ratio, -advantage * bounded)
        torch.testing.assert_close(loss[members].detach(), torch.full((int(members.sum()),), expected).double())
        slope = 0.0 if clipped else -advantage * ratio
        torch.testing.assert_close(logprobs.grad[members], torch.full((int(members.sum()),), slope).double())
    assert (logprobs.grad[~mask] == 0).all()


def test_cispo_follows_its_definition():
    logprobs = torch.tensor([-0.5, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.5, -1.0, -1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    loss, metrics = policy_loss(
        logprobs, old, advantages, torch.ones(3, dtype=torch.bool), loss="cispo", eps_low=0.5, eps_high=0.28
    )
    loss.sum().backward()
    weights = torch.tensor([1.28, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), -weights * advantages * logprobs.detach())
    torch.testing.assert_close(logprobs.grad, -weights * advantages)
    assert values(metrics)["clip/high_fraction"] == values(metrics)["clip/low_fraction"] == 1 / 3


@pytest.mark.parametrize("loss", ["ppo", "clip_cov", "kl_cov", "gspo", "cispo"])
def test_outside_the_mask_everything_is_zero(loss):
    logprobs = torch.tensor([-1.0, -torch.inf, torch.nan, 1e30], requires_grad=True)
    old = torch.tensor([-1.2, torch.nan, -torch.inf, -1e30])
    advantages = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    mask = torch.tensor([True, False, False, False])
    options = {}
    if loss in ("clip_cov", "kl_cov"):
        options["selected_T"] = torch.tensor([True, True, True, True])
    if loss == "gspo":
        options["trajectory_T"] = torch.tensor([0, -1, -1, -1])
    token_loss, metrics = policy_loss(logprobs, old, advantages, mask, loss=loss, **options)
    token_loss.sum().backward()
    assert token_loss[1:].tolist() == [0.0, 0.0, 0.0]
    assert logprobs.grad[1:].tolist() == [0.0, 0.0, 0.0]
    assert (token_loss[0] != 0) == (loss != "clip_cov")
    assert all(math.isfinite(value) for value in values(metrics).values())


@pytest.mark.parametrize("loss", ["ppo", "clip_cov", "kl_cov", "gspo", "cispo"])
def test_zero_advantages_give_zero_gradient_on_policy(loss):
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    options = {"selected_T": torch.tensor([True, False])} if loss in ("clip_cov", "kl_cov") else {}
    if loss == "gspo":
        options["trajectory_T"] = torch.tensor([0, 1])
    token_loss, _ = policy_loss(
        logprobs, logprobs.detach().clone(), torch.zeros(2), torch.ones(2, dtype=torch.bool), loss=loss, **options
    )
    token_loss.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", ["ppo", "clip_cov", "kl_cov"])
def test_metrics_merge_to_those_of_the_whole(loss):
    generator = torch.Generator().manual_seed(2)
    batch = [-torch.rand(100, generator=generator) for _ in range(2)] + [torch.randn(100, generator=generator)]
    batch.append(torch.rand(100, generator=generator) < 0.7)
    chosen = torch.rand(100, generator=generator) < 0.2
    if loss == "ppo":
        whole = policy_loss(*batch, loss=loss, eps_high=0.1)[1]
        parts = [policy_loss(*[x[a:b] for x in batch], loss=loss, eps_high=0.1)[1] for a, b in ((0, 33), (33, 100))]
    else:
        whole = policy_loss(*batch, loss=loss, selected_T=chosen)[1]
        parts = [
            policy_loss(*[x[a:b] for x in batch], loss=loss, selected_T=chosen[a:b])[1] for a, b in ((0, 33), (33, 100))
        ]
    merged = values(merge(parts))
    assert merged.keys() == whole.keys()
    for key, value in values(whole).items():
        assert math.isclose(merged[key], value, rel_tol=1e-12), key


def test_no_tokens():
    empty = torch.zeros(0, requires_grad=True)
    loss, metrics = policy_loss(empty, empty.detach(), empty.detach(), torch.zeros(0, dtype=torch.bool), loss="ppo")
    loss.sum().backward()
    assert loss.shape == empty.grad.shape == (0,)
    assert "ratio/max" not in metrics


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "nope"}, ValueError, "loss must be one of .*'nope'"),
        ({"loss": "ppo", "beta": 1.0}, TypeError, "loss 'ppo' has no option 'beta'"),
        ({"loss": "kl_cov", "eps_low": 0.2}, TypeError, "loss 'kl_cov' has no option 'eps_low'"),
        ({"loss": "kl_cov"}, ValueError, "selected_T must be given for loss 'kl_cov'"),
        ({"loss": "ppo", "selected_T": torch.ones(2, dtype=torch.bool)}, ValueError, "selected_T has no effect"),
        ({"loss": "gspo"}, ValueError, "trajectory_T must be given for loss 'gspo'"),
        ({"loss": "ppo", "dual_clip": 1.0}, ValueError, "dual_clip must be above 1, got 1.0"),
        ({"loss": "ppo", "eps_low": 1.5}, ValueError, r"eps_low must be in \[0, 1\], got 1.5"),
        ({"loss": "ppo", "eps_high": -0.1}, ValueError, "eps_high must be 0 or above, got -0.1"),
        ({"loss": "ppo", "logratio_clamp": 0}, ValueError, "logratio_clamp must be above 0, got 0"),
        ({"loss": "kl_cov", "kl": "k4", "selected_T": None}, ValueError, "kl must be one of .*'k4'"),
        ({"loss": "clip_cov", "selected_T": torch.ones(3, dtype=torch.bool)}, ValueError, "selected_T must have 2"),
    ],
)
def test_bad_options_are_named(options, error, message):
    values_T = torch.zeros(2)
    with pytest.raises(error, match=message):
        policy_loss(values_T, values_T, values_T, torch.ones(2, dtype=torch.bool), **options)
