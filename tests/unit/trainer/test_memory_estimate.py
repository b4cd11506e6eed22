"""The memory estimate against what real updates take, and its arithmetic over layouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rlvr.config.compose import config_dir
from megatron_rlvr.config.schema import DType, ModelConfig, ParallelConfig, Recompute
from megatron_rlvr.trainer.preflight.memory_estimate import TrainerLoad, TrainerMemory, server_memory, trainer_memory
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping

WORKER = Path(__file__).with_name("memory_of_update.py")
MIDDLE = {
    **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 8192, "head_dim": 64},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
SMALL = {**MIDDLE, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 256}


def write_model(folder: Path, changes: dict) -> Path:
    fields = json.loads((config_dir() / "models" / "qwen3-0.6b.json").read_text()) | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = Mapping(ModelShape.from_hf(fields), layout=Layout(), naming="local").hf_tensors()
    save_file({name: torch.full(size, 0.01) for name, size in tensors.items()}, folder / "model.safetensors")
    return folder


CASES = [
    {"num_sequences": 1, "sequence": 32},
    {"num_sequences": 4},
    {"num_sequences": 6, "recompute": "full"},
    {"num_sequences": 2, "sequence": 64, "dtype": "bfloat16"},
]


def test_real_updates_take_what_was_estimated(tmp_path: Path) -> None:
    """Few tokens: weights and optimizer decide. Many: activations, all of them or recomputed. 15 % either way."""
    middle = write_model(tmp_path / "middle", MIDDLE)
    command = [sys.executable, str(WORKER), str(write_model(tmp_path / "small", SMALL)), str(middle), json.dumps(CASES)]
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[3])},
        **{"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    measured = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(measured) == len(CASES)
    shape = ModelShape.from_hf(middle)
    for case, found in zip(CASES, measured, strict=True):
        sequence = case.get("sequence", 128)
        tokens = case["num_sequences"] * sequence
        model = ModelConfig(
            dtype=DType(case.get("dtype", "float32")), recompute=Recompute(case.get("recompute", "none"))
        )
        load = TrainerLoad(
            tokens=tokens, response_tokens=tokens - case["num_sequences"], num_micro_batches=1, dp_size=1
        )
        [memory] = trainer_memory(shape, model, ParallelConfig(), load, fused=False)
        held = memory.weights + memory.gradients + memory.optimizer
        assert held == pytest.approx(found["held"], rel=0.15), (case, held, found)
        assert memory.total == pytest.approx(found["peak"], rel=0.15), (case, memory, found)


QWEN3_8B = ModelShape.from_hf(config_dir() / "models" / "qwen3-8b.json")
QWEN3_MOE = ModelShape.from_hf(config_dir() / "models" / "qwen3-30b-a3b.json")
LOAD = TrainerLoad(tokens=16384, response_tokens=16384, num_micro_batches=16, dp_size=2)


def estimate(parallel: ParallelConfig, shape: ModelShape = QWEN3_8B, **changes: object) -> list[TrainerMemory]:
    return trainer_memory(shape, replace(ModelConfig(), **changes), parallel, LOAD, fused=True)


def test_stages_and_tensor_ranks_share_the_weights() -> None:
    [whole] = estimate(ParallelConfig())
    assert whole.weights == pytest.approx(2 * 8_190_735_360, rel=1e-6)
    stages = estimate(ParallelConfig(tp=2, pp=4))
    assert sum(stage.weights for stage in stages) * 2 == pytest.approx(whole.weights, rel=1e-3)
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]
    # 1F1B: the first stage has most micro-batches between forward and backward.
    assert stages[0].activations > stages[1].activations > stages[2].activations


def test_what_saves_activations_and_logits() -> None:
    plain, sequence = (estimate(ParallelConfig(tp=4, sequence_parallel=on))[0] for on in (False, True))
    assert sequence.activations < plain.activations
    full = estimate(ParallelConfig(tp=4), recompute=Recompute.full)[0]
    selective = estimate(ParallelConfig(tp=4), recompute=Recompute.selective)[0]
    assert full.activations < selective.activations < plain.activations
    assert plain.logits == 16384 * (151936 // 4) * 2
    assert estimate(ParallelConfig(tp=4), logits_mb=256)[0].logits == 256 << 20


def test_experts_are_spread_over_expert_ranks() -> None:
    one, eight = (estimate(ParallelConfig(ep=ep), QWEN3_MOE)[0].weights for ep in (1, 8))
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    assert one - eight == experts * 7 // 8


def test_a_servers_cache() -> None:
    memory = server_memory(QWEN3_8B, tp=1, dtype=DType.bf16)
    assert memory.weights == pytest.approx(2 * 8_190_735_360, rel=1e-3)
    assert memory.kv_per_token == 2 * 36 * 8 * 128 * 2
    assert memory.kv_tokens(memory.weights + 10 * memory.kv_per_token) == 10
    # Key heads are repeated where there are more ranks than heads.
    assert server_memory(QWEN3_8B, tp=16, dtype=DType.bf16).kv_per_token == 2 * 36 * 1 * 128 * 2
