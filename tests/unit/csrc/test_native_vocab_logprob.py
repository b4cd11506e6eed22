"""The extension's log-prob and entropy: every instruction set against float64, and the ops' own contracts."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

_C = pytest.importorskip("megatron_rlvr._C")
from megatron_rlvr.ops import native  # noqa: E402  needs the extension

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())
OPS = torch.ops.megatron_rlvr
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def runnable_kernels():
    chosen = _C.cpu_kernels()
    names = []
    for name in ("portable", "avx2", "avx512"):
        try:
            _C.set_cpu_kernels(name)
        except ValueError:
            continue
        names.append(name)
    _C.set_cpu_kernels(chosen)
    return names


@pytest.fixture(params=runnable_kernels())
def kernels(request):
    chosen = _C.cpu_kernels()
    _C.set_cpu_kernels(request.param)
    yield request.param
    _C.set_cpu_kernels(chosen)


def logprob_entropy(logits_TV, targets_T, temperature=1.0, inplace_backward=False):
    return native.vocab_parallel_logprob_entropy(
        logits_TV, targets_T, temperature=temperature, group=None, inplace_backward=inplace_backward
    )


def exact(logits_TV, targets_T, upstream, temperature=1.0):
    """Log-probs, entropies and the logits' gradient in float64, -inf columns with p log p = 0."""
    x_TV = logits_TV.double() / temperature
    log_p_TV = torch.log_softmax(x_TV, dim=1)
    p_TV = log_p_TV.exp()
    safe_TV = torch.where(p_TV > 0, log_p_TV, 0.0)
    entropy_T = -(p_TV * safe_TV).sum(dim=1)
    one_TV = torch.nn.functional.one_hot(targets_T, logits_TV.shape[1])
    grad_TV = upstream[0].double()[:, None] * (one_TV - p_TV)
    grad_TV -= upstream[1].double()[:, None] * p_TV * (safe_TV + entropy_T[:, None])
    return log_p_TV.gather(1, targets_T[:, None])[:, 0], entropy_T, grad_TV / temperature


def batch(rows, columns, dtype, *, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    return logits, targets, torch.randn(2, rows, generator=generator)


def assert_right(logits, targets, upstream, *, temperature=1.0, inplace=False):
    leaf = logits.clone().requires_grad_()
    got = logprob_entropy(leaf * 1 if inplace else leaf, targets, temperature, inplace)
    torch.autograd.backward(list(got), [upstream[0].to(got[0].dtype), upstream[1].to(got[0].dtype)])
    logprobs, entropy, gradient = exact(logits, targets, upstream, temperature)
    double = logits.dtype == torch.float64
    torch.testing.assert_close(got[0].detach().double(), logprobs, rtol=1e-12 if double else 2e-7, atol=1e-6)
    torch.testing.assert_close(got[1].detach().double(), entropy, rtol=0, atol=1e-11 if double else 2e-6)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-6, torch.float64: 1e-11}
    smallest = 6e-8 if logits.dtype == torch.float16 else 1e-7 if not double else 1e-12
    assert leaf.grad.dtype == logits.dtype
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=rounding[logits.dtype], atol=smallest)
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 2047, 2048, 2049, 5003])
def test_values_and_gradients_at_every_tail(kernels, dtype, columns):
    assert_right(*batch(3, columns, dtype, seed=columns), temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gradients_are_the_same(kernels, dtype):
    logits, targets, upstream = batch(4, 2500, dtype)
    apart = assert_right(logits, targets, upstream, temperature=1.3)
    over = assert_right(logits, targets, upstream, temperature=1.3, inplace=True)
    assert torch.equal(apart, over)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 1)])
def test_empty_and_single(kernels, dtype, shape):
    logits = torch.zeros(shape, dtype=dtype, requires_grad=True)
    logprobs, entropy = logprob_entropy(logits, torch.zeros(shape[0], dtype=torch.int64))
    assert logprobs.tolist() == entropy.tolist() == [0.0] * shape[0]
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == shape
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_strides(kernels, dtype):
    wide, targets, upstream = batch(6, 700, dtype)
    targets = targets % 90
    for view in (wide[:, 3:93], wide[::2, 100:190], wide[:, :90].t().contiguous().t()):
        rows = view.shape[0]
        assert_right(view, targets[:rows], upstream[:, :rows])
        ours = logprob_entropy(view, targets[:rows])
        packed = logprob_entropy(view.contiguous(), targets[:rows])
        assert torch.equal(ours[0], packed[0])
        assert torch.equal(ours[1], packed[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinitely_unlikely_columns(kernels, dtype):
    logits, targets, upstream = batch(5, 4100, dtype)
    logits[0, 7:] = -torch.inf  # whole blocks, and all but a few columns
    logits[1, :2048] = -torch.inf  # the first block
    logits[2, ::2] = -torch.inf
    logits[3, :] = -torch.inf
    logits[3, 4099] = 2.0  # one column left: certain
    targets = torch.tensor([3, 2049, 5, 4099, 0])
    gradient = assert_right(logits, targets, upstream)
    assert (gradient[logits == -torch.inf] == 0).all()
    assert (gradient[3] == 0).all()


def test_a_target_that_cannot_happen(kernels):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    logprobs, _ = logprob_entropy(logits, torch.tensor([1]))
    assert logprobs.item() == -torch.inf
    logprobs.sum().backward()
    p = torch.softmax(logits.detach(), dim=1)[0]
    torch.testing.assert_close(logits.grad[0], torch.tensor([-p[0], 1.0, -p[2]]))


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_an_offset_changes_nothing(kernels, offset):
    # Multiples of 1/64 stay exact after the offset, so that only the formulas are judged.
    logits, targets, upstream = batch(4, 30_000, torch.float32)
    logits = (logits * 64).round() / 64
    plain = logprob_entropy(logits, targets)
    moved = logprob_entropy(logits + offset, targets)
    torch.testing.assert_close(moved, plain, rtol=0, atol=2e-6)
    assert_right(logits + offset, targets, upstream)


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_gradients_of_a_row_sum_to_zero(kernels, scale):
    logits, targets, _ = batch(6, 30_000, torch.float32, scale=scale)
    logits[4, 77] += 25.0  # nearly certain,
    logits[5, 78] += 25.0
    targets[4] = 77  # of the target, and of another
    for upstream in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0), (-1e-3, 1.0)):
        leaf = logits.clone().requires_grad_()
        got = logprob_entropy(leaf, targets)
        (upstream[0] * got[0] + upstream[1] * got[1]).sum().backward()
        sums = leaf.grad.double().sum(dim=1).abs()
        assert (sums <= 1e-6 * leaf.grad.double().norm(dim=1)).all(), sums / leaf.grad.double().norm(dim=1)


def test_a_certain_row_keeps_its_small_digits(kernels):
    logits, targets, upstream = batch(3, 5000, torch.float32, scale=1.0)
    logits[:, 2100] = 22.0
    logits[:, 100] = 21.0 - torch.tensor([20.0, 5.0, 0.0])
    targets[:] = 2100
    got = logprob_entropy(logits, targets)
    expected = exact(logits, targets, upstream)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", VECTORS["D1_logp_entropy"], ids=lambda c: c["case"])
def test_vectors_with_moments_and_every_split(kernels, case):
    logits = torch.tensor([[float(x) for x in case["logits"]]], dtype=torch.float64)
    targets = torch.tensor([case["target"]])
    columns = logits.shape[1]
    for split in range(columns + 1):
        parts = [
            OPS.vocab_logprob_statistics(part.contiguous(), targets, None, case["T"], first, part.shape[1], True)
            for part, first in ((logits[:, :split], 0), (logits[:, split:], split))
        ]
        if split == 7:
            expected = [[float(x) for x in shard] for shard in case["shards_7_6"]]
            torch.testing.assert_close(
                torch.cat(parts), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
            )
        merged = OPS.vocab_logprob_merge(logits, targets, torch.stack(parts), None, case["T"], 0, columns)
        torch.testing.assert_close(merged[0].item(), case["logp"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged[1].item(), case["H"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_split_gives_the_whole(kernels, dtype):
    logits, targets, upstream = batch(4, 999, dtype)
    whole = logprob_entropy(logits, targets)
    gradient = exact(logits, targets, upstream)[2]
    for cuts in ([0, 500, 999], [0, 1, 2, 998, 999], [0, 0, 999]):
        shards = [(a, logits[:, a:b].contiguous()) for a, b in pairwise(cuts)]
        packed = torch.stack(
            [OPS.vocab_logprob_statistics(x, targets, None, 1.0, first, x.shape[1]) for first, x in shards]
        )
        pieces = []
        for first, x in shards:
            logprobs, entropy, saved = OPS.vocab_logprob_merge(x, targets, packed, None, 1.0, first, x.shape[1])
            torch.testing.assert_close(logprobs, whole[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(entropy, whole[1], rtol=0, atol=1e-6)
            pieces.append(OPS.vocab_logprob_gradient(x, targets, saved, *upstream, 1.0, first, x.shape[1]))
        resolution = 2**-8 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(torch.cat(pieces, dim=1).double(), gradient, rtol=resolution, atol=1e-7)


def test_padded_columns_take_no_part(kernels):
    logits, targets, upstream = batch(4, 600, torch.float32)
    targets = targets % 577
    columns = 577
    logits[:, columns:] = torch.nan
    packed = OPS.vocab_logprob_statistics(logits, targets, None, 1.0, 0, columns)[None]
    leaf = logits.clone().requires_grad_()
    logprobs, entropy, _ = OPS.vocab_logprob_merge(leaf, targets, packed, None, 1.0, 0, columns)
    torch.autograd.backward([logprobs, entropy], list(upstream))
    expected = exact(logits[:, :columns], targets, upstream)
    torch.testing.assert_close(logprobs.detach().double(), expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(leaf.grad[:, :columns].double(), expected[2], rtol=2e-6, atol=1e-7)
    assert (leaf.grad[:, columns:] == 0).all()


def test_masked_rows_are_not_read(kernels):
    logits, targets, upstream = batch(5, 300, torch.bfloat16)
    mask = torch.tensor([True, False, True, False, True])
    expected = exact(logits, targets, upstream)
    logits[~mask] = torch.nan
    leaf = logits.clone().requires_grad_()
    shards = ((0, logits[:, :150]), (150, logits[:, 150:]))
    packed = torch.stack([OPS.vocab_logprob_statistics(part, targets, mask, 1.0, first, 150) for first, part in shards])
    logprobs, entropy, _ = OPS.vocab_logprob_merge(leaf, targets, packed, mask, 1.0, 0, 300)
    torch.autograd.backward([logprobs, entropy], list(upstream))
    torch.testing.assert_close(logprobs.detach().double(), expected[0].where(mask, 0.0), rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy.detach().double(), expected[1].where(mask, 0.0), rtol=0, atol=2e-6)
    assert (leaf.grad[~mask] == 0).all()
    torch.testing.assert_close(leaf.grad[mask].double(), expected[2][mask], rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 31, 2050, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_logit_is_found(kernels, dtype, column, poison):
    logits, targets, _ = batch(3, 4100, dtype)
    logits[1, column] = poison
    with pytest.raises(ValueError, match=r"logits_TV must be finite .* in row 1"):
        logprob_entropy(logits, targets)
    logits[1] = -torch.inf
    logits[1, column] = poison
    with pytest.raises(ValueError, match=r"logits_TV must be finite .* in row 1"):
        logprob_entropy(logits, targets)


def test_only_one_output_used(kernels):
    logits, targets, upstream = batch(3, 100, torch.float32)
    zero = torch.zeros(3)
    for index, pair in ((0, (upstream[0], zero)), (1, (zero, upstream[1]))):
        leaf = logits.clone().requires_grad_()
        (logprob_entropy(leaf, targets)[index] * upstream[index]).sum().backward()
        torch.testing.assert_close(leaf.grad.double(), exact(logits, targets, pair)[2], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(temperature):
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 3, 8, 5])
    assert torch.autograd.gradcheck(lambda x: logprob_entropy(x, targets, temperature), (logits,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_keep_the_dispatcher_contracts(dtype):
    logits, targets, upstream = batch(4, 40, dtype)
    mask = torch.tensor([True, True, False, True])
    for moments in (False, True):
        opcheck(OPS.vocab_logprob_statistics, (logits, targets, mask, 0.9, 0, 40, moments))
    packed = OPS.vocab_logprob_statistics(logits, targets, None, 0.9, 0, 40)[None]
    opcheck(OPS.vocab_logprob_merge, (logits.clone().requires_grad_(), targets, packed, mask, 0.9, 0, 40))
    saved = OPS.vocab_logprob_merge(logits, targets, packed, None, 0.9, 0, 40)[2]
    backward = (targets, saved, upstream[0], None, 0.9, 0, 40)
    opcheck(OPS.vocab_logprob_gradient, (logits, *backward))
    opcheck(OPS.vocab_logprob_gradient_, (logits.clone(), *backward))


def test_written_over_logits_are_refused_to_others():
    logits, targets, _ = batch(2, 30, torch.float32)
    leaf = logits.clone().requires_grad_()
    hot = leaf * 1
    squares = hot.square().sum()  # saves `hot`, and is older: its backward runs later
    logprobs, _ = logprob_entropy(hot, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + logprobs.sum()).backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), torch.tensor([0, 1]), None, 1.0, 0, 4), r"logits_TV must have 2 dim.* \[2, 3, 4\]"),
        ((torch.zeros(2, 4).int(), torch.tensor([0, 1]), None, 1.0, 0, 4), "logits_TV must have dtype .* Int"),
        ((torch.zeros(4, 2).t(), torch.tensor([0, 1]), None, 1.0, 0, 4), r"columns side by side .* \[1, 2\]"),
        ((torch.zeros(2, 4), torch.tensor([0]), None, 1.0, 0, 4), r"targets_T must have shape \[2\] .* \[1\]"),
        ((torch.zeros(2, 4), torch.tensor([0.0, 1.0]), None, 1.0, 0, 4), "targets_T must be .* int64 .* Float"),
        ((torch.zeros(2, 4), torch.tensor([0, 1]), torch.ones(2), 1.0, 0, 4), "mask_T must be .* bool .* Float"),
        ((torch.zeros(2, 4), torch.tensor([0, 1]), None, 0.0, 0, 4), "temperature must be .* above 0, got 0"),
        ((torch.zeros(2, 4), torch.tensor([0, 1]), None, float("nan"), 0, 4), "temperature must be finite .* nan"),
        ((torch.zeros(2, 4), torch.tensor([0, 1]), None, 1.0, 0, 5), r"num_columns must be in \[0, 4\], got 5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        OPS.vocab_logprob_statistics(*arguments)


def test_in_place_needs_rows_that_lie_apart():
    logits, targets, upstream = batch(3, 10, torch.float32)
    packed = OPS.vocab_logprob_statistics(logits, targets, None, 1.0, 0, 10)[None]
    saved = OPS.vocab_logprob_merge(logits, targets, packed, None, 1.0, 0, 10)[2]
    with pytest.raises(ValueError, match="rows that do not overlap"):
        OPS.vocab_logprob_gradient_(logits[:1].expand(3, 10), targets, saved, *upstream, 1.0, 0, 10)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="name must be portable, avx2 or avx512, got sse"):
        _C.set_cpu_kernels("sse")
