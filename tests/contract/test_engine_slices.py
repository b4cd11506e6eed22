"""`weights.engine_slices` says of each rank what SGLang's own weight loaders keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_rlvr.weights.engine_slices import engine_boxes
from megatron_rlvr.weights.rules import Kind
from megatron_rlvr.weights.slices import box_index
from tests.paths import python_path

TENSORS = {
    "q": (Kind.qkv, 0, (128, 32)),
    "k": (Kind.qkv, 1, (32, 32)),
    "v": (Kind.qkv, 2, (32, 32)),
    "gate": (Kind.gated, 0, (48, 32)),
    "up": (Kind.gated, 1, (48, 32)),
    "down": (Kind.columns, 0, (32, 48)),
    "embedding": (Kind.vocab, 0, (200, 32)),
}


def test_ranks_hold_what_sglang_loads() -> None:
    sizes = [1, 2, 4, 8]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sglang_layers.py")), json.dumps(sizes)],
        env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kept = json.loads(result.stdout.splitlines()[-1])
    for tp in sizes:
        for name, (kind, part, shape) in TENSORS.items():
            numbered = torch.arange(shape[0] * shape[1]).reshape(shape)
            boxes = engine_boxes(kind, part, shape, tp, 2)
            for rank, box in enumerate(boxes):
                expected = [] if box is None else numbered[box_index(box)].tolist()
                assert kept[str(tp)][rank][name] == expected, (tp, rank, name)
