"""Diagnostics around real updates: right numbers, the same in every layout, and the run as it would be without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.config.schema import ScratchModelConfig
from megatron_rlvr.trainer.scratch import make_model
from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("diagnostics_rank.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnostics") / "model"
    shape = ScratchModelConfig(
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=300
    )
    make_model(folder, shape, texts=["what is 1 + 2 ? three"] * 4, seed=0)
    return folder


def train(model: Path, out: Path, *, world_size: int = 1, look: bool = True, **job: Any) -> dict[str, Any]:
    defaults = {"loss": "ppo", "updates": 1, "parallel": {}, "lr": 1e-6, "witness": False}
    run_ranks(
        SCRIPT,
        [json.dumps({"path": str(model), "out": str(out), "look": look} | defaults | job)],
        world_size=world_size,
    )
    return json.loads(out.with_suffix(".json").read_text()) | {"weights": load_file(out / "model.safetensors")}


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(model, tmp_path_factory.mktemp("single") / "trained", updates=2, loss="kl_cov")


def dynamics(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("dynamics/")}


def test_what_is_found(single: dict[str, Any]) -> None:
    for row in single["rows"]:
        assert row["dynamics/m1"] / row["dynamics/p4"] == pytest.approx(1.0, abs=0.1)
        # Parts add up, by any split (tokens of zero advantage act on nothing but through the penalty, off policy).
        by_source = row["dynamics/p3/source/sums"] + row["dynamics/p3/source/words"]
        assert by_source == pytest.approx(row["dynamics/p3"], rel=1e-9)
        assert row["dynamics/p3/hard"] + row["dynamics/p3/easy"] == pytest.approx(row["dynamics/p3"], rel=1e-9)
        assert 0 < row["dynamics/p3_coefficient_use_max"] <= 1
        assert abs(row["dynamics/p3"]) <= row["dynamics/p3_bound"]
        for name in ("sums", "words"):
            assert row[f"dynamics/m1/source/{name}"] / row[f"dynamics/p4/source/{name}"] == pytest.approx(1.0, abs=0.2)
        tops = [row[f"cov/{name}_mean"] for name in ("top50", "top20", "top2", "top02", "top002")]
        assert tops == sorted(tops)
        assert row["cov/mean"] <= tops[0]
        assert tops[-1] == pytest.approx(row["cov/max"], rel=1e-6)
        assert row["cov/q9998"] == pytest.approx(row["cov/max"], rel=1e-6)


def test_tokens_are_kept(single: dict[str, Any]) -> None:
    for records in single["tokens"]:
        # Four samples, and up to four with the most selected tokens.
        assert 4 <= len(records) <= 8
        counts = sorted((sum(selected) for *_, selected, _ in records), reverse=True)
        assert counts[3] > 0
        for _, _, logprobs, covariance, selected, entropy in records:
            assert len(logprobs) == len(covariance) == len(selected) == len(entropy)
            assert all(value < 0 for value in logprobs)
            assert all(0 < value < 6 for value in entropy)


@pytest.mark.parametrize(("updates", "lr"), [(1, 1e-6), (3, 3e-3)])
def test_attribution_is_that_of_the_specification(updates: int, lr: float, model: Path, tmp_path: Path) -> None:
    """P3 = mean of w A s: w is 1 on policy, the ratio after that, and 0 where it is clipped."""
    got = train(model, tmp_path / "trained", updates=updates, lr=lr, witness=True)
    clipped = 0.0
    for step, row in enumerate(got["rows"]):
        seen = got["witness"][step * updates : (step + 1) * updates]
        for name, key in (("total", ""), ("positive", "/positive"), ("negative", "/negative"), ("hard", "/hard")):
            expected = np.mean([each.get(name, 0.0) for each in seen])
            assert row[f"dynamics/p3{key}"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        clipped += row["clip/high_fraction"] + row["clip/low_fraction"]
    assert (clipped > 0) == (updates > 1), "later updates meet the clip"


def test_looking_changes_nothing(single: dict[str, Any], model: Path, tmp_path: Path) -> None:
    unseen = train(model, tmp_path / "trained", look=False, updates=2, loss="kl_cov")
    for name, tensor in single["weights"].items():
        assert torch.equal(unseen["weights"][name], tensor), name
    for row, seen in zip(unseen["rows"], single["rows"], strict=True):
        assert dynamics(row) == {}
        assert all(seen[key] == value for key, value in row.items())


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}, {}], ids=["tp2", "pp2", "dp2"])
def test_layout_changes_nothing(parallel: dict[str, int], single: dict[str, Any], model: Path, tmp_path: Path) -> None:
    got = train(model, tmp_path / "trained", world_size=2, parallel=parallel, updates=2, loss="kl_cov")
    for row, want in zip(got["rows"], single["rows"], strict=True):
        assert dynamics(row).keys() == dynamics(want).keys()
        for key, value in dynamics(want).items():
            assert row[key] == pytest.approx(value, rel=2e-2, abs=2e-6), key
    for records, wanted in zip(got["tokens"], single["tokens"], strict=True):
        # Each rank names its own candidates, so that two ranks have more of them.
        found = {(update, trajectory): rest for update, trajectory, *rest in records}
        for update, trajectory, _, cov, selected, entropy in wanted:
            _, got_cov, got_selected, got_entropy = found[update, trajectory]
            np.testing.assert_allclose(got_cov, cov, atol=1e-4)
            np.testing.assert_allclose(got_entropy, entropy, atol=1e-4)
            assert got_selected == selected
