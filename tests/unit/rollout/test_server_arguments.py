"""Command lines and environments of the servers; settings that are refused before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.config.schema import DType, RolloutConfig, RunConfig, ServerConfig
from megatron_rlvr.rollout.arguments import (
    OWNED_FLAGS,
    bind_cores,
    check_server,
    router_arguments,
    server_arguments,
    server_environment,
)
from megatron_rlvr.rollout.fleet import FleetSpec
from megatron_rlvr.rollout.server import LocalServers
from megatron_rlvr.serve import discovery_folder, fleet_spec, main, serve

LAUNCH = [sys.executable, "-m", "megatron_rlvr.rollout.launcher", "--parent-pid", "77"]


def flags(argv: list[str]) -> dict[str, str | bool]:
    """Flag -> its value, or True for a switch; after the launcher's own part."""
    assert argv[: len(LAUNCH)] == LAUNCH
    rest = argv[len(LAUNCH) :]
    found: dict[str, str | bool] = {}
    for position, word in enumerate(rest):
        if word.startswith("--"):
            following = rest[position + 1] if position + 1 < len(rest) else "--"
            assert word not in found, f"{word} twice"
            found[word] = True if following.startswith("--") else following
    return found


def arguments(config: ServerConfig, **changes: Any) -> dict[str, str | bool]:
    fields: dict[str, Any] = {"model_path": "/m", "dtype": DType.fp32, "port": 21000, "index": 0, "gpu": False}
    return flags(server_arguments(config, parent_pid=77, **{**fields, **changes}))


COMMON = {
    "--model-path": "/m",
    "--host": "127.0.0.1",
    "--port": "21000",
    "--tp-size": "1",
    "--mem-fraction-static": "0.8",
    "--weight-version": "0",
    "--log-level-http": "warning",
    "--custom-weight-loader": "megatron_rlvr.sync.engine_loader.load",
}


def test_cpu_server_has_the_flags_of_the_recipe_and_caps() -> None:
    assert arguments(ServerConfig()) == COMMON | {
        "--dtype": "float32",
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--sampling-backend": "pytorch",
        "--disable-cuda-graph": True,
        "--skip-server-warmup": True,
        "--sleep-on-idle": True,
        "--disable-overlap-schedule": True,
        "--max-total-tokens": "16384",
        "--max-running-requests": "64",
    }


def test_gpu_server_is_stock_and_gets_its_own_gpus() -> None:
    config = ServerConfig(num_servers=2, tp=4, base_gpu_id=2)
    assert arguments(config, gpu=True, dtype=DType.bf16, index=1) == COMMON | {
        "--dtype": "bfloat16",
        "--tp-size": "4",
        "--base-gpu-id": "6",
    }


def test_deterministic_inference_is_asked_for_on_gpus() -> None:
    check_server(ServerConfig(deterministic=True), gpu=True)
    assert arguments(ServerConfig(deterministic=True), gpu=True)["--enable-deterministic-inference"] is True


@pytest.mark.parametrize("gpu", [False, True])
def test_given_caps_and_extra_arguments_are_passed(gpu: bool) -> None:
    config = ServerConfig(max_total_tokens=100, max_running_requests=3, extra_args=["--chunked-prefill-size", "64"])
    found = arguments(config, gpu=gpu)
    assert (found["--max-total-tokens"], found["--max-running-requests"]) == ("100", "3")
    assert found["--chunked-prefill-size"] == "64"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_servers": 0}, "rollout.server.num_servers must be at least 1, got 0"),
        ({"tp": -1}, "rollout.server.tp must be at least 1, got -1"),
        ({"dp": 0}, "rollout.server.dp must be at least 1, got 0"),
        ({"mem_fraction": 1.0}, r"rollout.server.mem_fraction must be in \(0, 1\), got 1.0"),
        ({"max_total_tokens": 0}, "rollout.server.max_total_tokens must be at least 1 or null, got 0"),
        ({"startup_timeout_s": 0.0}, "rollout.server.startup_timeout_s must be positive, got 0.0"),
        ({"max_restarts": -1}, "rollout.server.max_restarts must not be negative, got -1"),
        ({"base_gpu_id": -1}, "rollout.server.base_gpu_id must not be negative, got -1"),
        ({"deterministic": True}, "rollout.server.deterministic has no effect on a CPU"),
        ({"extra_args": ["--port=1"]}, "rollout.server.extra_args must not hold --port: it is set by a free port"),
        ({"extra_args": ["--dp-size", "2"]}, "must not hold --dp-size: it is set by rollout.server.dp"),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_server(ServerConfig(**changes), gpu=False)


def test_every_flag_that_is_set_here_is_owned() -> None:
    config = ServerConfig(max_total_tokens=1, max_running_requests=1)
    assert set(arguments(config, gpu=True)) - {"--log-level-http"} <= set(OWNED_FLAGS)


def test_environment_hides_the_trainers_process_group_and_divides_the_cores() -> None:
    inherited = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1", "HOME": "/h"}
    inherited |= {"MALLOC_TRIM_THRESHOLD_": "7"}
    environment = server_environment(inherited, tp=2, num_engines=1, gpu=False, cores=[0, 1, 2, 3])
    assert environment == {
        "HOME": "/h",
        "OMP_NUM_THREADS": "2",
        "GOMP_SPINCOUNT": "20000",
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "7",
        "PYTHONUNBUFFERED": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0,1|2,3",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    }
    single = server_environment(inherited, tp=1, num_engines=3, gpu=False, cores=[0, 1])
    assert single["OMP_NUM_THREADS"] == "1"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in single
    waiting = server_environment({"OMP_WAIT_POLICY": "active"}, tp=1, num_engines=1, gpu=False, cores=[0, 1])
    assert waiting["OMP_WAIT_POLICY"] == "active"
    assert "GOMP_SPINCOUNT" not in waiting
    gpu = server_environment(inherited, tp=2, num_engines=1, gpu=True, cores=[0])
    assert gpu == {
        "HOME": "/h",
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "7",
        "PYTHONUNBUFFERED": "1",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    }


@pytest.mark.parametrize(
    ("cores", "num_ranks", "expected"),
    [([0, 1], 2, "0|1"), ([4, 5, 6], 2, "4|5"), ([3], 2, "3|3"), ([0, 1], 3, "0|1|0"), ([0, 1, 2, 3], 1, "0,1,2,3")],
)
def test_cores_are_bound_per_rank(cores: list[int], num_ranks: int, expected: str) -> None:
    assert bind_cores(cores, num_ranks) == expected


def test_router_arguments() -> None:
    argv = router_arguments(host="127.0.0.1", port=5, worker_urls=["http://a:1", "http://b:2"], parent_pid=77)
    assert argv[1:] == [
        *["-m", "megatron_rlvr.rollout.router", "--parent-pid", "77", "--host", "127.0.0.1", "--port", "5"],
        *["--worker-urls", "http://a:1", "http://b:2"],
    ]


def test_spec_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = ServerConfig(tp=2, dtype=DType.bf16, extra_args=["--x"], max_total_tokens=5)
    spec = FleetSpec(server=config, model_path=str(tmp_path), dtype=DType.fp32, gpu=True, folder=tmp_path / "out")
    assert FleetSpec.from_json(spec.to_json()) == spec


def test_missing_model_folder_is_refused_before_a_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path must be a folder with a config.json, got '.*nowhere'"):
        LocalServers(RolloutConfig(), model_path=tmp_path / "nowhere", dtype=DType.fp32, run_dir=tmp_path)


def test_router_url_without_servers_is_refused(tmp_path: Path) -> None:
    config = RolloutConfig(router_url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"rollout.router_url must be null without rollout.urls"):
        LocalServers(config, model_path=tmp_path, dtype=DType.fp32, run_dir=tmp_path)


def test_serve_needs_a_model_and_no_urls(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(experiment_name="x")
    with pytest.raises(ValueError, match=r"model.path must be a Hugging Face folder for serve, .* got null for both"):
        serve(config)
    config.rollout.urls = ["http://127.0.0.1:1"]
    with pytest.raises(ValueError, match=r"rollout.urls must be empty for serve"):
        serve(config)
    monkeypatch.setattr(sys, "argv", ["serve", "experiment_name=x", "rollout.server.tensor_parallel=2"])
    assert main() == 2
    assert "tensor_parallel" in capsys.readouterr().err


def test_serve_keeps_its_files_under_the_experiment_or_where_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = RunConfig(experiment_name="x", output_dir=str(tmp_path / "out"))
    config.model.path = str(tmp_path)
    config.rollout.server.dtype = DType.fp32
    assert discovery_folder(config) == tmp_path / "out/x/servers"
    spec = fleet_spec(config, path=str(tmp_path), folder=tmp_path / "own")
    assert (spec.folder, spec.dtype) == (tmp_path / "own", DType.fp32)
    config.rollout.discovery = str(tmp_path / "here")
    assert discovery_folder(config) == tmp_path / "here"
