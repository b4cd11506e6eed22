"""Converted checkpoints against Megatron's own loading and saving, at several layouts, bit by bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.weights.conversion import Team, compare, hf_to_megatron, megatron_to_hf, open_model
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping

ROOT = Path(__file__).parents[2]
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
}
TIED = {
    **{name: value for name, value in DENSE.items() if name != "head_dim"},
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "tie_word_embeddings": True,
}
MOE = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def write_model(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    shapes = Mapping(ModelShape.from_hf(config), layout=Layout(), naming="local").hf_tensors()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def run_ranks(command: list[str], world_size: int) -> None:
    """Runs a command once a rank, with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(o[-3000:] for o in outputs)


def worker(action: str, hf: Path, checkpoint: Path, sizes: dict[str, int], world_size: int) -> None:
    script = Path(__file__).with_name("checkpoint_worker.py")
    run_ranks([str(script), action, str(hf), str(checkpoint), json.dumps(sizes)], world_size)


@pytest.mark.parametrize(
    ("config", "convert_layout", "load", "world_size"),
    [
        (DENSE, Layout(tp=2, pp=2), {"tp": 2, "pp": 2}, 4),
        (DENSE, Layout(), {"tp": 1, "pp": 2, "vpp": 2}, 2),
        (TIED, Layout(tp=4), {"tp": 2, "pp": 2}, 4),
        (MOE, Layout(ep=2), {"tp": 1, "pp": 2, "ep": 2}, 4),
    ],
    ids=["dense", "vpp", "tied", "moe"],
)
def test_megatron_loads_what_was_converted(
    tmp_path: Path, config: dict[str, Any], convert_layout: Layout, load: dict[str, int], world_size: int
) -> None:
    write_model(tmp_path / "hf", config)
    hf_to_megatron(
        tmp_path / "hf", tmp_path / "mcore", layout=convert_layout, dtype=None, team=Team(), progress=lambda *_: None
    )
    worker("load", tmp_path / "hf", tmp_path / "mcore", load, world_size)


@pytest.mark.parametrize(
    ("config", "sizes", "world_size"),
    [
        (DENSE, {"tp": 2, "pp": 2}, 4),
        (TIED, {"tp": 2, "pp": 2}, 4),
        (MOE, {"tp": 1, "pp": 2, "ep": 2}, 4),
    ],
    ids=["dense", "tied", "moe"],
)
def test_what_megatron_saves_converts_to_the_same_bits(
    tmp_path: Path, config: dict[str, Any], sizes: dict[str, int], world_size: int
) -> None:
    tensors = write_model(tmp_path / "hf", config)
    worker("save", tmp_path / "hf", tmp_path / "mcore", sizes, world_size)
    megatron_to_hf(
        tmp_path / "mcore",
        tmp_path / "back",
        dtype=None,
        hf_config=tmp_path / "hf",
        team=Team(),
        progress=lambda *_: None,
    )
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
    left, right = open_model(tmp_path / "mcore", tmp_path / "hf"), open_model(tmp_path / "hf")
    assert all(difference.equal for difference in compare(left, right))


def test_several_processes_convert_together(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "hf", MOE)
    run_ranks([str(ROOT / "tools" / "hf_to_megatron.py"), str(tmp_path / "hf"), str(tmp_path / "mcore")], 2)
    run_ranks(
        [
            str(ROOT / "tools" / "megatron_to_hf.py"),
            str(tmp_path / "mcore"),
            str(tmp_path / "back"),
            "--max-file-gb",
            "1e-5",
        ],
        2,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "mcore"]
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    back: dict[str, torch.Tensor] = {}
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 5
    for file in files:
        back |= load_file(file)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
