"""What transports cannot do is refused by name before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.config.schema import RunConfig, Transport
from megatron_rlvr.rollout.arguments import WEIGHT_LOADER
from megatron_rlvr.rollout.engine import ServerInfo
from megatron_rlvr.sync.engine_loader import LOADER
from megatron_rlvr.trainer.checks.transport import check_servers, check_transport, with_memory_saver, with_padding
from megatron_rlvr.weights.hf_config import ModelShape

SERVER = ServerInfo(
    url="http://node1:30000",
    num_ranks=2,
    dp_size=1,
    version="0.5.21",
    model_path="/m",
    weight_version="0",
    weight_loaders=(LOADER,),
    ep_size=1,
    dtype="float32",
    device="cpu",
    odd_layout=(),
)


def config(transport: str, **fields: Any) -> RunConfig:
    made = RunConfig(experiment_name="x")
    made.sync.transport = Transport[transport]
    for name, value in fields.items():
        group, _, field = name.rpartition("__")
        target: Any = made
        for part in group.split("__"):
            target = getattr(target, part)
        setattr(target, field, value)
    return made


def test_servers_are_started_with_the_loader_that_updates_name() -> None:
    assert WEIGHT_LOADER == LOADER


@pytest.mark.parametrize("transport", ["shards", "colocated"])
def test_a_plain_server_with_the_loader_takes_slices(transport: str) -> None:
    check_servers(Transport[transport], [SERVER, replace(SERVER, url="http://node2:30000")])


def test_sizes_that_a_server_pads_make_its_layout_odd(tiny_qwen3: Path) -> None:
    dense = ModelShape.from_hf(tiny_qwen3)
    assert with_padding(SERVER, replace(dense, ffn_hidden_size=192)) == SERVER
    odd = with_padding(SERVER, replace(dense, ffn_hidden_size=96))
    assert odd.odd_layout == ("intermediate_size=96 padded to a multiple of 64",)
    experts = replace(dense, ffn_hidden_size=96, num_experts=4, moe_ffn_hidden_size=48)
    assert with_padding(SERVER, experts).odd_layout == ("moe_intermediate_size=48 padded to a multiple of 64",)
    assert with_padding(replace(SERVER, device="cuda"), experts).odd_layout == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight_loaders": ()},
            r"--custom-weight-loader megatron_rlvr.sync.engine_loader.load .*node2:30000 knows no l",
        ),
        ({"weight_loaders": ("their.loader",)}, r"node2:30000 knows their.loader; sync.transport=broadcast needs none"),
        ({"odd_layout": ("quantization=fp8",)}, r"cannot place slices in http://node2:30000, which runs with quantiz"),
        ({"num_ranks": 4}, r"num_ranks is 2 at http://node1:30000 and 4 at http://node2:30000"),
    ],
    ids=["no loader", "another loader", "quantised", "another layout"],
)
def test_a_server_that_cannot_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_servers(Transport.shards, [SERVER, replace(SERVER, url="http://node2:30000", **change)])


@pytest.mark.parametrize(
    ("made", "ranks", "message"),
    [
        (config("broadcast", sync__release_memory=True), 1, r"sync.release_memory has no effect with .*=broadcast"),
        (config("colocated", rollout__urls=["http://a"]), 1, r"rollout.urls must be empty with .*, got \['http://a'\]"),
        (config("colocated", rollout__discovery="/d"), 1, r"rollout.discovery must be empty with .*, got '/d'"),
        (config("colocated"), 16, r"must not be colocated .* \(16 ranks, 8 on this one\)"),
        (config("colocated", rollout__server__tp=2), 1, r"at most the trainer's 1 ranks with .*, got 2"),
        (config("colocated", rollout__server__base_gpu_id=8), 8, r"at most the trainer's 8 ranks with .*, got 9"),
    ],
    ids=["release", "urls", "discovery", "machines", "more servers than ranks", "devices behind the trainer's"],
)
def test_a_contradiction_is_refused(made: RunConfig, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_transport(made, world_size=ranks, local_world_size=min(ranks, 8))


def test_colocated_servers_save_memory_on_gpus_where_asked() -> None:
    check_transport(config("colocated", sync__release_memory=True), world_size=1, local_world_size=1)
    asked = config("colocated", sync__release_memory=True, rollout__server__extra_args=["--x"])
    assert with_memory_saver(asked, gpu=True).server.extra_args == ["--x", "--enable-memory-saver"]
    assert with_memory_saver(asked, gpu=False) is asked.rollout
    assert with_memory_saver(config("colocated"), gpu=True).server.extra_args == []
