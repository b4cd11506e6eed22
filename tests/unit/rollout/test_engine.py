"""Control calls against servers that are old, slow, broken or gone."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from megatron_rlvr.config.schema import DType, RolloutConfig
from megatron_rlvr.rollout.engine import HttpEngine, probe
from megatron_rlvr.rollout.server import LocalServers, ServerStartError
from megatron_rlvr.types import EngineError, EngineSilentError, TensorMeta
from tests.fakes.sglang_server import FakeSGLang, Fault

CALLS: dict[str, Callable[[HttpEngine], object]] = {
    "pause_generation": lambda engine: engine.pause("retract"),
    "continue_generation": lambda engine: engine.resume(),
    "begin_weight_update": lambda engine: engine.begin_update(),
    "end_weight_update": lambda engine: engine.end_update(),
    "init_weights_update_group": lambda engine: engine.init_group(
        master_address="127.0.0.1", master_port=1, rank_offset=1, world_size=2, group_name="g", backend="gloo"
    ),
    "destroy_weights_update_group": lambda engine: engine.destroy_group("g"),
    "update_weights_from_distributed": lambda engine: engine.update_from_distributed(
        [TensorMeta(name="w", dtype="float32", shape=(1,))], group_name="g", weight_version=1
    ),
    "update_weights_from_disk": lambda engine: engine.update_from_disk("/m", weight_version=1),
    "update_weight_version": lambda engine: engine.set_weight_version(1),
    "model_info": lambda engine: engine.weight_version(),
    "weights_checker": lambda engine: engine.weights_checksum(),
    "flush_cache": lambda engine: engine.flush_cache(),
    "freeze_gc": lambda engine: engine.freeze_gc(),
}
TEXT_ANSWERS = {"flush_cache", "freeze_gc"}


@pytest.fixture
def server() -> Iterator[FakeSGLang]:
    with FakeSGLang() as server:
        yield server


def engine_of(server: FakeSGLang, *, timeout_s: float = 10.0) -> HttpEngine:
    return HttpEngine(server.url, num_ranks=server.tp_size, timeout_s=timeout_s)


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault.error, "HTTP 500: Internal Server Error"),
        (Fault.drop, "RemoteDisconnected|ConnectionReset"),
        (Fault.hang, r"no answer within 0.3 s"),
    ],
)
def test_every_call_fails_clearly(server: FakeSGLang, path: str, fault: Fault, words: str) -> None:
    server.fault(path, fault)
    with pytest.raises(EngineError, match=f"{server.url}/{path}: .*({words})"):
        CALLS[path](engine_of(server, timeout_s=0.3))


@pytest.mark.parametrize("path", sorted(set(CALLS) - TEXT_ANSWERS))
def test_garbage_is_no_success(server: FakeSGLang, path: str) -> None:
    server.fault(path, Fault.garbage)
    with pytest.raises(EngineError, match=f"{server.url}/{path}: HTTP 200: <html>not json|not JSON"):
        CALLS[path](engine_of(server))


def test_refusal_carries_the_servers_words(server: FakeSGLang) -> None:
    server.fault("update_weight_version", Fault.refuse)
    with pytest.raises(EngineError, match="update_weight_version: HTTP 400: refused by the test"):
        engine_of(server).set_weight_version(3)


def test_old_server_is_found_out_once() -> None:
    with FakeSGLang(session_endpoints=False, version="0.5.17") as server:
        engine = engine_of(server)
        for _ in range(3):
            engine.begin_update()
            engine.end_update()
        assert server.count("begin_weight_update") == 1
        assert server.count("end_weight_update") == 0


def test_new_server_gets_every_session_call(server: FakeSGLang) -> None:
    engine = engine_of(server)
    for _ in range(2):
        engine.begin_update()
        engine.end_update()
    assert (server.count("begin_weight_update"), server.count("end_weight_update")) == (2, 2)
    assert server.bodies("begin_weight_update") == [{"selector": "all"}] * 2


def test_session_that_vanishes_is_an_error(server: FakeSGLang) -> None:
    engine = engine_of(server)
    engine.begin_update()
    server.session_endpoints = False
    with pytest.raises(EngineError, match="end_weight_update: HTTP 404: Not Found"):
        engine.end_update()


def test_server_that_cannot_freeze_its_garbage_collection_stays_as_it_is(
    server: FakeSGLang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FakeSGLang, "_on_freeze_gc")
    engine_of(server).freeze_gc()
    assert server.count("freeze_gc") == 1


def test_update_sends_one_flattened_bucket_that_flushes_nothing(server: FakeSGLang) -> None:
    engine = engine_of(server)
    group = {"master_address": "10.0.0.1", "master_port": 5, "rank_offset": 3, "world_size": 9}
    engine.init_group(**group, group_name="g", backend="nccl")
    engine.begin_update()
    metas = [TensorMeta(name="a", dtype="bfloat16", shape=(2, 3)), TensorMeta(name="b", dtype="float32", shape=())]
    engine.update_from_distributed(metas, group_name="g", weight_version=None)
    engine.update_from_distributed(metas, group_name="g", weight_version=4)
    assert server.bodies("init_weights_update_group") == [{**group, "group_name": "g", "backend": "nccl"}]
    body = {
        "names": ["a", "b"],
        "dtypes": ["bfloat16", "float32"],
        "shapes": [[2, 3], []],
        "group_name": "g",
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }
    expected = [{**body, "weight_version": None}, {**body, "weight_version": "4"}]
    assert server.bodies("update_weights_from_distributed") == expected
    assert engine.weight_version() == "4"


def test_update_from_disk_pauses_only_what_runs(server: FakeSGLang) -> None:
    engine = engine_of(server)
    engine.update_from_disk("/m", weight_version=1)
    control = ["flush_cache", "pause_generation", "update_weights_from_disk", "flush_cache", "continue_generation"]
    assert [call.path for call in server.calls] == control
    server.calls.clear()
    engine.pause("in_place")
    engine.update_from_disk("/m", weight_version=2)
    assert [call.path for call in server.calls] == ["pause_generation", "update_weights_from_disk"]


def test_flush_waits_for_requests_that_are_ending(server: FakeSGLang) -> None:
    server.fault("flush_cache", Fault.refuse, times=3)
    engine_of(server).flush_cache()
    assert server.count("flush_cache") == 4


def test_old_server_flushes_once_retracted_requests_are_aborted() -> None:
    with FakeSGLang(session_endpoints=False, version="0.5.17", eos_token_id=None) as server:
        engine = engine_of(server)
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 10**9}, "stream": True}
        with requests.post(server.url + "/generate", json=body, stream=True, timeout=60.0) as running:
            lines = running.iter_lines()
            next(lines)
            engine.update_from_disk("/m", weight_version=1)
            *_, last, done = (line for line in lines if line)
        assert done == b"data: [DONE]"
        answer = json.loads(last.removeprefix(b"data: "))
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert server.bodies("abort_request") == [{"abort_all": True}]
        assert server.calls[-1].path == "continue_generation"


def test_finish_lets_requests_end(server: FakeSGLang) -> None:
    server.fault("flush_cache", Fault.refuse, times=2)
    engine_of(server).pause("finish")
    control = ["flush_cache"] * 4 + ["pause_generation"]
    assert [call.path for call in server.calls] == control, "idle at the third question"
    assert server.bodies("pause_generation") == [{"mode": "retract"}]


def test_finish_has_an_end(server: FakeSGLang) -> None:
    server.fault("flush_cache", Fault.refuse)
    engine_of(server, timeout_s=0.2).pause("finish")
    assert server.bodies("pause_generation") == [{"mode": "retract"}]


def test_settle_asks_the_scheduler(server: FakeSGLang) -> None:
    engine = engine_of(server, timeout_s=0.3)
    engine.begin_update()
    engine.settle()
    engine.begin_update()
    server.fault("flush_cache", Fault.refuse)
    engine.settle()
    server.fault("flush_cache", Fault.hang)
    with pytest.raises(EngineSilentError, match=r"flush_cache: no answer within 0.2 s"):
        engine.settle(timeout_s=0.2)


def test_control_calls_have_a_deadline_of_their_own(server: FakeSGLang) -> None:
    server.fault("*", Fault.hang)
    engine = HttpEngine(server.url, num_ranks=1, timeout_s=0.4, control_timeout_s=0.1)
    with pytest.raises(EngineSilentError, match=r"no answer within 0.1 s") as caught:
        engine.resume()
    assert caught.value.url == server.url
    with pytest.raises(EngineSilentError, match=r"no answer within 0.4 s"):
        engine.weights_checksum()


def test_unknown_pause_mode_is_refused(server: FakeSGLang) -> None:
    with pytest.raises(ValueError, match="pause mode must be one of finish, in_place, retract, abort, got 'drain'"):
        engine_of(server).pause("drain")
    assert server.calls == []


def test_probe_tells_tensor_parallel_ranks() -> None:
    with FakeSGLang(tp_size=4, dp_size=2, version="0.5.17", weight_version="6") as server:
        info = probe(server.url, timeout_s=5.0)
    assert (info.num_ranks, info.dp_size, info.version, info.weight_version) == (4, 2, "0.5.17", "6")


@pytest.mark.parametrize(
    ("settings", "dp_size"),
    [
        ({"enable_dp_attention": True}, 1),  # up to 0.5.21: eight groups inside the eight ranks
        ({"enable_dp_attention": True, "attn_dp_size": 4}, 8),  # from 0.5.22 on: eight replicas of four groups
        ({"enable_dp_attention": False, "attn_dp_size": 1}, 8),
    ],
)
def test_probe_tells_replicas_from_groups_of_attention(settings: dict[str, Any], dp_size: int) -> None:
    with FakeSGLang(tp_size=8, dp_size=8, settings=settings) as server:
        assert probe(server.url, timeout_s=5.0).dp_size == dp_size


def test_probe_names_settings_that_lay_weights_out_in_another_way() -> None:
    plain = {"pp_size": 1, "attn_cp_size": 1, "moe_dp_size": 1, "moe_dense_tp_size": None, "dwdp_size": 1}
    odd = {"enable_dp_attention": True, "attn_cp_size": 2, "moe_dp_size": 2, "moe_dense_tp_size": 1, "dwdp_size": 2}
    for settings, told in ((plain, ()), (odd, tuple(f"{name}={value}" for name, value in odd.items()))):
        with FakeSGLang(settings=settings) as server:
            assert probe(server.url, timeout_s=5.0).odd_layout == told


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("0.5.17", "SGLang 0.5.17)"),
        ("0.5.23.post1", "SGLang 0.5.23.post1)"),
        ("0.5.16", "SGLang 0.5.16, never tried; 0.5.17 and later, before 0.5.24, were)"),
        ("0.5.24", "SGLang 0.5.24, never tried;"),
        ("unknown", "SGLang unknown, never tried;"),
    ],
)
def test_versions_that_were_never_tried_are_told(version: str, told: str) -> None:
    with FakeSGLang(version=version) as server:
        info = probe(server.url, timeout_s=5.0)
    assert str(info).startswith(f"{server.url} ({told}")


def test_a_url_without_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a server URL must look like http://host:port, got '127.0.0.1:30000'"):
        probe("127.0.0.1:30000", timeout_s=1.0)


def given(run_dir: Path, *urls: str, router_url: str | None = None) -> LocalServers:
    config = RolloutConfig(urls=list(urls), router_url=router_url)
    return LocalServers(config, model_path="/m", dtype=DType.fp32, run_dir=run_dir)


def test_given_servers_are_probed_and_left_alone(tmp_path: Path) -> None:
    with FakeSGLang(tp_size=2) as one, FakeSGLang() as two:
        servers = given(tmp_path, one.url, two.url + "/", router_url="http://127.0.0.1:9")
        infos = servers.wait_ready(lambda line: None)
        assert [(info.url, info.num_ranks) for info in infos] == [(one.url, 2), (two.url, 1)]
        assert servers.router_url == "http://127.0.0.1:9"
        assert servers.status() is None
        servers.stop()
        assert probe(one.url, timeout_s=5.0) == infos[0]
    assert list(tmp_path.iterdir()) == []


def test_dead_url_is_named_within_seconds(server: FakeSGLang, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerStartError, match=f"server {dead} .*Connection refused"):
            given(tmp_path, server.url, dead).wait_ready(lambda line: None)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(Fault.hang, "no answer within 0.3 s"), (Fault.error, "HTTP 500"), (Fault.garbage, "not json")],
)
def test_url_that_misbehaves_is_named(
    server: FakeSGLang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, words: str
) -> None:
    monkeypatch.setattr("megatron_rlvr.rollout.server.PROBE_TIMEOUT_S", 0.3)
    server.fault("server_info", fault)
    with pytest.raises(ServerStartError, match=f"server {server.url} .*{words}"):
        given(tmp_path, server.url).wait_ready(lambda line: None)
