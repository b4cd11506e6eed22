"""The same batch and weights give the same log-probs, gradients and updates in every layout, and as Hugging Face."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.config.schema import ScratchModelConfig
from megatron_rlvr.rollout import platform
from megatron_rlvr.trainer.scratch import make_model
from tests.distributed.policy_rank import TEMPERATURE, sequences
from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("policy_rank.py")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "tp2_sequence_parallel": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"distributed_optimizer": False}),
    "dp2_overlapped": (2, {"overlap_grad_reduce": True}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of four layers whose vocabulary needs padding."""
    folder = tmp_path_factory.mktemp(f"{request.param}") / "model"
    shape = ScratchModelConfig(
        hidden_size=64,
        intermediate_size=96,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=300,
        tie_embeddings=request.param == "tied",
    )
    make_model(folder, shape, texts=["what is 1 + 2 ? three"] * 4, seed=0)
    return folder


def train(
    model: Path,
    out: Path,
    *,
    world_size: int = 1,
    max_tokens: int = 100,
    recompute: str = "none",
    dtype: str = "fp32",
    ops: str = "native",
    logits_bytes: int | None = None,
    share_prompts: bool = False,
    **parallel: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    job = {"path": str(model), "out": str(out), "parallel": parallel, "max_tokens": max_tokens}
    job |= {"recompute": recompute, "dtype": dtype, "ops": ops, "logits_bytes": logits_bytes}
    job |= {"share_prompts": share_prompts}
    run_ranks(SCRIPT, [json.dumps(job)], world_size=world_size)
    return pickle.loads(out.with_suffix(".pkl").read_bytes()), load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One rank, several sequences a micro-batch."""
    return train(model, tmp_path_factory.mktemp("single") / "trained")


def assert_same(
    got: tuple[dict[str, Any], dict[str, torch.Tensor]], want: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    for of_step, expected in zip(got[0]["logprobs"], want[0]["logprobs"], strict=True):
        assert of_step.keys() == expected.keys()
        for trajectory, pair in expected.items():
            np.testing.assert_allclose(of_step[trajectory], pair, atol=1e-5)
    np.testing.assert_allclose(got[0]["grad_norm"], want[0]["grad_norm"], rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, tensor in want[1].items():
        torch.testing.assert_close(got[1][name], tensor, atol=2e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


BOTH = pytest.mark.parametrize("model", ["tied", "untied"], indirect=True)
TIED = pytest.mark.parametrize("model", ["tied"], indirect=True)
"""What has nothing to do with the output weights is tried on one model."""


@pytest.mark.parametrize(
    ("model", "layout"),
    [("tied", layout) for layout in LAYOUTS] + [("untied", "tp2_pp2"), ("untied", "pp2_vpp2")],
    indirect=["model"],
)
def test_layout_changes_nothing(layout, model, single, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    assert_same(train(model, tmp_path / "trained", world_size=world_size, **parallel), single)


@TIED
def test_packing_changes_nothing(model, single, tmp_path: Path) -> None:
    alone = train(model, tmp_path / "trained", max_tokens=24)
    assert alone[0]["num_micro_batches"] > single[0]["num_micro_batches"]
    assert_same(alone, single)


@TIED
@pytest.mark.parametrize("layout", ["tp2_sequence_parallel", "pp2_vpp2", "dp2"])
def test_prompts_computed_once_change_nothing(layout, model, single, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    got = train(model, tmp_path / "trained", world_size=world_size, share_prompts=True, max_tokens=60, **parallel)
    assert got[0]["num_shared_tokens"] > 10
    assert_same(got, single)


@pytest.mark.parametrize(
    ("model", "layout"),
    [("tied", "tp2"), ("untied", "tp2_sequence_parallel")],
    indirect=["model"],
)
def test_logits_piece_by_piece_change_nothing(layout, model, single, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    got = train(model, tmp_path / "trained", world_size=world_size, logits_bytes=4096, **parallel)
    assert_same(got, single)


@TIED
def test_reference_ops_change_nothing(model, single, tmp_path: Path) -> None:
    assert_same(train(model, tmp_path / "trained", world_size=2, tp=2, ops="reference"), single)


@TIED
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(recompute: str, model, single, tmp_path: Path) -> None:
    assert_same(train(model, tmp_path / "trained", recompute=recompute), single)


@BOTH
def test_logprobs_agree_with_hugging_face(model, single) -> None:
    platform.install()  # the torchvision of PyPI beside a CPU torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for sequence in sequences(reference.config.vocab_size):
        tokens = np.concatenate([sequence.prompt_ids, sequence.response_ids])
        with torch.no_grad():
            logits = reference(torch.from_numpy(tokens)[None]).logits[0] / TEMPERATURE
        logprobs = logits.log_softmax(-1)[len(sequence.prompt_ids) - 1 : -1]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        chosen = logprobs.gather(1, torch.from_numpy(sequence.response_ids)[:, None])[:, 0]
        got = single[0]["logprobs"][0][sequence.trajectory]
        np.testing.assert_allclose(got[0], chosen.numpy(), atol=1e-5)
        np.testing.assert_allclose(got[1], entropy.numpy(), atol=1e-5)


@BOTH
def test_updates_follow_torch_adam(model, single) -> None:
    """Two steps of the same loss through Hugging Face's model and torch's optimizer end at the same weights."""
    platform.install()
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.0)
    for step in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for sequence in sequences(reference.config.vocab_size):
            tokens = np.concatenate([sequence.prompt_ids, sequence.response_ids])
            logits = reference(torch.from_numpy(tokens)[None]).logits[0] / TEMPERATURE
            logprobs = logits.log_softmax(-1)[len(sequence.prompt_ids) - 1 : -1]
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            chosen = logprobs.gather(1, torch.from_numpy(sequence.response_ids)[:, None])[:, 0]
            total = total + ((-chosen * sequence.advantage - 0.1 * entropy).double() * sequence.weight).sum()
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        assert float(norm) == pytest.approx(single[0]["grad_norm"][step], rel=1e-4)
    trained = reference.state_dict()
    for name, tensor in single[1].items():
        torch.testing.assert_close(tensor, trained[name], atol=5e-6, rtol=1e-4)


@TIED
@pytest.mark.parametrize(("world_size", "parallel"), [(1, {}), (2, {"tp": 2, "pp": 1})])
def test_bf16_stays_near_fp32(world_size: int, parallel: dict[str, Any], model, single, tmp_path: Path) -> None:
    got = train(model, tmp_path / "trained", world_size=world_size, dtype="bf16", **parallel)
    for trajectory, pair in single[0]["logprobs"][0].items():
        np.testing.assert_allclose(got[0]["logprobs"][0][trajectory], pair, atol=0.05)
    np.testing.assert_allclose(got[0]["grad_norm"], single[0]["grad_norm"], rtol=0.02)
    for name, tensor in single[1].items():
        assert got[1][name].dtype is torch.bfloat16
        # fp32 main weights: after two steps of 1e-2 the rounding of bf16 is all that differs.
        torch.testing.assert_close(got[1][name].float(), tensor, atol=4e-3, rtol=2e-2)
