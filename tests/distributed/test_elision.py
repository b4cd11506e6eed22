"""Leaving responses with zero advantage out of the update leaves gradient, weights and metrics as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("elision_rank.py")


def update(model: Path, out: Path, *, elide: bool, world_size: int, **parallel: Any) -> tuple[list[dict], dict]:
    job = {"path": str(model), "out": str(out), "parallel": parallel, "elide": elide}
    run_ranks(SCRIPT, [json.dumps(job)], world_size=world_size)
    return json.loads(out.with_suffix(".json").read_text()), load_file(out / "model.safetensors")


@pytest.mark.parametrize(("world_size", "parallel"), [(1, {}), (2, {}), (2, {"pp": 2})], ids=str)
def test_elision_is_exact(world_size: int, parallel: dict[str, Any], tiny_qwen3: Path, tmp_path: Path) -> None:
    full, full_weights = update(tiny_qwen3, tmp_path / "full", elide=False, world_size=world_size, **parallel)
    less, less_weights = update(tiny_qwen3, tmp_path / "less", elide=True, world_size=world_size, **parallel)
    assert 0.3 < less[0]["update/elided_fraction"] < 1.0
    assert less[1]["update/elided_fraction"] > 0.95, "all but padding"
    assert full[0]["update/elided_fraction"] == 0.0
    assert less[0]["grad_norm"] > 0.1
    assert less[1]["grad_norm"] == full[1]["grad_norm"] == 0.0
    for name in ("grad_norm", "loss/policy", "entropy/mean", "entropy/sequence_mean", "cov/mean"):
        assert less[0][name] == pytest.approx(full[0][name], rel=2e-5, abs=1e-7), name
    for name in ("rollout/logprob_diff_mean", "rollout/logprob_diff_max", "cov/max"):
        assert less[0][name] == pytest.approx(full[0][name], rel=1e-4), name
    for name, tensor in full_weights.items():
        torch.testing.assert_close(less_weights[name], tensor, atol=2e-6, rtol=1e-5)
