"""CUDA twins of the ops over tokens against the CPU ones: selections bitwise, losses to rounding."""

import math

import pytest
import torch

from megatron_rlvr.metrics import values
from megatron_rlvr.ops import (
    aggregated_policy_loss,
    get_backend,
    policy_loss,
    ratio_clipped,
    select_tokens,
    set_backend,
    token_covariance,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = [0, 1, 255, 257, 100_003, 3_000_001]


@pytest.fixture(autouse=True)
def native_backend():
    before = get_backend()
    set_backend("native")
    yield
    set_backend(before)


def token_batch(num_tokens, dtype):
    generator = torch.Generator().manual_seed(num_tokens)
    logprobs = -torch.rand(num_tokens, generator=generator, dtype=dtype).pow(3) * 6
    coarse = torch.rand(num_tokens, generator=generator) < 0.6
    return {
        "logprobs_T": torch.where(coarse, (logprobs * 8).round() / 8, logprobs),
        "advantages_T": torch.randn(num_tokens, generator=generator, dtype=dtype).mul(4).round() / 4,
        "mask_T": torch.rand(num_tokens, generator=generator) < 0.8,
        "trajectory_T": torch.arange(num_tokens) // 97,
        "position_T": torch.arange(num_tokens) % 97,
    }


def on_gpu(batch):
    return {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", ["2e-4", "0.3"])
def test_selections_are_bitwise_those_of_the_cpu(num_tokens, dtype, ratio):
    batch = token_batch(num_tokens, dtype)
    clipped = torch.arange(num_tokens) % 7 == 0
    for options in (
        {"method": "kl_cov"},
        {"method": "clip_cov", "lower": 0.1, "upper": 2.0, "ratio_clipped_T": clipped, "seed": 3, "step": 4},
    ):
        expected = select_tokens(**batch, ratio=ratio, **options)
        moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        assert torch.equal(select_tokens(**on_gpu(batch), ratio=ratio, **moved).cpu(), expected)


@pytest.mark.parametrize("num_tokens", SIZES)
def test_covariance_is_bitwise_that_of_the_cpu(num_tokens):
    batch = token_batch(num_tokens, torch.float32)
    names = ("logprobs_T", "advantages_T", "mask_T")
    expected = token_covariance(*(batch[name] for name in names))
    ours = token_covariance(*(batch[name].cuda() for name in names))
    assert torch.equal(ours.cov_T.cpu(), expected.cov_T)
    assert ours.num_tokens == expected.num_tokens
    assert ours.mean == expected.mean or math.isnan(expected.mean)


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("ppo", {"dual_clip": 3.0}),
        ("clip_cov", {}),
        ("kl_cov", {"kl": "abs"}),
        ("kl_cov", {"kl": "k3", "beta": 0.3}),
        ("gspo", {"eps_low": 0.02, "eps_high": 0.03}),
        ("cispo", {}),
    ],
)
def test_losses_are_those_of_the_cpu(num_tokens, dtype, loss, options):
    batch = token_batch(num_tokens, dtype)
    generator = torch.Generator().manual_seed(1)
    old = batch["logprobs_T"] + 0.4 * torch.randn(num_tokens, generator=generator, dtype=dtype)
    tensors = [batch["logprobs_T"], old, batch["advantages_T"], batch["mask_T"]]
    extra = {}
    if loss in ("clip_cov", "kl_cov"):
        extra["selected_T"] = torch.rand(num_tokens, generator=generator) < 0.1
    if loss == "gspo":
        extra["trajectory_T"] = batch["trajectory_T"]
    results = []
    for device in ("cpu", "cuda"):
        logprobs = tensors[0].to(device).requires_grad_()
        moved = {name: tensor.to(device) for name, tensor in extra.items()}
        token_loss, metrics = policy_loss(
            logprobs, *(tensor.to(device) for tensor in tensors[1:]), loss=loss, **options, **moved
        )
        token_loss.sum().backward()
        results.append((token_loss.detach().cpu(), logprobs.grad.cpu(), values(metrics)))
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(results[1][0], results[0][0], **tolerance)
    torch.testing.assert_close(results[1][1], results[0][1], **tolerance)
    for key, value in results[0][2].items():
        assert math.isclose(results[1][2][key], value, rel_tol=1e-5) or math.isnan(value), key


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["ppo", "kl_cov", "gspo", "cispo"])
def test_aggregated_losses_are_those_of_the_cpu(num_tokens, dtype, loss):
    batch = token_batch(num_tokens, dtype)
    generator = torch.Generator().manual_seed(1)
    given = {name: batch[name] for name in ("logprobs_T", "advantages_T", "mask_T")}
    given["old_logprobs_T"] = batch["logprobs_T"] + 0.4 * torch.randn(num_tokens, generator=generator, dtype=dtype)
    given["weights_T"] = torch.rand(num_tokens, generator=generator, dtype=dtype) / max(1, num_tokens)
    given["importance_T"] = torch.rand(num_tokens, generator=generator, dtype=dtype) * 2
    if loss == "kl_cov":
        given["selected_T"] = torch.rand(num_tokens, generator=generator) < 0.1
    if loss == "gspo":
        given["trajectory_T"] = batch["trajectory_T"]
    results = []
    for device in ("cpu", "cuda"):
        moved = {name: tensor.to(device) for name, tensor in given.items()}
        moved["logprobs_T"].requires_grad_()
        total, metrics = aggregated_policy_loss(**moved, loss=loss)
        total.backward()
        results.append((float(total), moved["logprobs_T"].grad.cpu(), values(metrics)))
    assert math.isclose(results[1][0], results[0][0], rel_tol=1e-9 if dtype == torch.float64 else 1e-5, abs_tol=1e-9)
    tolerance = {"rtol": 1e-12, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 1e-9}
    torch.testing.assert_close(results[1][1], results[0][1], **tolerance)


def test_ratio_clipped_is_that_of_the_cpu():
    batch = token_batch(10_000, torch.float32)
    old = batch["logprobs_T"] * 0.7
    tensors = [batch["logprobs_T"], old, batch["advantages_T"], batch["mask_T"]]
    expected = ratio_clipped(*tensors, eps_high=0.2)
    assert torch.equal(ratio_clipped(*(tensor.cuda() for tensor in tensors), eps_high=0.2).cpu(), expected)


def test_metrics_repeat_bitwise():
    batch = on_gpu(token_batch(1_000_003, torch.float32))
    tensors = [batch["logprobs_T"], batch["logprobs_T"] * 0.9, batch["advantages_T"], batch["mask_T"]]
    first, second = (values(policy_loss(*tensors, loss="ppo")[1]) for _ in range(2))
    assert first == second
