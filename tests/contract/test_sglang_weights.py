"""What weight transfer relies on, against the fake server and the real one."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.rollout.engine import probe
from megatron_rlvr.types import EngineError, TensorMeta
from tests.contract.conftest import PROMPT, Subject
from tests.contract.hugging_face import continuation_logprobs
from tests.contract.talk import FORCED, RunningRequest, forced_logprobs, generate, versions_of
from tests.contract.trainer_rank import GROUP, TrainerRank


@pytest.fixture
def trainer(subject: Subject) -> Iterator[TrainerRank]:
    trainer = TrainerRank(subject.engine)
    yield trainer
    subject.engine.destroy_group(GROUP)


def test_probe_tells_ranks_and_version(subject: Subject) -> None:
    info = probe(subject.url + "/", timeout_s=30.0)
    assert (info.url, info.num_ranks, info.dp_size) == (subject.url, 1, 1)
    assert info.version == (metadata.version("sglang") if subject.real else "0.5.21")
    assert info.tried
    assert (info.model_path, info.weight_version) == (str(subject.model), "0")


def test_version_is_set_without_touching_requests(subject: Subject) -> None:
    running = RunningRequest(subject.url, PROMPT)
    subject.engine.set_weight_version(5)
    assert subject.engine.weight_version() == "5"
    running.read_until_version("5")
    assert versions_of(running.abort()) in (["0", "5"], None)


def test_update_from_disk_changes_weights_and_back(subject: Subject) -> None:
    checksum = subject.engine.weights_checksum()
    before = forced_logprobs(subject.url, PROMPT) if subject.real else None
    subject.engine.update_from_disk(str(subject.other_model), weight_version=1)
    assert subject.engine.weight_version() == "1"
    assert subject.engine.weights_checksum() != checksum
    if before is not None:
        assert np.abs(forced_logprobs(subject.url, PROMPT) - before).max() > 0.1
        subject.engine.update_from_disk(str(subject.model), weight_version=2)
        assert subject.engine.weights_checksum() == checksum
        np.testing.assert_allclose(forced_logprobs(subject.url, PROMPT), before, atol=1e-6)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_update_from_disk_under_a_running_request(subject: Subject, mode: str) -> None:
    running = RunningRequest(subject.url, PROMPT)
    if mode == "in_place":
        subject.engine.pause("in_place")
    subject.engine.update_from_disk(str(subject.other_model), weight_version=3)
    subject.engine.resume()
    if mode == "retract" and not subject.tells_spans:
        assert running.rest()["meta_info"]["finish_reason"]["type"] == "abort"
        return
    running.read_until_version("3")
    assert versions_of(running.abort()) in (["0", "3"], None)


def test_update_survives_a_client_that_hung_up(subject: Subject) -> None:
    """The request of such a client is unknown to the server's lock and still in its scheduler."""
    for _ in range(3):
        running = RunningRequest(subject.url, PROMPT)
        running.hang_up()
        subject.engine.update_from_disk(str(subject.other_model), weight_version=3)
    assert (
        generate(subject.url, PROMPT, {"max_new_tokens": 2, "ignore_eos": True})["meta_info"]["weight_version"] == "3"
    )


def test_missing_folder_is_refused_with_the_servers_words(subject: Subject) -> None:
    if not subject.real:
        pytest.skip("the fake reads no folders")
    with pytest.raises(EngineError, match=r"update_weights_from_disk: HTTP 400: .+"):
        subject.engine.update_from_disk("/nowhere/model", weight_version=1)


def test_sessions_open_once_and_close_once(subject: Subject) -> None:
    if not subject.tells_spans:
        subject.engine.begin_update()
        subject.engine.begin_update()
        subject.engine.end_update()
        return
    subject.engine.begin_update()
    with pytest.raises(EngineError, match="already open"):
        subject.engine.begin_update()
    subject.engine.end_update()
    with pytest.raises(EngineError, match="no weight-update session is open"):
        subject.engine.end_update()


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_flush_while_paused(subject: Subject, mode: str) -> None:
    running = RunningRequest(subject.url, PROMPT)
    subject.engine.pause(mode)
    if mode == "in_place":
        with pytest.raises(EngineError, match=r"flush_cache: HTTP 400: .*[Ff]lush"):
            subject.engine.flush_cache()
    else:
        subject.engine.flush_cache()
    subject.engine.resume()
    running.abort()


def test_distributed_update_needs_a_session_and_a_group(subject: Subject) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        subject.engine.destroy_group(GROUP)
    if not subject.tells_spans:
        return  # knows no sessions, and dies of an unknown group
    metas = [TensorMeta(name="model.norm.weight", dtype="float32", shape=(64,))]
    with pytest.raises(EngineError, match="must run between"):
        subject.engine.update_from_distributed(metas, group_name=GROUP, weight_version=1)
    subject.engine.begin_update()
    with pytest.raises(EngineError, match="Failed to receive weights"):
        subject.engine.update_from_distributed(metas, group_name=GROUP, weight_version=1)
    subject.engine.end_update()


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_distributed_update_in_buckets(subject: Subject, trainer: TrainerRank, mode: str) -> None:
    weights = load_file(subject.other_model / "model.safetensors")
    names = sorted(weights)
    running = RunningRequest(subject.url, PROMPT)
    engine = subject.engine
    engine.pause(mode)
    engine.begin_update()
    trainer.send({name: weights[name] for name in names[:5]}, None)
    assert engine.weight_version() == "0"
    trainer.send({name: weights[name] for name in names[5:]}, 1)
    engine.end_update()
    assert engine.weight_version() == "1"
    if mode != "in_place":
        engine.flush_cache()
    engine.resume()
    if mode == "abort" or (mode == "retract" and not subject.tells_spans):
        answer, expected = running.rest(), ["0"]
    else:
        running.read_until_version("1")
        answer, expected = running.abort(), ["0", "1"]
    assert versions_of(answer) in (expected, None)
    assert generate(subject.url, PROMPT, {"max_new_tokens": 3})["meta_info"]["weight_version"] == "1"
    if subject.real and mode != "in_place":
        check_against_disk(subject)


def check_against_disk(subject: Subject) -> None:
    """The engine now holds, bit for bit, what it would have loaded from the other folder."""
    checksum, logprobs = subject.engine.weights_checksum(), forced_logprobs(subject.url, PROMPT)
    np.testing.assert_allclose(logprobs, continuation_logprobs(subject.other_model, PROMPT, FORCED), atol=1e-4)
    subject.engine.update_from_disk(str(subject.other_model), weight_version=2)
    assert subject.engine.weights_checksum() == checksum


def test_fake_receives_what_was_sent(subject: Subject, trainer: TrainerRank, request: pytest.FixtureRequest) -> None:
    if subject.real:
        pytest.skip("a real server shows its weights by checksum")
    sent = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.tensor([1.5, -2.0])}
    subject.engine.begin_update()
    trainer.send(sent, 4)
    subject.engine.end_update()
    assert subject.fake is not None
    received = subject.fake.weights
    assert {name: tensor.dtype for name, tensor in received.items()} == {"a": torch.bfloat16, "b": torch.float32}
    assert all(torch.equal(received[name], sent[name]) for name in sent)
