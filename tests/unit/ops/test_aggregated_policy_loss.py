"""The fused, aggregated policy loss: the sum of the plain one's tokens, with weights and importance inside, in fp64."""

import math

import pytest
import torch

from megatron_rlvr.metrics import values
from megatron_rlvr.ops import aggregated_policy_loss, get_backend, policy_loss, set_backend

LOSS_CASES = [
    ("ppo", {"dual_clip": 1.5}),
    ("clip_cov", {"eps_low": 0.2, "eps_high": 0.2}),
    *[("kl_cov", {"kl": kind, "beta": 0.7}) for kind in ("abs", "k1", "k2", "k3")],
    ("gspo", {"eps_low": 0.02, "eps_high": 0.03}),
    ("cispo", {"eps_low": 0.3}),
]


@pytest.fixture(autouse=True)
def restore_backend():
    before = get_backend()
    yield
    set_backend(before)


def batch_of(num_tokens, dtype, loss):
    """A third of the tokens has advantage 0; outside the mask everything is NaN, weights included."""
    generator = torch.Generator().manual_seed(num_tokens)
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    trajectory = torch.arange(num_tokens) // 7
    logprobs = -torch.rand(num_tokens, generator=generator, dtype=dtype) * 3
    tensors = {
        "logprobs_T": logprobs,
        "old_logprobs_T": logprobs + 0.4 * torch.randn(num_tokens, generator=generator, dtype=dtype),
        "advantages_T": torch.randn(num_tokens // 7 + 1, generator=generator, dtype=dtype)[trajectory],
        "weights_T": torch.rand(num_tokens, generator=generator, dtype=dtype) / 100,
        "importance_T": torch.rand(num_tokens, generator=generator, dtype=dtype) * 2,
    }
    tensors["advantages_T"][trajectory % 3 == 0] = 0.0
    tensors["importance_T"][::11] = 0.0
    batch = {name: torch.where(mask, tensor, torch.nan) for name, tensor in tensors.items()} | {"mask_T": mask}
    if loss in ("clip_cov", "kl_cov"):
        batch["selected_T"] = torch.rand(num_tokens, generator=generator) < 0.3
    if loss == "gspo":
        batch["trajectory_T"] = trajectory
    return batch


def composed(batch, loss, options):
    """Plain tokens, then the weights: what the fused op must give."""
    plain = {name: tensor for name, tensor in batch.items() if name not in ("weights_T", "importance_T")}
    loss_T, metrics = policy_loss(**plain, loss=loss, **options)
    scale_T = (batch["weights_T"].double() * batch["importance_T"].double())[batch["mask_T"]]
    return (loss_T[batch["mask_T"]].double() * scale_T).sum(), metrics


def outcome(call, batch):
    logprobs = batch["logprobs_T"].clone().requires_grad_()
    total, metrics = call(batch | {"logprobs_T": logprobs})
    (3.0 * total).backward()
    return total.detach(), logprobs.grad, values(metrics)


@pytest.mark.parametrize(("loss", "options"), LOSS_CASES)
@pytest.mark.parametrize("num_tokens", [0, 1, 33, 20_001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_it_is_the_weighted_sum(loss, options, num_tokens, dtype, backend):
    set_backend("reference")
    batch = batch_of(num_tokens, dtype, loss)
    expected = outcome(lambda given: composed(given, loss, options), batch)
    set_backend(backend)
    ours = outcome(lambda given: aggregated_policy_loss(**given, loss=loss, **options), batch)
    assert ours[0].dtype == torch.float64
    assert ours[0].shape == ()
    assert ours[1].dtype == dtype
    tolerance = {"rtol": 1e-12, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 1e-8}
    torch.testing.assert_close(ours[0], expected[0], rtol=tolerance["rtol"], atol=1e-6 if dtype != torch.float64 else 0)
    torch.testing.assert_close(ours[1], expected[1], **tolerance)
    assert ours[2].keys() == expected[2].keys()
    for key, value in expected[2].items():
        assert math.isclose(ours[2][key], value, rel_tol=1e-5) or math.isnan(value), key


@pytest.mark.parametrize(("loss", "options"), [case for case in LOSS_CASES if case[0] != "kl_cov"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_tokens_of_zero_advantage_may_be_left_out(loss, options, backend):
    """Sum and gradient in fp64 of the rest alone are those of all: they carry the weights of the whole batch."""
    set_backend(backend)
    batch = batch_of(3000, torch.float64, loss)
    kept = batch["advantages_T"] != 0.0
    full = outcome(lambda given: aggregated_policy_loss(**given, loss=loss, **options), batch)
    rest = {name: tensor[kept] for name, tensor in batch.items()}
    less = outcome(lambda given: aggregated_policy_loss(**given, loss=loss, **options), rest)
    assert (full[1][~kept & batch["mask_T"]] == 0.0).all()
    torch.testing.assert_close(less[0], full[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(less[1], full[1][kept], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_kl_cov_may_leave_out_what_it_did_not_select(backend):
    set_backend(backend)
    batch = batch_of(3000, torch.float64, "kl_cov")
    kept = batch["advantages_T"] != 0.0
    penalised = outcome(lambda given: aggregated_policy_loss(**given, loss="kl_cov"), batch)
    assert (penalised[1][~kept & batch["mask_T"]] != 0.0).any(), "the paper's penalty falls on zero advantages too"
    batch["selected_T"] &= kept
    full = outcome(lambda given: aggregated_policy_loss(**given, loss="kl_cov"), batch)
    rest = {name: tensor[kept] for name, tensor in batch.items()}
    less = outcome(lambda given: aggregated_policy_loss(**given, loss="kl_cov"), rest)
    torch.testing.assert_close(less[0], full[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(less[1], full[1][kept], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_importance_of_one_is_none(backend):
    set_backend(backend)
    batch = batch_of(500, torch.float32, "ppo")
    ones = torch.ones_like(batch["weights_T"])
    with_ones = outcome(lambda given: aggregated_policy_loss(**(given | {"importance_T": ones}), loss="ppo"), batch)
    without = outcome(lambda given: aggregated_policy_loss(**(given | {"importance_T": None}), loss="ppo"), batch)
    assert torch.equal(with_ones[0], without[0])
    assert torch.equal(with_ones[1], without[1])


def test_sums_do_not_depend_on_threads():
    set_backend("native")
    batch = batch_of(100_003, torch.float32, "ppo")
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(float(aggregated_policy_loss(**batch, loss="ppo")[0]))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_operator_satisfies_torch():
    set_backend("native")
    for number, loss in enumerate(("ppo", "clip_cov", "kl_cov", "gspo", "cispo")):
        batch = batch_of(50, torch.float64, loss)
        names = ("logprobs_T", "old_logprobs_T", "advantages_T", "mask_T", "weights_T", "importance_T")
        tensors = [torch.nan_to_num(batch[name]) if name != "mask_T" else batch[name] for name in names]
        sequence = torch.randn(50, dtype=torch.float64) if loss == "gspo" else None
        arguments = (*tensors, batch.get("selected_T"), sequence, number, 0.2, 0.2, None, 20.0, 1.0, 2)
        torch.library.opcheck(torch.ops.megatron_rlvr.aggregated_policy_loss.default, arguments)
        if loss in ("gspo", "cispo"):
            continue  # Their gradient is not that of their value: parts of it are constants.
        assert torch.autograd.gradcheck(
            lambda x, rest=arguments[1:]: torch.ops.megatron_rlvr.aggregated_policy_loss(x, *rest)[0],
            (tensors[0].requires_grad_(),),
        )


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights_T": torch.ones(3)}, ValueError, "weights_T must have 8 entries"),
        ({"weights_T": torch.ones(8, dtype=torch.int64)}, ValueError, "weights_T must have dtype"),
        ({"importance_T": torch.ones(2, 4)}, ValueError, r"importance_T must have 1 dimension"),
        ({"loss": "nope"}, ValueError, "loss must be one of"),
        ({"loss": "gspo"}, ValueError, "trajectory_T must be given for loss 'gspo'"),
    ],
)
def test_bad_arguments_are_named(backend, change, error, message):
    set_backend(backend)
    x = torch.zeros(8)
    given = {"logprobs_T": x, "old_logprobs_T": x, "advantages_T": x, "mask_T": x == 0, "weights_T": x, "loss": "ppo"}
    with pytest.raises(error, match=message):
        aggregated_policy_loss(**(given | change))
