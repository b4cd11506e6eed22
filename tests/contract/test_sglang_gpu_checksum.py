"""`tile_checksum` is the checksum of SGLang's GPU kernel, which Triton's interpreter runs on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rlvr.sync.gpu_checksum import tile_checksum
from tests.paths import python_path

KERNEL = "kernels/ops/memory/gpu_tensor_hash.py"


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(20000, generator=generator)
    return [
        *(numbers[:size] for size in (1, 8192, 8193, 20000)),
        numbers[:3].to(torch.bfloat16),
        numbers[:17000].to(torch.bfloat16).view(100, 170),
        torch.randint(0, 255, (40001,), dtype=torch.uint8, generator=generator),
    ]


def test_checksum_is_that_of_sglangs_kernel() -> None:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("SGLang is not installed")
    kernel = Path(spec.origin).parent / KERNEL
    if not kernel.is_file():
        pytest.skip(f"this SGLang has no {KERNEL}")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_checksum.py")), str(kernel)],
        env={**os.environ, "PYTHONPATH": python_path(), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == [tile_checksum(tensor) for tensor in tensors()]
