"""Predicted and measured entropy change of a real policy's real update, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_rlvr.config.schema import ScratchModelConfig
from megatron_rlvr.trainer.scratch import make_model
from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("first_order_rank.py")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_pp2_sequence_parallel": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "tp2": (2, {"tp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2_overlapped": (2, {"overlap_grad_reduce": True}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with tied embeddings: on pipeline stages both ends hold them."""
    folder = tmp_path_factory.mktemp("first_order") / "model"
    shape = ScratchModelConfig(
        hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=300
    )
    make_model(folder, shape, texts=["what is 1 + 2 ? three"] * 4, seed=0)
    return folder


def measure(model: Path, out: Path, *, world_size: int = 1, **parallel: Any) -> dict[str, Any]:
    job = {"path": str(model), "out": str(out), "parallel": parallel, "max_tokens": 60}
    run_ranks(SCRIPT, [json.dumps(job)], world_size=world_size)
    return json.loads(out.with_suffix(".json").read_text()) | {"weights": load_file(out / "model.safetensors")}


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(model, tmp_path_factory.mktemp("single") / "trained")


def test_predicted_is_measured(single: dict[str, Any]) -> None:
    assert single["kept"]
    for row in single["rows"]:
        assert abs(row["predicted"]) > 1e-4, "the update moves the entropy by more than rounding"
        assert row["measured"] / row["predicted"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str, model: Path, single: dict[str, Any], tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    got = measure(model, tmp_path / "trained", world_size=world_size, **parallel)
    assert got["kept"]
    assert got["agree"], "every rank knows the prediction"
    for row, want in zip(got["rows"], single["rows"], strict=True):
        assert row["predicted"] == pytest.approx(want["predicted"], rel=1e-3)
        assert row["before"] == pytest.approx(want["before"], abs=1e-6)
        assert row["measured"] / row["predicted"] == pytest.approx(1.0, abs=0.1)
    # Training goes on as if nobody had looked.
    assert got["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
    for name, tensor in single["weights"].items():
        np.testing.assert_allclose(got["weights"][name], tensor, atol=2e-6)
