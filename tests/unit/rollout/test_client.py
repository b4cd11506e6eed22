"""The generation client against a server that answers, fails and comes back."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import numpy as np
import orjson
import pytest

from megatron_rlvr.rollout import routing
from megatron_rlvr.rollout.answer import MalformedAnswerError, Sample, parse_answer
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.messages import RolloutError, Sampling, ServerTrouble, TroubleKind
from megatron_rlvr.types import FinishReason
from tests.fakes.sglang_server import FakeSGLang, Fault, hashed_token

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=6)
PROMPT = np.array([5, 6, 7], dtype=np.int32)


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "FIRST_BACKOFF_S", 0.01)


@contextlib.asynccontextmanager
async def connected(*servers: FakeSGLang | str, **options) -> AsyncIterator[GenerationClient]:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    settings = {"concurrency": 64, "request_timeout_s": 30.0, "max_retries": 3, "recovery_s": 0.5} | options
    async with GenerationClient(urls, **settings) as client:
        yield client


async def generate(client: GenerationClient, rid: str = "r", sampling: Sampling = SAMPLING) -> Sample:
    with client.place(1) as placement:
        return await client.generate(PROMPT, sampling, rid=rid, placement=placement)


def expected(length: int, updates: int = 0) -> tuple[list[int], list[float]]:
    """What the fake server samples for the prompt."""
    context, logprobs = PROMPT.tolist(), []
    for _ in range(length):
        token, logprob = hashed_token(context, 0, updates)
        context.append(token)
        logprobs.append(logprob)
    return context[len(PROMPT) :], logprobs


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_keeps_ids_logprobs_reason_and_versions():
    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server) as client:
            await client.check()
            return await generate(client)

    with FakeSGLang(eos_token_id=None, weight_version="4") as server:
        sample = asyncio.run(scenario(server))
        body = server.bodies("generate")[0]
    ids, logprobs = expected(6)
    assert sample.output_ids.dtype == np.int32
    assert sample.output_ids.tolist() == ids
    assert sample.logprobs.dtype == np.float32
    np.testing.assert_array_equal(sample.logprobs, np.array(logprobs, np.float32))
    assert sample.finish_reason is FinishReason.length
    assert sample.weight_versions == [(4, 0, 6)]
    assert sample.text == "".join(f"<{i}>" for i in ids)
    assert (sample.prompt_tokens, sample.retries, sample.aborts) == (3, 0, 0)
    assert body["input_ids"] == [5, 6, 7]
    assert body["sampling_params"] == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 6}


def test_stop_strings_and_end_of_sequence_are_sent_and_reported():
    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server) as client:
            return await generate(
                client, sampling=Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_tokens=6, stop=(stop,))
            )

    ids, _ = expected(3)
    stop = f"<{ids[2]}>"
    with FakeSGLang() as server:
        sample = asyncio.run(scenario(server))
    assert sample.finish_reason is FinishReason.stop
    assert sample.output_ids.tolist() == ids
    assert sample.text == f"<{ids[0]}><{ids[1]}>"


def test_servers_without_spans_give_one():
    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server) as client:
            return await generate(client)

    with FakeSGLang(version_spans=False, version="0.5.17", eos_token_id=None) as server:
        assert asyncio.run(scenario(server)).weight_versions == [(0, 0, 6)]


class SyncsHalfWay(FakeSGLang):
    """Takes new weights after the second token of a response."""

    def _extend_span(self, running, position):
        super()._extend_span(running, position)
        if position == 1:
            self.weight_version = "8"


def test_a_sync_within_a_response_leaves_two_spans():
    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server) as client:
            return await generate(client)

    with SyncsHalfWay(weight_version="7", eos_token_id=None) as server:
        sample = asyncio.run(scenario(server))
    assert sample.weight_versions == [(7, 0, 2), (8, 2, 6)]


@pytest.mark.parametrize("fault", [Fault.error, Fault.drop, Fault.garbage, Fault.hang])
def test_a_failed_attempt_is_repeated_under_a_new_id(fault: Fault):
    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server, request_timeout_s=0.3) as client:
            sample = await generate(client)
            await client.routing.settle()
            return sample

    with FakeSGLang(eos_token_id=None) as server:
        server.fault("generate", fault, times=2)
        sample = asyncio.run(scenario(server))
        rids = [body["rid"] for body in server.bodies("generate")]
        aborted = [body["rid"] for body in server.bodies("abort_request")]
    assert sample.output_ids.tolist() == expected(6)[0]
    assert sample.retries == 2
    assert rids == ["r.0.", "r.1.", "r.2."]
    # only what may still run is aborted
    assert sorted(aborted) == (["r.0.", "r.1."] if fault in (Fault.drop, Fault.hang) else [])


def test_another_server_takes_over_and_the_failed_one_returns():
    async def scenario(bad: FakeSGLang, good: FakeSGLang) -> list[Sample]:
        async with connected(bad, good) as client:
            bad.fault("*", Fault.error)
            samples = await asyncio.gather(*(generate(client, f"a{i}") for i in range(8)))
            assert {body["rid"] for body in good.bodies("generate")} >= {f"a{i}.1." for i in range(0, 8, 2)}
            before = bad.count("generate")
            assert client.routing.servers[0].failure is not None
            await generate(client, "b")
            assert bad.count("generate") == before
            bad.heal()
            await client.routing.recovered.wait()
            assert [server.load for server in client.routing.servers] == [0, 0]
            await asyncio.gather(*(generate(client, f"c{i}") for i in range(8)))
            assert bad.count("generate") == before + 4
            return samples

    with FakeSGLang() as bad, FakeSGLang() as good:
        samples = asyncio.run(scenario(bad, good))
    assert sum(sample.retries for sample in samples) == 4


def test_load_is_spread_over_servers_and_groups_stay_together():
    async def scenario(servers: list[FakeSGLang]) -> None:
        async with connected(*servers) as client:

            async def group(name: str) -> None:
                with client.place(4) as placement:
                    work = (
                        client.generate(PROMPT, SAMPLING, rid=f"{name}-r{i}", placement=placement) for i in range(4)
                    )
                    await asyncio.gather(*work)

            await asyncio.gather(*(group(f"g{i}") for i in range(6)))

    with FakeSGLang() as one, FakeSGLang() as two, FakeSGLang() as three:
        asyncio.run(scenario([one, two, three]))
        groups = [{body["rid"].split("-")[0] for body in server.bodies("generate")} for server in (one, two, three)]
        assert [server.count("generate") for server in (one, two, three)] == [8, 8, 8]
    assert groups == [{"g0", "g3"}, {"g1", "g4"}, {"g2", "g5"}]


def test_concurrency_is_bounded():
    async def scenario(server: FakeSGLang) -> None:
        async with connected(server, concurrency=3) as client:
            await asyncio.gather(*(generate(client, f"r{i}") for i in range(20)))

    with FakeSGLang(token_delay_s=0.002) as server:
        asyncio.run(scenario(server))
        assert server.max_in_flight == 3


def test_dead_servers_fail_by_name_within_seconds():
    url = free_url()

    async def check() -> None:
        async with connected(url) as client:
            await client.check()

    async def ask() -> None:
        async with connected(url) as client:
            await generate(client)

    started = time.monotonic()
    with pytest.raises(RolloutError, match=rf"server {url} cannot be reached: .*[Cc]onnect"):
        asyncio.run(check())
    with pytest.raises(RolloutError, match=rf"no server has been healthy for 0.5 s \({url}: .*[Cc]onnect"):
        asyncio.run(ask())
    assert time.monotonic() - started < 20


def test_the_last_failure_is_told_when_retries_run_out():
    async def scenario(server: FakeSGLang) -> None:
        async with connected(server, max_retries=2) as client:
            await generate(client)

    with FakeSGLang() as server:
        server.fault("generate", Fault.error)
        with pytest.raises(RolloutError, match=rf"failed 3 times, last at {server.url}: HTTP 500: Internal"):
            asyncio.run(scenario(server))


def test_a_refused_request_is_not_repeated():
    async def scenario(server: FakeSGLang) -> None:
        async with connected(server) as client:
            await generate(client, sampling=Sampling(temperature=1.0, top_p=7.0, top_k=-1, max_tokens=6))

    with FakeSGLang() as server:
        with pytest.raises(RolloutError, match=r"HTTP 400: .*top_p must be in \(0, 1\], got 7.0"):
            asyncio.run(scenario(server))
        assert server.count("generate") == 1


def test_an_aborted_response_is_generated_again_and_counted():
    class AbortsTwice(FakeSGLang):
        left = 2

        def _extend_span(self, running, position):
            super()._extend_span(running, position)
            if position == 3 and self.left:
                self.left -= 1
                running.aborted = True

    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server) as client:
            return await generate(client)

    with AbortsTwice(eos_token_id=None) as server:
        sample = asyncio.run(scenario(server))
        assert server.count("generate") == 3
        assert server.count("health") == 0  # an abort is no failure of the server
    assert sample.finish_reason is FinishReason.length
    assert (sample.aborts, sample.retries) == (2, 0)
    assert sample.output_ids.tolist() == expected(6)[0]


def test_a_response_that_is_always_aborted_is_handed_over_as_such():
    class Aborts(FakeSGLang):
        def _extend_span(self, running, position):
            super()._extend_span(running, position)
            running.aborted = position == 1

    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server, max_retries=1) as client:
            return await generate(client)

    with Aborts(eos_token_id=None) as server:
        sample = asyncio.run(scenario(server))
    assert sample.finish_reason is FinishReason.abort
    assert sample.output_ids.tolist() == expected(2)[0]
    assert sample.aborts == 1


def test_a_server_with_older_weights_is_not_used_until_it_is_synced():
    async def scenario(restarted: FakeSGLang, synced: FakeSGLang) -> None:
        async with connected(restarted, synced) as client:
            client.routing.min_version = 12
            samples = await asyncio.gather(*(generate(client, f"r{i}") for i in range(4)))
            assert [sample.weight_versions for sample in samples] == [[(12, 0, 6)]] * 4
            assert client.routing.servers[0].failure == "holds weights of policy version 0, older than 12"
            restarted.weight_version = "12"
            await client.routing.recovered.wait()
            assert client.routing.servers[0].failure is None

    with (
        FakeSGLang(eos_token_id=None) as restarted,
        FakeSGLang(weight_version="12", eos_token_id=None) as synced,
    ):
        asyncio.run(scenario(restarted, synced))


def test_a_router_takes_requests_and_its_servers_take_aborts_and_repetitions():
    async def scenario(router: FakeSGLang, servers: list[FakeSGLang]) -> None:
        async with connected(*servers, router_url=router.url, request_timeout_s=0.3) as client:
            await client.check()
            assert (await generate(client, "a")).retries == 0
            router.fault("generate", Fault.hang, times=1)
            assert (await generate(client, "b")).retries == 1
            await client.routing.settle()
            router.stop()
            assert (await generate(client, "c")).retries == 1
            assert (await generate(client, "d")).retries == 0

    with FakeSGLang() as router, FakeSGLang() as one, FakeSGLang() as two:
        asyncio.run(scenario(router, [one, two]))
        assert [body["rid"] for body in router.bodies("generate")] == ["a.0.", "b.0."]
        assert [body["rid"] for body in one.bodies("generate")] == ["b.1.", "c.1.", "d.0."]
        assert one.bodies("abort_request")[0] == two.bodies("abort_request")[0] == {"rid": "b.0."}
        assert router.count("abort_request") == 0


def test_a_server_that_says_nothing_loses_its_requests_to_others():
    troubles: list[ServerTrouble] = []

    async def scenario(silent: FakeSGLang, other: FakeSGLang) -> None:
        async with connected(silent, other, silence_s=0.4, on_trouble=troubles.append) as client:
            silent.fault("*", Fault.hang)
            samples = await asyncio.gather(*(generate(client, f"r{i}") for i in range(6)))
            assert sorted(sample.retries for sample in samples) == [0, 0, 0, 1, 1, 1]
            assert client.routing.servers[0].failure is not None
            silent.heal()
            await client.routing.recovered.wait()

    with FakeSGLang() as silent, FakeSGLang() as other:
        asyncio.run(scenario(silent, other))
        assert other.count("generate") == 6
    assert troubles == [ServerTrouble(url=silent.url, kind=TroubleKind.silent, reason="has said nothing for 0.4 s")]


def test_a_silent_server_is_found_behind_a_router_too():
    async def scenario(router: FakeSGLang, silent: FakeSGLang, other: FakeSGLang) -> Sample:
        async with connected(silent, other, router_url=router.url, silence_s=0.4) as client:
            router.fault("generate", Fault.hang)
            silent.fault("*", Fault.hang)
            return await generate(client)

    with FakeSGLang() as router, FakeSGLang() as silent, FakeSGLang() as other:
        sample = asyncio.run(scenario(router, silent, other))
        assert other.count("generate") == 1
    assert sample.retries == 1


def test_a_long_response_is_no_silence():
    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server, silence_s=0.2) as client:
            return await generate(client)

    with FakeSGLang(token_delay_s=0.2, eos_token_id=None) as server:
        sample = asyncio.run(scenario(server))
        assert server.count("health_generate") > 0
    assert (len(sample.output_ids), sample.retries) == (6, 0)


def test_silence_means_nothing_while_a_sync_holds_the_servers():
    async def scenario(server: FakeSGLang) -> Sample:
        async with connected(server, silence_s=0.2) as client:
            client.routing.hold(True)
            server.fault("health_generate", Fault.hang)
            response = asyncio.create_task(generate(client))
            sample = await response
            client.routing.hold(False)
            return sample

    with FakeSGLang(token_delay_s=0.15, eos_token_id=None) as server:
        assert asyncio.run(scenario(server)).retries == 0


def test_a_server_that_was_gone_comes_back_when_the_trainer_has_synced_it():
    """Its version says nothing: before the first update every server has version 0."""
    stale = asyncio.Event()
    troubles: list[ServerTrouble] = []

    def on_trouble(trouble: ServerTrouble) -> None:
        troubles.append(trouble)
        stale.set()

    async def scenario(first: FakeSGLang) -> None:
        port = int(first.url.rpartition(":")[2])
        async with connected(first, recovery_s=30.0, on_trouble=on_trouble) as client:
            work = [asyncio.create_task(generate(client, f"r{i}")) for i in range(4)]
            while first.count("generate") < 4:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(first.stop)
            second = FakeSGLang(port=port)
            await asyncio.to_thread(second.__enter__)
            try:
                await stale.wait()
                assert not any(task.done() for task in work)
                assert second.count("generate") == 0, "nothing is asked of weights that nobody knows"
                client.routing.use([first.url], router_url=None)
                samples = await asyncio.gather(*work)
                assert second.count("generate") == 4
                assert [sample.retries for sample in samples] == [1] * 4
            finally:
                await asyncio.to_thread(second.stop)

    with FakeSGLang(token_delay_s=0.5) as first:
        asyncio.run(scenario(first))
    assert {(trouble.url, trouble.kind) for trouble in troubles} == {(first.url, TroubleKind.stale)}


def test_requests_move_on_when_their_server_is_no_longer_among_them():
    async def scenario(old: FakeSGLang, new: FakeSGLang) -> Sample:
        async with connected(old) as client:
            work = asyncio.create_task(generate(client))
            while old.count("generate") < 1:
                await asyncio.sleep(0.01)
            client.routing.use([new.url], router_url=None)
            return await work

    with FakeSGLang(token_delay_s=60.0) as old, FakeSGLang() as new:
        sample = asyncio.run(scenario(old, new))
        assert new.count("generate") == 1
    assert sample.retries == 1


def test_a_dead_router_is_named():
    url = free_url()

    async def scenario(server: FakeSGLang) -> None:
        async with connected(server, router_url=url) as client:
            await client.check()

    with FakeSGLang() as server, pytest.raises(RolloutError, match=f"server {url} cannot be reached"):
        asyncio.run(scenario(server))


ANSWER = {
    "text": "ab",
    "output_ids": [4, 9],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 9},
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cached_tokens": 1,
        "weight_version": "5",
        "output_token_logprobs": [[-0.5, 4, None], [-0.25, 9, None]],
    },
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_token_logprobs": [[-0.5, 4, None], [None, 9, None]]}, "no finite log-prob"),
        ({"completion_tokens": 3}, "3 tokens have 2 log-probs"),
        ({"weight_version": "latest"}, "must be a policy version, got 'latest'"),
        ({"finish_reason": {"type": "tired"}}, "'tired' is not a valid FinishReason"),
    ],
)
def test_answers_that_make_no_sense_are_refused(changes: dict, message: str):
    answer = ANSWER | {"meta_info": ANSWER["meta_info"] | changes}
    with pytest.raises(MalformedAnswerError, match=message):
        parse_answer(orjson.dumps(answer))


def test_answer_values_and_the_cover_of_spans():
    spans = [
        {"version": "default", "start": 0, "end": 1},
        {"version": "3", "start": 1, "end": 1},
        {"version": "5", "start": 1, "end": 4},
    ]
    answer = ANSWER | {"meta_info": ANSWER["meta_info"] | {"weight_versions": spans}}
    sample = parse_answer(orjson.dumps(answer))
    assert sample.weight_versions == [(0, 0, 1), (5, 1, 2)]
    assert sample.logprobs.tolist() == [-0.5, -0.25]
    assert (sample.prompt_tokens, sample.cached_tokens) == (3, 1)


def test_an_empty_response_has_one_empty_span():
    changes = {"completion_tokens": 0, "output_token_logprobs": [], "weight_versions": []}
    sample = parse_answer(orjson.dumps(ANSWER | {"meta_info": ANSWER["meta_info"] | changes}))
    assert sample.weight_versions == [(5, 0, 0)]
    assert len(sample.output_ids) == len(sample.logprobs) == 0
