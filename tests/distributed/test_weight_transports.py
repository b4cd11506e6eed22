"""Shard-to-shard and colocated transfer over real process groups, with the real loader in every engine rank."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("transport_rank.py")
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen2_tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama": ("llama", {"num_key_value_heads": 8}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
}
Job = dict[str, Any]


def job(model: str, engine_tp: int, replicas: int, *, transport: str = "shards", **fields: Any) -> Job:
    layout = {name: fields.pop(name) for name in ("tp", "pp", "vpp", "ep") if name in fields}
    return {
        "model": model,
        "layout": layout,
        "engine_tp": engine_tp,
        "replicas": replicas,
        "transport": transport,
        "dtype": "float32",
        "bucket_bytes": 1 << 16,
        **fields,
    }


JOBS: dict[str, Job] = {
    "tp2_pp2": job("qwen3", 2, 1, tp=2, pp=2, flip=3),
    "tp2_dp2": job("qwen2_tied", 2, 2, tp=2, dtype="bfloat16", flip=1),
    "pp2_vpp2_dp2": job("llama", 1, 2, pp=2, vpp=2),
    "tp4": job("mistral", 4, 1, tp=4),
    "experts": job("qwen3_moe", 2, 2, ep=2, pp=2),
    "experts_over_engine_ranks": job("qwen3_moe", 4, 1, ep=4, engine_ep=2),
    "engine_of_another_type": job("qwen3", 2, 1, tp=2, pp=2, engine_dtype="bfloat16"),
    "colocated_tp2_pp2": job("qwen3", 2, 2, transport="colocated", tp=2, pp=2, flip=2),
    "colocated_dp4": job("qwen2_tied", 1, 2, transport="colocated", dtype="bfloat16"),
    "colocated_experts": job("qwen3_moe", 4, 1, transport="colocated", ep=2, tp=2),
    "odd_model": job("qwen3", 2, 1, tp=2, pp=2, spoil="model.layers.1.self_attn.qkv_proj.weight"),
    "odd_model_colocated": job("llama", 1, 2, transport="colocated", pp=2, spoil="model.extra.weight"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All jobs in one team of four trainer ranks."""
    root = tmp_path_factory.mktemp("transports")
    for name, (model_type, fields) in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, **fields}))
    jobs = [{**fields, "model": str(root / fields["model"])} for fields in JOBS.values()]
    run_ranks(SCRIPT, [json.dumps({"jobs": jobs, "out": str(root / "out.json")})], world_size=4)
    return dict(zip(JOBS, json.loads((root / "out.json").read_text()), strict=True))


@pytest.mark.parametrize("name", [name for name in JOBS if "odd" not in name])
def test_engines_hold_what_was_sent_and_received_little_more(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[name]
    assert "error" not in result, result
    for of_version in result["differing"]:
        assert of_version == [[[]] * JOBS[name]["engine_tp"]] * JOBS[name]["replicas"]
    for of_version in result["received"]:
        for server in of_version:
            for counted, held in zip(server, result["held"], strict=True):
                assert held <= counted <= 1.05 * held, name
    if name.startswith("colocated"):
        assert result["turns"] > 1, "bounded memory wants several rounds here"
        return
    for of_version in result["sent"]:
        # Servers pass on among themselves what several of them hold.
        assert min(of_version) > 0.5 * max(of_version), "trainer ranks share the load"


def test_an_engine_with_other_parameters_is_refused_by_name(results: dict[str, dict[str, Any]]) -> None:
    error = results["odd_model"]["error"]
    assert "http://server0 rank 0: ValueError: model.layers.1.self_attn.qkv_proj.weight must have shape" in error
    assert "got (3, 3)" in error
    assert (
        "the engine's model has no [] and the plan no ['model.extra.weight']" in results["odd_model_colocated"]["error"]
    )


@pytest.mark.parametrize("name", [name for name, fields in JOBS.items() if "flip" in fields])
def test_faults_are_told_on_every_rank_and_the_next_transfer_is_whole(
    name: str, results: dict[str, dict[str, Any]]
) -> None:
    faults = results[name]["faults"]
    engines = [f"http://server{i}" for i in range(JOBS[name]["replicas"])]
    (changed, changed_at), *lost = faults["errors"]
    assert re.search(r"http://server\d rank \d: (Checksum|Value)Error: .*1 .*buckets arrived changed, first", changed)
    assert changed_at in engines
    if name.startswith("colocated"):
        assert lost == [[f"POST {engines[-1]}/update_weights_from_tensor: Connection refused", engines[-1]]]
    assert faults["differing"][0] == [[[]] * JOBS[name]["engine_tp"]] * len(engines)
    assert faults["differing"][1:] == [[[[]] * JOBS[name]["engine_tp"]] * (len(engines) - 1)] * len(lost)
