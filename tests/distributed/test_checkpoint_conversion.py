"""Converted checkpoints against Megatron's own loading and saving, at several layouts, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.weights.conversion import Team, compare, hf_to_megatron, megatron_to_hf, open_model
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from tests.distributed.ranks import run_ranks
from tests.paths import ROOT

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 203,
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
    "num_key_value_heads": 8,
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


@pytest.mark.parametrize(
    ("config", "converted", "sizes", "world_size"),
    [
        (DENSE, Layout(tp=4), {"tp": 2, "pp": 2}, 4),
        (DENSE, Layout(tp=2, pp=2), {"tp": 1, "pp": 2, "vpp": 2}, 2),
        (TIED, Layout(), {"tp": 1, "pp": 2}, 2),
        (MOE, Layout(tp=2, ep=2), {"tp": 1, "pp": 1, "ep": 2}, 2),
    ],
    ids=["tp2_pp2", "pp2_vpp2", "tied_pp2", "ep2"],
)
def test_megatron_loads_what_was_converted_and_saves_what_converts_back(
    tmp_path: Path, config: dict[str, Any], converted: Layout, sizes: dict[str, int], world_size: int
) -> None:
    hf, mcore, saved = tmp_path / "hf", tmp_path / "mcore", tmp_path / "saved"
    tensors = write_model(hf, config)
    hf_to_megatron(hf, mcore, layout=converted, dtype=None, team=Team(), progress=lambda *_: None)
    run_ranks(
        Path(__file__).with_name("checkpoint_worker.py"),
        [str(hf), str(mcore), str(saved), json.dumps(sizes)],
        world_size=world_size,
    )
    for source in (mcore, saved):
        back = tmp_path / f"{source.name}_hf"
        megatron_to_hf(source, back, dtype=None, hf_config=hf, team=Team(), progress=lambda *_: None)
        written = load_file(back / "model.safetensors")
        assert written.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(written[name], tensor), name
        assert all(difference.equal for difference in compare(open_model(source, hf), open_model(hf)))


def test_several_processes_convert_together(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "hf", MOE)
    tools = ROOT / "tools"
    run_ranks(tools / "hf_to_megatron.py", [str(tmp_path / "hf"), str(tmp_path / "mcore")], world_size=2)
    run_ranks(
        tools / "megatron_to_hf.py",
        [str(tmp_path / "mcore"), str(tmp_path / "back"), "--max-file-gb", "1e-5"],
        world_size=2,
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
