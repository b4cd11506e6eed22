"""Every CUDA source compiles for an architecture of the build, and no kernel spills registers."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "compile_cuda.py"


def test_kernels_compile_without_spills():
    result = subprocess.run([sys.executable, str(TOOL), "--arch", "90"], capture_output=True, text=True)
    if result.stdout.startswith("no nvcc"):
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stderr
    assert "gradient_kernel<__nv_bfloat16>" in result.stdout
    assert "statistics_kernel<__nv_bfloat16, false>" in result.stdout
    assert "type-check passed  vocab_logprob.cpp" in result.stdout
