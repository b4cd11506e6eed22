"""Log-prob and entropy on one shard: values and gradients against float64, dtypes, strides, masked columns."""

import json
from pathlib import Path

import pytest
import torch

from megatron_rlvr.ops import vocab_parallel_logprob_entropy
from megatron_rlvr.ops.reference.vocab_parallel import merge_statistics, shard_statistics

pytestmark = pytest.mark.usefixtures("ops_backend")

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())


def oracle(logits_TV, targets_T, temperature=1.0):
    """The defining formulas in float64."""
    x_TV = logits_TV.double() / temperature
    log_p_TV = torch.log_softmax(x_TV, dim=1)
    p_TV = log_p_TV.exp()
    entropy_T = -torch.where(p_TV > 0, p_TV * log_p_TV, 0.0).sum(dim=1)
    return log_p_TV.gather(1, targets_T[:, None].long())[:, 0], entropy_T


def numbers(values):
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


@pytest.mark.parametrize("case", VECTORS["D1_logp_entropy"], ids=lambda c: c["case"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vectors(case, dtype):
    logits = numbers(case["logits"])[None].to(dtype).requires_grad_()
    targets = torch.tensor([case["target"]])
    logprobs, entropy = vocab_parallel_logprob_entropy(logits, targets, temperature=case["T"])
    assert logprobs.dtype == entropy.dtype == dtype
    # float32 inputs of 1e4 carry 1e-3 of their own rounding; the formulas are judged on what they are given.
    expected = (numbers([case["logp"]]), numbers([case["H"]]))
    if dtype == torch.float32:
        expected = oracle(logits.detach(), targets, case["T"])
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(logprobs.detach().double(), expected[0].double(), **tolerance)
    torch.testing.assert_close(entropy.detach().double(), expected[1].double(), **tolerance)
    upstream = case["upstream"]
    (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
    if dtype == torch.float64:
        torch.testing.assert_close(logits.grad[0], numbers(case["grad_logits"]), rtol=1e-11, atol=1e-12)
    assert abs(float(logits.grad.sum())) < 1e-6


@pytest.mark.parametrize("case", VECTORS["D1_logp_entropy"], ids=lambda c: c["case"])
def test_shard_statistics_and_any_split(case):
    logits = numbers(case["logits"])[None]
    targets = torch.tensor([case["target"]])
    for split in range(1, 13):
        parts = [
            shard_statistics(logits[:, :split], targets, temperature=case["T"], first_column=0),
            shard_statistics(logits[:, split:], targets, temperature=case["T"], first_column=split),
        ]
        if split == 7:
            expected = torch.stack([numbers(shard[:4]) for shard in case["shards_7_6"]])
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)
        logprob, entropy, maximum, log_total = merge_statistics(torch.stack(parts))
        torch.testing.assert_close(logprob, numbers([case["logp"]]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(entropy, numbers([case["H"]]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(maximum + log_total, numbers([case["logZ"]]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (5,), generator=generator)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_logprob_entropy(x, targets, temperature=temperature), (logits,)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 1031), (2, 50_001)])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_dtypes_and_odd_shapes(dtype, shape, index_dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, shape[1], (shape[0],), generator=generator).to(index_dtype)
    logprobs, entropy = vocab_parallel_logprob_entropy(logits, targets, temperature=1.3)
    exact = logits.detach().double().requires_grad_()
    expected = oracle(exact, targets, 1.3)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=tolerance)
    weights = torch.randn(2, shape[0], generator=generator)
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()
    (weights[0] * expected[0] + weights[1] * expected[1]).sum().backward()
    assert logits.grad.dtype == dtype
    resolution = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=resolution, atol=max(resolution * 1e-2, 1e-10))


def test_no_tokens():
    logits = torch.zeros(0, 7, requires_grad=True)
    logprobs, entropy = vocab_parallel_logprob_entropy(logits, torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == (0, 7)


def test_any_row_stride():
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(6, 40, generator=generator)
    targets = torch.randint(0, 17, (6,), generator=generator)
    for view in (wide[:, 3:20], wide[::2, :17], wide.t()[:17, :6].t()):
        expected = vocab_parallel_logprob_entropy(
            view.clone(memory_format=torch.contiguous_format), targets[: len(view)]
        )
        ours = vocab_parallel_logprob_entropy(view, targets[: len(view)])
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_offset_changes_nothing():
    generator = torch.Generator().manual_seed(3)
    # Multiples of 1/64 stay exact after the offset, so that only the formulas are judged.
    logits = (torch.randn(4, 3000, generator=generator) * 64).round() / 64
    targets = torch.randint(0, 3000, (4,), generator=generator)
    plain = vocab_parallel_logprob_entropy(logits, targets)
    moved = vocab_parallel_logprob_entropy(logits + 1000.0, targets)
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-6)


def test_masked_columns_take_no_part():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 9, dtype=torch.float64, generator=generator)
    targets = torch.tensor([0, 5, 6])
    padded = torch.cat([logits, torch.full((3, 4), -torch.inf, dtype=torch.float64)], dim=1).requires_grad_()
    expected = logits.clone().requires_grad_()
    for tensor in (padded, expected):
        logprobs, entropy = vocab_parallel_logprob_entropy(tensor, targets)
        (logprobs.sum() - 2 * entropy.sum()).backward()
    torch.testing.assert_close(padded.grad[:, :9], expected.grad, rtol=1e-12, atol=1e-14)
    assert (padded.grad[:, 9:] == 0).all()


def test_inplace_backward_writes_over_the_logits():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(5, 8, generator=generator)
    weight = torch.randn(20, 8, generator=generator)
    targets = torch.randint(0, 20, (5,), generator=generator)
    grads = []
    for inplace in (False, True):
        leaf = hidden.clone().requires_grad_()
        logits = leaf @ weight.t()
        logprobs, entropy = vocab_parallel_logprob_entropy(logits, targets, inplace_backward=inplace)
        (logprobs.sum() + 0.3 * entropy.sum()).backward()
        grads.append(leaf.grad)
        if inplace:
            torch.testing.assert_close(logits.detach() @ weight, leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_inplace_backward_is_refused_where_the_logits_are_needed():
    targets = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="inplace_backward must be false where logits_TV are a leaf"):
        vocab_parallel_logprob_entropy(torch.zeros(2, 3, requires_grad=True), targets, inplace_backward=True)
    # exp saves its own output for backward.
    logits = torch.zeros(2, 3, requires_grad=True).exp()
    logprobs, _ = vocab_parallel_logprob_entropy(logits, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()
    logits = torch.zeros(2, 3, requires_grad=True) * 2
    logprobs, _ = vocab_parallel_logprob_entropy(logits, targets, inplace_backward=True)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, r"targets_T must be in \[0, 3\), got 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), {}, r"targets_T must be in \[0, 3\), got -1"),
        (torch.zeros(2, 3), torch.tensor([0]), {}, "targets_T must have 2 entries .* got 1"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), {}, "targets_T must have dtype .* got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), {}, "logits_TV must have dtype .* torch.int64"),
        (torch.zeros(6), torch.tensor([0, 1]), {}, r"logits_TV must have 2 dimension\(s\), got shape \[6\]"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (torch.tensor([[0.0, 1], [torch.nan, 0]]), torch.tensor([0, 1]), {}, "logits_TV must be finite .* row 1"),
        (torch.tensor([[torch.inf, 1], [0, 0]]), torch.tensor([0, 1]), {}, "logits_TV must be finite .* row 0"),
        (torch.full((1, 2), -torch.inf), torch.tensor([0]), {}, "logits_TV must be finite .* row 0"),
    ],
)
def test_bad_arguments_are_named(logits, targets, options, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprob_entropy(logits, targets, **options)
