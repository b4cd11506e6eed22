"""Weights and optimizer through a checkpoint: the same continuation in the same layout, bit by bit, and in others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rlvr.config.schema import ScratchModelConfig
from megatron_rlvr.trainer.scratch import make_model
from megatron_rlvr.weights.conversion import Team, megatron_to_hf
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint_conversion import MOE, write_model

SCRIPT = Path(__file__).with_name("resume_rank.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers whose vocabulary needs padding."""
    folder = tmp_path_factory.mktemp("resumed") / "model"
    shape = ScratchModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=300,
    )
    make_model(folder, shape, texts=["what is 1 + 2 ? three"] * 4, seed=0)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of four layers and four experts."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    tensors = write_model(folder, MOE)
    save_file({name: 0.1 * tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def run(model: Path, out: Path, saved: Path, dtype: str, layout: tuple[int, dict[str, Any]], **more: Any) -> None:
    out.mkdir()
    world_size, parallel = layout
    job = {"path": str(model), "out": str(out), "saved": str(saved), "dtype": dtype, "parallel": parallel}
    run_ranks(SCRIPT, [json.dumps(job | {"steps": 4, "save_after": 2} | more)], world_size=world_size)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every global tensor of a checkpoint, by its key."""
    index = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("of", "dtype", "layout", "other"),
    [
        ("model", "fp32", (2, {"tp": 2}), (2, {"tp": 1, "pp": 2})),
        ("model", "bf16", (2, {"tp": 1}), (1, {"tp": 1, "distributed_optimizer": False})),
        ("experts", "fp32", (2, {"ep": 2}), (2, {"pp": 2, "vpp": 2})),
    ],
    ids=["fp32 tp2 to pp2", "bf16 distributed optimizer to a plain one", "experts over ranks to virtual stages"],
)
def test_training_goes_on_from_a_checkpoint(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    of: str,
    dtype: str,
    layout: tuple[int, dict[str, Any]],
    other: tuple[int, dict[str, Any]],
) -> None:
    model: Path = request.getfixturevalue(of)
    saved, same, elsewhere = tmp_path / "saved", tmp_path / "same", tmp_path / "elsewhere"
    run(model, same, saved, dtype, layout, resume_only=False)
    assert (saved / "beside").read_text() == "kept"
    megatron_to_hf(saved, tmp_path / "hf", dtype=None, hf_config=model, team=Team(), progress=lambda *_: None)
    assert_equal(weights(tmp_path / "hf"), weights(same / "middle"))
    assert_equal(weights(same / "resumed"), weights(same / "whole"))
    run(model, elsewhere, saved, dtype, other, resume_only=True)
    state = tensors(saved)
    moments = [key for key in state if key.startswith("optimizer.state.exp_avg.")]
    assert {float(state[key].abs().max()) > 0 for key in moments} == {True}
    assert int(state["optimizer.num_steps"]) == 2
    assert int(tensors(same / "untouched")["optimizer.num_steps"]) == 0
    assert ("optimizer.state.param.embedding.word_embeddings.weight" in state) == (dtype == "bf16")
    assert_equal(tensors(same / "again"), state)
    assert_equal(tensors(elsewhere / "again"), state)
    for name, tensor in weights(same / "whole").items():
        close = {"rtol": 2e-5, "atol": 2e-6} if dtype == "fp32" else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(weights(elsewhere / "resumed")[name], tensor, **close)
