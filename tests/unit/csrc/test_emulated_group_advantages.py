"""The bodies of the CUDA kernels of group_advantages, run on the CPU by csrc/emulation, and the kernels themselves.

MEGATRON_RLVR_SANITIZE=1 builds with ASan and UBSan (tools/sanitize.sh).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rlvr.ops import get_backend, group_advantages, set_backend
from megatron_rlvr.ops.advantage_options import AdvantageOptions, parse_advantage_options
from megatron_rlvr.ops.native_tokens import ESTIMATORS, MASKS, STDS, _levels

ROOT = Path(__file__).parents[3]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qae", {}),
    ("qae", {"K": "0.4", "std": "none"}),
    ("qae", {"K": "0.7", "quantile": "linear", "std": "population"}),
    ("qae", {"mask": "pos_mask"}),
    ("qae", {"mask": "neg_mask"}),
    ("qae", {"mask": "none"}),
    ("qae", {"gate_on": "correctness", "penalty_N": True}),
    ("grpo", {}),
    ("grpo", {"std": "population", "eps": 1e-3}),
    ("dr_grpo", {}),
    ("rloo", {}),
    ("reinforce_pp", {"lengths_N": True}),
    ("reinforce_pp_baseline", {"lengths_N": True}),
    ("psr", {}),
    ("nsr", {}),
    ("w_reinforce", {"positive_weight": 0.2}),
    ("gpg", {}),
    ("opo", {"lengths_N": True}),
]
GROUPS = [[], [1], [0, 3, 1, 0], [8] * 9, [5, 1, 16, 2, 33, 7] * 20]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "group_advantages.so"
    flags = SANITIZERS if os.environ.get("MEGATRON_RLVR_SANITIZE") == "1" else []
    source = ROOT / "csrc" / "emulation" / "group_advantages_emulated.cpp"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", *flags]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).emulated_group_advantages


@pytest.fixture(autouse=True)
def reference_backend():
    before = get_backend()
    set_backend("reference")
    yield
    set_backend(before)


def batch(sizes: list[int], options: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Rewards of 0 and 1, some responses invalid, and the columns that the case asks for."""
    rng = np.random.default_rng(len(sizes))
    total = sum(sizes)
    columns = {"lengths_N": rng.integers(0, 9, total), "penalty_N": -rng.random(total).round(1)}
    full: dict[str, Any] = {name: columns[name] if value is True else value for name, value in options.items()}
    return (rng.random(total) < 0.4).astype(np.float64), full | {"valid_N": rng.random(total) < 0.9}


def arguments(rewards: np.ndarray, sizes: list[int], estimator: str, options: dict[str, Any]) -> tuple[Any, ...]:
    """(columns of responses, arrays of groups, settings, parsed options) as the op takes them."""
    parsed: AdvantageOptions = parse_advantage_options(estimator, options, rewards_N=rewards, num_groups=len(sizes))
    gate = parsed.correctness_N if parsed.gate_on == "correctness" else None
    columns = [rewards, parsed.valid_N, gate, parsed.penalty_N, parsed.lengths_N]
    sizes_P = np.asarray(sizes, dtype=np.int64)
    numbers = (ESTIMATORS.index(estimator), STDS.index(parsed.std), MASKS.index(parsed.mask))
    return columns, [sizes_P, *_levels(sizes_P, estimator, parsed)], numbers, parsed


@pytest.mark.parametrize("sizes", GROUPS, ids=lambda sizes: f"{len(sizes)} groups")
@pytest.mark.parametrize(("estimator", "options"), CASES, ids=str)
def test_emulated_kernels(emulated, estimator: str, options: dict[str, Any], sizes: list[int]) -> None:
    rewards, full = batch(sizes, options)
    columns, of_groups, numbers, parsed = arguments(rewards, sizes, estimator, full)
    held = [None if column is None else np.ascontiguousarray(column) for column in (*columns, *of_groups)]
    pointers = [ctypes.c_void_p(None if array is None else array.ctypes.data) for array in held]
    advantages = np.full(len(rewards), np.nan)
    outcome = emulated(
        *pointers[:5], ctypes.c_int64(len(rewards)), *pointers[5:], ctypes.c_int64(len(sizes)),
        *(ctypes.c_int64(number) for number in numbers), ctypes.c_double(parsed.eps),
        ctypes.c_double(parsed.positive_weight), ctypes.c_void_p(advantages.ctypes.data),
    )  # fmt: skip
    assert outcome == 0
    expected = group_advantages(rewards, sizes, estimator=estimator, **full).numpy()
    np.testing.assert_allclose(advantages, expected, rtol=1e-12, atol=1e-14)
    assert ((advantages == 0) == (expected == 0)).all(), "what is exactly zero stays so"


def test_emulated_kernels_tell_of_a_mask_that_cannot_be(emulated) -> None:
    rewards = np.array([0.0, 0.5, 1.0])
    held = [np.array([3]), np.array([1]), np.array([0]), np.array([0.0])]
    advantages = np.zeros(3)
    outcome = emulated(
        *(ctypes.c_void_p(rewards.ctypes.data), None, None, None, None, ctypes.c_int64(3)),
        *(ctypes.c_void_p(array.ctypes.data) for array in held),
        *(ctypes.c_int64(number) for number in (1, 0, 0, MASKS.index("pos_mask"))),
        *(ctypes.c_double(1e-6), ctypes.c_double(0.1), ctypes.c_void_p(advantages.ctypes.data)),
    )
    assert outcome == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", GROUPS[1:], ids=lambda sizes: f"{len(sizes)} groups")
@pytest.mark.parametrize(("estimator", "options"), CASES, ids=str)
def test_cuda_kernels(estimator: str, options: dict[str, Any], sizes: list[int]) -> None:
    rewards, full = batch(sizes, options)
    columns, of_groups, numbers, parsed = arguments(rewards, sizes, estimator, full)
    on_device = [
        None if column is None else torch.from_numpy(np.ascontiguousarray(column)).cuda() for column in columns
    ]
    ours = torch.ops.megatron_rlvr.group_advantages(
        on_device[0], *(torch.from_numpy(array) for array in of_groups), *on_device[1:], *numbers,
        parsed.eps, parsed.positive_weight, parsed.penalty_additive,
    )  # fmt: skip
    expected = group_advantages(rewards, sizes, estimator=estimator, **full)
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-12, atol=1e-14)
