"""The bodies of the CUDA kernels of policy_loss and token_selection, run on the CPU by csrc/emulation.

MEGATRON_RLVR_SANITIZE=1 builds with ASan and UBSan (tools/sanitize.sh).
"""

import ctypes
import math
import os
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_rlvr.metrics import values
from megatron_rlvr.ops import get_backend, policy_loss, set_backend
from megatron_rlvr.ops.exact import NUM_LIMBS, limbs_to_fraction

ROOT = Path(__file__).parents[3]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
LOSSES = ("ppo", "clip_cov", "kl_cov", "gspo", "cispo")
KL_KINDS = ("abs", "k1", "k2", "k3")
NUM_SUMS = 12
SIZES = [1, 63, 65, 1000]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "token_ops.so"
    flags = SANITIZERS if os.environ.get("MEGATRON_RLVR_SANITIZE") == "1" else []
    source = ROOT / "csrc" / "emulation" / "token_ops_emulated.cpp"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", *flags]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def reference_backend():
    before = get_backend()
    set_backend("reference")
    yield
    set_backend(before)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*numbers):
    return [ctypes.c_int64(number) for number in numbers]


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("ppo", {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": 1.5}),
        ("clip_cov", {"eps_low": 0.2, "eps_high": 0.2}),
        *[("kl_cov", {"kl": kind, "beta": 0.7}) for kind in KL_KINDS],
        ("cispo", {"eps_low": 0.5, "eps_high": 0.28}),
    ],
)
def test_policy_loss(emulated, num_tokens, blocks, weighted, loss, options):
    generator = torch.Generator().manual_seed(num_tokens)
    logprobs = -torch.rand(num_tokens, generator=generator)
    old = logprobs + 0.4 * torch.randn(num_tokens, generator=generator)
    advantages = torch.randn(num_tokens, generator=generator)
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    selected = torch.rand(num_tokens, generator=generator) < 0.3 if loss in ("clip_cov", "kl_cov") else None
    ours, slope = torch.full((num_tokens,), torch.nan), torch.full((num_tokens,), torch.nan)
    sums = torch.full((NUM_SUMS,), torch.nan, dtype=torch.float64)
    weights, importance = torch.rand(2, num_tokens, generator=generator) if weighted else (None, None)
    emulated.emulated_policy_loss(
        *(pointer(tensor) for tensor in (logprobs, old, advantages, mask, selected, None, weights, importance)),
        *integers(num_tokens, LOSSES.index(loss)),
        ctypes.c_double(options.get("eps_low", 0.0)),
        ctypes.c_double(options.get("eps_high", 0.0)),
        ctypes.c_double(options.get("dual_clip", math.nan)),
        ctypes.c_double(20.0),
        ctypes.c_double(options.get("beta", 0.0)),
        *integers(KL_KINDS.index(options.get("kl", "abs")), blocks),
        *(pointer(tensor) for tensor in (None if weighted else ours, slope, sums)),
    )
    logprobs.requires_grad_()
    expected, metrics = policy_loss(logprobs, old, advantages, mask, loss=loss, selected_T=selected, **options)
    scale = torch.ones(num_tokens) if weights is None else weights * importance
    (expected * scale).sum().backward()
    assert ours.isnan().all() if weighted else torch.allclose(ours, expected.detach(), rtol=2e-6, atol=1e-6)
    total = float((expected.detach().double() * scale.double()).sum())
    assert math.isclose(float(sums[11]), total, rel_tol=1e-5, abs_tol=1e-6)
    torch.testing.assert_close(slope, logprobs.grad, rtol=2e-6, atol=1e-6)
    assert sums[0] == mask.sum()
    plain = values(metrics)
    if mask.any():
        assert math.isclose(float(sums[2] / sums[0]), plain["ratio/mean"], rel_tol=1e-6)
        assert math.isclose(float(sums[3]), plain["ratio/max"], rel_tol=1e-6)


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_covariance_sums(emulated, num_tokens, blocks):
    generator = torch.Generator().manual_seed(num_tokens)
    scale = 10.0 ** torch.randint(-300, 150, (num_tokens,), generator=generator).double()
    logprobs = -torch.rand(num_tokens, generator=generator, dtype=torch.float64) * scale
    advantages = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    logprobs[::10] = torch.nan
    packed = torch.zeros(2 + 3 * NUM_LIMBS, dtype=torch.int64)
    emulated.emulated_covariance_sums(
        *(pointer(tensor) for tensor in (logprobs, advantages, mask)), *integers(num_tokens, blocks), pointer(packed)
    )
    good = mask & logprobs.isfinite()
    assert packed[:2].tolist() == [int(mask.sum()), int((mask & logprobs.isnan()).sum())]
    for tensor, limbs in zip((logprobs, advantages, logprobs * advantages), packed[2:].view(3, NUM_LIMBS), strict=True):
        assert limbs_to_fraction(limbs) == sum((Fraction(x) for x in tensor[good].tolist()), Fraction(0))


@pytest.mark.parametrize("num_values", SIZES)
@pytest.mark.parametrize(("shift", "bits"), [(53, 11), (42, 11), (0, 10), (60, 4)])
def test_digits(emulated, num_values, shift, bits):
    generator = torch.Generator().manual_seed(num_values)
    numbers = torch.randint(-(2**63), 2**63 - 1, (num_values,), generator=generator)
    numbers[::2] = numbers[0]
    among = torch.randint(0, 2, (num_values,), generator=generator)
    unsigned = [number % 2**64 for number in numbers.tolist()]
    prefix = unsigned[0] >> (shift + bits)
    for filtered in (None, among):
        counts = torch.zeros(2**bits, dtype=torch.int64)
        emulated.emulated_digits(
            *(pointer(numbers), *integers(num_values, 3), ctypes.c_uint64(prefix), *integers(shift, bits)),
            *(pointer(filtered), *integers(1), pointer(counts)),
        )
        expected = [0] * 2**bits
        for number, wanted in zip(unsigned, among.tolist(), strict=True):
            if number >> (shift + bits) == prefix and (filtered is None or wanted == 1):
                expected[(number >> shift) % 2**bits] += 1
        assert counts.tolist() == expected
