"""The CUDA kernels of log-prob and entropy on a real GPU, against float64."""

import pytest
import torch

from megatron_rlvr.ops import chunked_logprob_entropy, set_backend, vocab_parallel_logprob_entropy
from megatron_rlvr.ops.backend import get_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def native_backend():
    before = get_backend()
    set_backend("native")
    yield
    set_backend(before)


def exact(logits, targets, upstream, temperature=1.0):
    x = logits.double() / temperature
    log_p = torch.log_softmax(x, dim=1)
    p = log_p.exp()
    safe = torch.where(p > 0, log_p, 0.0)
    entropy = -(p * safe).sum(dim=1)
    grad = -(upstream[0].double()[:, None] * p) - upstream[1].double()[:, None] * p * (safe + entropy[:, None])
    grad.scatter_add_(1, targets[:, None], upstream[0].double()[:, None])
    return log_p.gather(1, targets[:, None])[:, 0], entropy, grad / temperature


def batch(rows, columns, dtype, *, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = (3 * torch.randn(rows, columns, generator=generator, device="cuda")).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator, device="cuda")
    return logits, targets, torch.randn(2, rows, generator=generator, device="cuda")


def assert_right(logits, targets, upstream, *, temperature=0.8):
    expected = exact(logits, targets, upstream, temperature)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 3e-6}[logits.dtype]
    gradients = []
    for inplace in (False, True):
        leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        got = vocab_parallel_logprob_entropy(leaf * 1, targets, temperature=temperature, inplace_backward=inplace)
        torch.autograd.backward(list(got), list(upstream))
        torch.testing.assert_close(got[0].detach().double(), expected[0], rtol=2e-7, atol=1e-5)
        torch.testing.assert_close(got[1].detach().double(), expected[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(leaf.grad.double(), expected[2], rtol=rounding, atol=1e-7)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1031), (2, 151_936), (700, 4099), (0, 64)])
def test_shapes_with_and_without_splits(dtype, shape):
    assert_right(*batch(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_strides(dtype):
    wide, targets, upstream = batch(6, 5000, dtype)
    for view in (wide[:, 3:4096], wide[::2, 1:2500]):
        rows = view.shape[0]
        got = vocab_parallel_logprob_entropy(view, targets[:rows] % view.shape[1])
        expected = exact(view, targets[:rows] % view.shape[1], upstream[:, :rows])
        torch.testing.assert_close(got[0].double(), expected[0], rtol=2e-7, atol=1e-5)
        torch.testing.assert_close(got[1].double(), expected[1], rtol=0, atol=1e-5)


def test_the_same_call_repeats_bitwise():
    logits, targets, _ = batch(64, 151_936, torch.bfloat16)
    first = vocab_parallel_logprob_entropy(logits, targets)
    for _ in range(3):
        again = vocab_parallel_logprob_entropy(logits, targets)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_unlikely_columns_and_offsets():
    logits, targets, upstream = batch(4, 9000, torch.float32)
    logits = (logits * 64).round() / 64 + 1000
    logits[0, 100:] = -torch.inf
    logits[1, ::2] = -torch.inf
    targets = torch.tensor([50, 3, 8999, 0], device="cuda")
    assert_right(logits, targets, upstream)


def test_extra_memory_is_under_a_hundredth():
    logits, targets, _ = batch(4096, 32_000, torch.bfloat16)
    leaf = logits.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = vocab_parallel_logprob_entropy(leaf.view_as(leaf), targets, inplace_backward=True)
    torch.autograd.backward(list(outputs), [torch.ones_like(outputs[0])] * 2)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.nbytes


def test_chunked_head_equals_whole_logits():
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator, device="cuda")
    weight = torch.randn(5000, 64, generator=generator, device="cuda") / 8
    targets = torch.randint(5000, (300,), generator=generator, device="cuda")
    results = []
    for chunked in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            outputs = chunked_logprob_entropy(*leaves, targets, chunk_bytes=1 << 20)
        else:
            outputs = vocab_parallel_logprob_entropy(leaves[0] @ leaves[1].t(), targets)
        (outputs[0].sum() + 0.5 * outputs[1].sum()).backward()
        results.append([outputs[0].detach(), outputs[1].detach(), leaves[0].grad, leaves[1].grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
