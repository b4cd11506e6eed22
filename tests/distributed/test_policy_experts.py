"""A mixture-of-experts policy: as Hugging Face computes it, and the same over expert-parallel ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rlvr.rollout import platform
from tests.distributed.policy_rank import TEMPERATURE, sequences
from tests.distributed.test_first_order import measure
from tests.distributed.test_policy_layouts import assert_same, train


@pytest.fixture(scope="module")
def model(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of two layers and four experts."""
    platform.install()
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )
    folder = tmp_path_factory.mktemp("moe") / "model"
    Qwen3MoeForCausalLM(shape).save_pretrained(folder)
    shutil.copy(tiny_qwen3 / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return train(model, tmp_path_factory.mktemp("single") / "trained")


@pytest.mark.parametrize(
    "parallel", [{"ep": 2}, {"tp": 2, "ep": 2, "sequence_parallel": True}, {"pp": 2}], ids=json.dumps
)
def test_layout_changes_nothing(parallel: dict[str, Any], model: Path, single, tmp_path: Path) -> None:
    assert_same(train(model, tmp_path / "trained", world_size=2, **parallel), single)


def test_logprobs_agree_with_hugging_face(model: Path, single) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for sequence in sequences(reference.config.vocab_size):
        tokens = np.concatenate([sequence.prompt_ids, sequence.response_ids])
        with torch.no_grad():
            logits = reference(torch.from_numpy(tokens)[None]).logits[0] / TEMPERATURE
        logprobs = logits.log_softmax(-1)[len(sequence.prompt_ids) - 1 : -1]
        chosen = logprobs.gather(1, torch.from_numpy(sequence.response_ids)[:, None])[:, 0]
        np.testing.assert_allclose(single[0]["logprobs"][0][sequence.trajectory][0], chosen.numpy(), atol=1e-5)


def test_entropy_change_is_predicted_over_expert_ranks(model: Path, tmp_path: Path) -> None:
    single = measure(model, tmp_path / "single")
    for row in single["rows"]:
        assert row["measured"] / row["predicted"] == pytest.approx(1.0, abs=0.1)
    for parallel in ({"ep": 2}, {"tp": 2, "ep": 2, "sequence_parallel": True}):
        got = measure(model, tmp_path / json.dumps(parallel), world_size=2, **parallel)
        assert got["kept"]
        for row, want in zip(got["rows"], single["rows"], strict=True):
            assert row["predicted"] == pytest.approx(want["predicted"], rel=1e-3)
