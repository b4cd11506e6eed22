"""The CUDA kernels' bodies, run on the CPU by csrc/emulation, against float64.

What is tested here is index, tail, split, reduction and merge logic; the instructions themselves need a GPU
(tests marked `gpu`). MEGATRON_RLVR_SANITIZE=1 builds with ASan and UBSan (tools/sanitize.sh).
"""

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
VECTORS = json.loads((ROOT / "tests" / "data" / "vectors.json").read_text())
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = SANITIZERS if os.environ.get("MEGATRON_RLVR_SANITIZE") == "1" else []
    source = ROOT / "csrc" / "emulation" / "vocab_logprob_emulated.cpp"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas", *flags]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values):
    return [ctypes.c_int64(value) for value in values]


def statistics(
    emulated, logits, targets, *, mask=None, moments=False, columns=None, first=0, splits=1, temperature=1.0
):
    columns = logits.shape[1] if columns is None else columns
    packed = torch.full((logits.shape[0], 6 if moments else 4), torch.nan, dtype=torch.float64)
    emulated.emulated_statistics(
        int(logits.dtype == torch.bfloat16),
        *(pointer(logits), pointer(targets), pointer(mask), int(moments)),
        *integers(logits.shape[0], columns, logits.shape[1], logits.stride(0), first),
        *(splits, ctypes.c_double(temperature), pointer(packed)),
    )
    return packed


def merge(emulated, gathered):
    ranks, rows, width = gathered.shape
    logprobs, entropy, saved = torch.empty(rows), torch.empty(rows), torch.empty(rows, 3, dtype=torch.float64)
    emulated.emulated_merge(
        pointer(gathered), *integers(ranks, rows), width, pointer(logprobs), pointer(entropy), pointer(saved)
    )
    return logprobs, entropy, saved


def gradient(emulated, logits, out, targets, saved, upstream, *, columns=None, first=0, splits=1, temperature=1.0):
    columns = logits.shape[1] if columns is None else columns
    upstream = [None if g is None else g.double() for g in upstream]
    emulated.emulated_gradient(
        int(logits.dtype == torch.bfloat16),
        *(pointer(logits), pointer(out), *integers(out.stride(0)), pointer(targets), pointer(saved)),
        *(pointer(upstream[0]), pointer(upstream[1])),
        *integers(logits.shape[0], columns, logits.shape[1], logits.stride(0), first),
        *(splits, ctypes.c_double(temperature)),
    )
    return out


def exact(logits, targets, upstream, temperature=1.0):
    x = logits.double() / temperature
    log_p = torch.log_softmax(x, dim=1)
    p = log_p.exp()
    safe = torch.where(p > 0, log_p, 0.0)
    entropy = -(p * safe).sum(dim=1)
    one = torch.nn.functional.one_hot(targets, logits.shape[1])
    grad = upstream[0].double()[:, None] * (one - p) - upstream[1].double()[:, None] * p * (safe + entropy[:, None])
    return log_p.gather(1, targets[:, None])[:, 0], entropy, grad / temperature


def batch(rows, columns, dtype, *, offset=0, pad=0, seed=0):
    """Logits whose rows start at any alignment: `offset` elements into rows of `columns + offset + pad`."""
    generator = torch.Generator().manual_seed(seed)
    wide = (3 * torch.randn(rows, columns + offset + pad, generator=generator)).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    return wide[:, offset : offset + columns], targets, torch.randn(2, rows, generator=generator)


def assert_right(emulated, logits, targets, upstream, *, splits, temperature=0.8):
    packed = statistics(emulated, logits, targets, splits=splits, temperature=temperature)
    logprobs, entropy, saved = merge(emulated, packed[None])
    expected = exact(logits, targets, upstream, temperature)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-7, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=2e-6)
    rounding = 2**-8 if logits.dtype == torch.bfloat16 else 3e-6
    for out in (logits.clone(memory_format=torch.contiguous_format), logits):  # a new tensor, then in place
        gradient(emulated, logits, out, targets, saved, upstream, splits=splits, temperature=temperature)
        torch.testing.assert_close(out.double(), expected[2], rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 63, 511, 2047, 4099])
@pytest.mark.parametrize("splits", [1, 3])
def test_every_tail_and_split(emulated, dtype, columns, splits):
    assert_right(emulated, *batch(2, columns, dtype, seed=columns), splits=splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 5])
def test_every_alignment(emulated, dtype, offset):
    assert_right(emulated, *batch(3, 1500, dtype, offset=offset, pad=offset + 1), splits=2)


@pytest.mark.parametrize("case", VECTORS["D1_logp_entropy"], ids=lambda c: c["case"])
def test_vectors_with_moments_and_ranks(emulated, case):
    logits = torch.tensor([[float(x) for x in case["logits"]]])
    targets = torch.tensor([case["target"]])
    shards = [(0, logits[:, :7].contiguous()), (7, logits[:, 7:].contiguous())]
    packed = torch.stack(
        [
            statistics(emulated, x, targets, moments=True, first=first, temperature=case["T"], splits=2)
            for first, x in shards
        ]
    )
    # fp32 logits; those near 1e4 carry 1e-3 of rounding, so the float64 answer is for what was given.
    upstream = torch.tensor(case["upstream"])[:, None]
    expected = exact(logits, targets, upstream, case["T"])
    logprobs, entropy, saved = merge(emulated, packed)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=2e-6)
    if case["case"] in ("plain", "T0.7", "T1.3"):
        shard_stats = torch.tensor([[float(x) for x in shard] for shard in case["shards_7_6"]], dtype=torch.float64)
        torch.testing.assert_close(packed[:, 0], shard_stats, rtol=2e-6, atol=1e-6)
    pieces = [
        gradient(emulated, x, x.clone(), targets, saved, upstream, first=first, temperature=case["T"])
        for first, x in shards
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1).double(), expected[2], rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinitely_unlikely_columns(emulated, dtype):
    logits, targets, upstream = batch(4, 4100, dtype)
    logits[0, 7:] = -torch.inf
    logits[1, :2048] = -torch.inf
    logits[2, ::2] = -torch.inf
    logits[3, :] = -torch.inf
    logits[3, 4099] = 2.0
    targets = torch.tensor([3, 2049, 5, 4099])
    out = logits.clone()
    assert_right(emulated, logits.clone(), targets, upstream, splits=3)
    packed = statistics(emulated, logits, targets, splits=3)
    gradient(emulated, logits, out, targets, merge(emulated, packed[None])[2], upstream, splits=3)
    assert (out[logits == -torch.inf] == 0).all()


def test_a_shard_without_any_likely_column(emulated):
    logits, targets, upstream = batch(3, 600, torch.float32)
    logits[:, 300:] = -torch.inf
    targets = targets % 300
    packed = torch.stack([statistics(emulated, logits[:, a : a + 300], targets, first=a, splits=2) for a in (0, 300)])
    assert torch.equal(packed[1, :, :3], torch.tensor([[-torch.inf, 0.0, 0.0]] * 3, dtype=torch.float64))
    logprobs, entropy, _ = merge(emulated, packed)
    expected = exact(logits, targets, upstream)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_an_offset_changes_nothing(emulated, offset):
    logits, targets, upstream = batch(2, 5000, torch.float32)
    logits = (logits * 64).round() / 64 + offset
    assert_right(emulated, logits, targets, upstream, splits=2, temperature=1.0)


def test_gradients_of_a_row_sum_to_zero(emulated):
    logits, targets, _ = batch(3, 5000, torch.float32)
    saved = merge(emulated, statistics(emulated, logits, targets)[None])[2]
    for upstream in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
        rows = [torch.full((3,), value) for value in upstream]
        out = gradient(emulated, logits, torch.empty_like(logits), targets, saved, rows)
        assert (out.double().sum(dim=1).abs() <= 1e-6 * out.double().norm(dim=1)).all()


def test_padded_columns_and_masked_rows(emulated):
    logits, targets, upstream = batch(3, 700, torch.bfloat16)
    columns, mask = 650, torch.tensor([True, False, True])
    targets = targets % columns
    expected = exact(logits[:, :columns], targets, upstream * mask)
    logits[:, columns:] = torch.nan
    logits[1] = torch.nan
    for splits in (1, 2):
        packed = statistics(emulated, logits, targets, mask=mask, columns=columns, splits=splits)
        logprobs, entropy, saved = merge(emulated, packed[None])
        torch.testing.assert_close(logprobs[mask].double(), expected[0][mask], rtol=0, atol=2e-6)
        assert logprobs[1] == entropy[1] == 0
        out = torch.full_like(logits, 7.0)
        gradient(emulated, logits, out, targets, saved, list(upstream * mask), columns=columns, splits=splits)
        torch.testing.assert_close(out[mask][:, :columns].double(), expected[2][mask], rtol=2**-8, atol=1e-7)
        assert (out[1] == 0).all()
        assert (out[:, columns:] == 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 9, 2500, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_logit_gives_nan(emulated, dtype, column, poison):
    logits, targets, _ = batch(2, 4100, dtype)
    logits[1, column] = poison
    logprobs, entropy, _ = merge(emulated, statistics(emulated, logits, targets, splits=2)[None])
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True]
