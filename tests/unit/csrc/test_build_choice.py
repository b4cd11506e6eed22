"""setup.py's choice between CPU and CUDA, and its refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


def build_command(**environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext --help`: makes the choice, then builds nothing."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--help"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_cpu_by_wish():
    result = build_command(MEGATRON_RLVR_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "building _C for the CPU only: MEGATRON_RLVR_CUDA=0" in result.stdout


def test_the_choice_says_why():
    result = build_command(MEGATRON_RLVR_CUDA="")
    assert result.returncode == 0, result.stderr
    if torch.version.cuda is None:
        assert f"for the CPU only: torch {torch.__version__} is not built for CUDA" in result.stdout
    else:
        assert "megatron_rlvr: building _C" in result.stdout


def test_an_unknown_wish_is_refused():
    result = build_command(MEGATRON_RLVR_CUDA="yes")
    assert result.returncode != 0
    assert "MEGATRON_RLVR_CUDA must be 0 or 1, got 'yes'" in result.stderr


def test_cuda_that_cannot_be_had_is_refused():
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    result = build_command(MEGATRON_RLVR_CUDA="1")
    assert result.returncode != 0
    assert "MEGATRON_RLVR_CUDA=1, but torch" in result.stderr
