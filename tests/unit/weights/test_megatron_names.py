"""The mapping's names and shapes against models that Megatron-Core itself builds, on every rank of a layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping

ROOT = Path(__file__).parents[3]
DENSE = [Layout(), Layout(tp=2), Layout(tp=8), Layout(tp=2, pp=2, vpp=2), Layout(pp=4, vpp=2)]
MOE = [Layout(), Layout(tp=2, pp=2, ep=2), Layout(ep=4), Layout(tp=2, ep=2, etp=2), Layout(pp=2, vpp=2, ep=8)]


CASES = {
    "qwen2": DENSE,
    "qwen2_tied": DENSE,
    "qwen3": DENSE,
    "llama_tied": DENSE,
    "mistral": DENSE,
    "qwen3_moe": MOE,
    "qwen3_moe_mixed": MOE,
}


@pytest.fixture(scope="module")
def megatron_ranks(
    model_folder: Callable[[str], tuple[Path, dict[str, torch.Tensor]]],
) -> dict[str, list[dict[str, Any]]]:
    """Parameters of every chunk on every rank of every layout, by family."""
    folders = {str(model_folder(family)[0]): family for family in CASES}
    request = {folder: [asdict(layout) for layout in CASES[family]] for folder, family in folders.items()}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("megatron_names.py")), json.dumps(request)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    built = json.loads(result.stdout.splitlines()[-1])
    return {folders[folder]: ranks for folder, ranks in built.items()}


@pytest.mark.parametrize("family", CASES)
def test_names_and_shapes_are_megatrons(
    family: str,
    megatron_ranks: dict[str, list[dict[str, Any]]],
    model_folder: Callable[[str], tuple[Path, dict[str, torch.Tensor]]],
) -> None:
    ranks = megatron_ranks[family]
    assert len(ranks) == sum(x.pp * x.vpp * max(x.tp, x.ep * x.etp) for x in CASES[family])
    shape = ModelShape.from_hf(model_folder(family)[0])
    for rank in ranks:
        mapping = Mapping(shape, layout=Layout(**rank["layout"]), naming="local")
        shards = mapping.shards(rank["tp"], rank["pp"], rank["vpp"], rank["ep"], etp_rank=rank["etp"])
        assert {name: list(spec.shape) for name, spec in shards.items()} == rank["parameters"], rank["layout"]
