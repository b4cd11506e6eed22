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


@pytest.mark.parametrize(("world_size", "parallel"), [(1, {}), (2, {}), (2, {"pp": 2})], ids=str)
def test_elision_is_exact(world_size: int, parallel: dict[str, Any], tiny_qwen3: Path, tmp_path: Path) -> None:
    job = {"path": str(tiny_qwen3), "out": str(tmp_path), "parallel": parallel}
    run_ranks(SCRIPT, [json.dumps(job)], world_size=world_size)
    for name, found in json.loads((tmp_path / "found.json").read_text()).items():
        full, less = found["full"]["rows"], found["less"]["rows"]
        check_metrics(name, full, less)
        weights = load_file(less_path := found["less"]["weights"])
        for key, tensor in load_file(found["full"]["weights"]).items():
            torch.testing.assert_close(weights[key], tensor, atol=2e-6, rtol=1e-5, msg=lambda m: f"{less_path}: {m}")


def check_metrics(name: str, full: list[dict], less: list[dict]) -> None:
    assert 0.3 < less[0]["update/elided_fraction"] < 1.0
    assert less[1]["update/elided_fraction"] > 0.9, "all but padding"
    assert full[0]["update/elided_fraction"] == full[0]["update/tokens_saved"] == 0.0
    assert less[0]["grad_norm"] > 1e-3
    assert less[1]["grad_norm"] == full[1]["grad_norm"] == 0.0
    same = ["grad_norm", "loss/policy", "cov/mean", "cov/max", "entropy/sampled_mean"]
    if name in ("ppo", "clip_cov", "kl_cov"):
        assert less[0]["update/tokens_probed"] == less[0]["update/tokens_saved"] > 0
        # All the elided are looked at: entropy and mismatch are those of the whole batch.
        same += ["entropy/mean", "entropy/sequence_mean", "rollout/logprob_diff_mean", "mismatch/kl_k3"]
        same += ["mismatch/ess_token", "mismatch/ratio_max", "mismatch/ppl_ratio"]
    elif name.startswith("gspo"):
        same = ["grad_norm", "loss/policy", "entropy/sampled_mean"]
        assert 0 < less[0]["update/tokens_probed"] < less[0]["update/tokens_saved"]
        assert less[0]["entropy/mean"] == pytest.approx(full[0]["entropy/mean"], rel=0.2), "from a sample"
    else:
        assert less[0]["update/tokens_probed"] == 0.0
    if name.startswith(("clip_cov", "kl_cov")):
        shares = [row["cov/selected_fraction"] for row in (full[0], less[0])]
        assert all(share > 0 for share in shares), shares
    for key in same:
        assert less[0][key] == pytest.approx(full[0][key], rel=1e-4, abs=1e-7), (name, key)
