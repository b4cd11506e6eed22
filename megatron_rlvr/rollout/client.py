"""Asks SGLang servers for responses: one connection pool, routing, retries. No torch, no tokenizer.

One request asks for one response. One request with ``n`` samples per prompt was 5 to 8 % faster (SGLang 0.5.21 on two
CPU cores, 16 prompts x 8 responses x 24 tokens: 0.45 s against 0.47 s; 8 x 16 x 24 with prompts of 400 tokens: 0.94 s
against 0.99 s), but then nothing can be verified before the last response of a prompt ends, a failure repeats all of
them, and none can be aborted by its id (the server makes up new ones). Sending one request ahead to fill the prefix
cache gained nothing. The responses of a prompt go to one server, whose prefix cache then holds their prompt.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
import orjson

from megatron_rlvr.rollout import api_key, routing
from megatron_rlvr.rollout.answer import MalformedAnswerError, Sample, parse_answer
from megatron_rlvr.rollout.messages import RolloutError, Sampling, ServerTrouble
from megatron_rlvr.rollout.routing import Placement, Server, ServerRouting, reason_of
from megatron_rlvr.types import FinishReason

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 30.0
"""SGLang's own health check gives up after 20 s."""
RECOVERY_S = 10.0
"""How long a request waits for any server to come back before it fails."""
SILENCE_S = 120.0
"""For how long a server that has requests may say nothing at all."""


class _AttemptError(Exception):
    """One attempt failed in a way that another may not.

    Args:
        reason: what happened.
        running: whether the server may still be generating, so that the attempt should be aborted there.
        lost: whether the server's process may have ended.
    """

    def __init__(self, reason: str, *, running: bool = False, lost: bool = False) -> None:
        super().__init__(reason)
        self.running = running
        self.lost = lost


class GenerationClient:
    """Client of one or several SGLang servers, or of a router in front of them.

    A request goes through the router, or without one to the least loaded healthy server. A server that fails (no
    connection, timeout, silence, HTTP 5xx, an answer that makes no sense, weights older than `min_version`) leaves the
    routing (see `rollout.routing`); its requests are repeated elsewhere, or on it if there is no other. What failed
    behind the router is repeated at the servers themselves: the router takes seconds to see that one of them is dead.

    Args:
        urls: base URLs of the servers.
        router_url: base URL of sglang-router, if there is one.
        concurrency: requests in flight over all servers.
        request_timeout_s: wall clock of one attempt, from sending to the last byte, in seconds.
        max_retries: further attempts after a failed one, and further attempts after an aborted one.
        recovery_s, silence_s, on_trouble: of `ServerRouting`.

    Example:
        >>> async with GenerationClient(["http://127.0.0.1:30000"], concurrency=8, ...) as client:
        ...     with client.place(1) as placement:
        ...         sample = await client.generate(prompt_ids, sampling, rid="a", placement=placement)
    """

    def __init__(
        self,
        urls: list[str] | tuple[str, ...],
        *,
        concurrency: int,
        request_timeout_s: float,
        max_retries: int,
        router_url: str | None = None,
        recovery_s: float = RECOVERY_S,
        silence_s: float = SILENCE_S,
        on_trouble: Callable[[ServerTrouble], None] | None = None,
    ) -> None:
        self.routing = ServerRouting(
            urls,
            router_url=router_url,
            get=self._get,
            recovery_s=recovery_s,
            silence_s=silence_s,
            on_trouble=on_trouble,
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._request_timeout_s = request_timeout_s
        self._max_retries = max_retries
        self._session = aiohttp.ClientSession(
            headers=api_key.headers(),
            # The semaphore is the only limit. SGLang closes idle connections after 5 s; ours go first, so that no
            # request is written into a connection that is just being closed.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
            timeout=aiohttp.ClientTimeout(total=request_timeout_s, sock_connect=CONNECT_TIMEOUT_S),
        )
        self.routing.watch()

    async def __aenter__(self) -> GenerationClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections; requests still in flight are aborted by their servers."""
        await self.routing.close()
        await self._session.close()

    async def check(self) -> None:
        """Reaches every server (and the router) once.

        Raises:
            RolloutError: one does not answer, or is no SGLang server; names it and the reason.
        """
        routing = self.routing
        routers = [] if routing.router is None else [routing.router]
        await asyncio.gather(*(self._check_one(server) for server in [*routers, *routing.servers]))

    async def _check_one(self, server: Server) -> None:
        url, path = server.url, "/health" if server is self.routing.router else "/model_info"
        try:
            status, body = await self._get(url + path)
            if path == "/model_info" and status == 404:
                status, body = await self._get(url + "/get_model_info")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RolloutError(f"server {url} cannot be reached: {reason_of(error)}") from error
        if status != 200:
            raise RolloutError(f"server {url} answers {path} with HTTP {status}: {_excerpt(body)}")

    def place(self, count: int) -> Placement:
        """Plans ``count`` responses of one prompt on the router or the least loaded healthy server."""
        return self.routing.place(count)

    # generation

    async def generate(
        self, input_ids: np.ndarray, sampling: Sampling, *, rid: str, placement: Placement, seed: int | None = None
    ) -> Sample:
        """Samples one response.

        Args:
            input_ids: int32 [L] prompt.
            sampling: temperature, lengths and stops.
            rid: request id, unique over the servers' lifetime and without ``.``; every attempt adds its own suffix.
            placement: where the responses of this prompt are planned.
            seed: sampling seed; honoured on a CPU and with ``rollout.server.deterministic``, else ignored.

        Returns:
            The response. Its finish reason is abort only when ``max_retries`` repetitions were aborted too; it then
            holds what the last attempt had sampled.

        Raises:
            RolloutError: every attempt failed, or a server refused the request; names the server and the reason.
        """
        try:
            async with self._slots:
                return await self._generate(_body(input_ids, sampling, seed), rid, placement)
        finally:
            placement.release()

    async def _generate(self, body: dict[str, Any], rid: str, placement: Placement) -> Sample:
        failures: list[str] = []
        aborts = 0
        avoid: Server | None = None
        while True:
            server = await self.routing.healthy(placement.server, avoid=avoid)
            moved = Placement(server, 1 if server is not placement.server else 0)
            # Servers abort by prefix of the id: the closing dot keeps attempt 1 from naming attempt 10.
            attempt_rid = f"{rid}.{len(failures) + aborts}."
            try:
                with moved:
                    sample = await self._attempt(server, body, attempt_rid)
            except _AttemptError as error:
                failures.append(f"{server.url}: {error}")
                if error.running:
                    self._abort(server, attempt_rid)
                self.routing.take_out(server, str(error), lost=error.lost)
                avoid = server
                if len(failures) > self._max_retries:
                    raise RolloutError(
                        f"request {rid} failed {len(failures)} times, last at {failures[-1]}"
                        + (f" (before: {'; '.join(dict.fromkeys(failures[:-1]))})" if len(failures) > 1 else "")
                    ) from error
                await self._back_off(len(failures))
                continue
            if sample.finish_reason is FinishReason.abort and aborts < self._max_retries:
                aborts += 1
                await self._back_off(aborts)
                continue
            sample.retries, sample.aborts = len(failures), aborts
            return sample

    async def _attempt(self, server: Server, body: dict[str, Any], rid: str) -> Sample:
        """One request.

        Raises:
            _AttemptError: another attempt may succeed.
            RolloutError: the server refuses the request itself (HTTP 4xx).
        """
        data = orjson.dumps({**body, "rid": rid}, option=orjson.OPT_SERIALIZE_NUMPY)
        cut_off = asyncio.timeout(None)
        server.requests.add(cut_off)
        try:
            async with (
                cut_off,
                self._session.post(
                    server.url + "/generate", data=data, headers={"Content-Type": "application/json"}
                ) as response,
            ):
                answer = await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise _AttemptError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
        except TimeoutError as error:
            if cut_off.expired():
                raise _AttemptError(server.failure or "was given up", running=True) from error
            raise _AttemptError(f"no answer within {self._request_timeout_s:g} s", running=True) from error
        except aiohttp.ClientConnectorError as error:
            raise _AttemptError(reason_of(error), lost=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _AttemptError(reason_of(error), running=True, lost=True) from error
        finally:
            server.requests.discard(cut_off)
        if response.status >= 500 or response.status in (408, 429):
            raise _AttemptError(f"HTTP {response.status}: {_excerpt(answer)}")
        if response.status != 200:
            raise RolloutError(f"server {server.url} refuses a request, HTTP {response.status}: {_excerpt(answer)}")
        try:
            sample = parse_answer(answer)
        except MalformedAnswerError as error:
            raise _AttemptError(f"the answer makes no sense: {error}: {_excerpt(answer)}") from error
        if (stale := self.routing.stale(sample.weight_versions[0][0])) is not None:
            raise _AttemptError(stale)
        self.routing.answered(server)
        return sample

    async def _back_off(self, count: int) -> None:
        longest = min(routing.FIRST_BACKOFF_S * 2 ** (count - 1), routing.LAST_BACKOFF_S)
        # spread, so that the requests of a failed server do not return all at once
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))

    def _abort(self, server: Server, rid: str) -> None:
        """Frees the server of an attempt that nobody waits for any more."""
        # a router does not say which server has the request, and does not know aborts
        for holder in self.routing.servers if server is self.routing.router else [server]:
            self.routing.spawn(self._abort_at(holder.url, rid))

    async def _abort_at(self, url: str, rid: str) -> None:
        timeout = aiohttp.ClientTimeout(total=CONNECT_TIMEOUT_S)
        try:
            async with self._session.post(url + "/abort_request", json={"rid": rid}, timeout=timeout) as response:
                await response.read()
        except (aiohttp.ClientError, OSError) as error:
            logger.info("abort of %s at %s failed: %s", rid, url, reason_of(error))

    async def _get(self, url: str, limit_s: float | None = None) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=limit_s or HEALTH_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        async with self._session.get(url, timeout=timeout) as response:
            return response.status, await response.read()


def _body(input_ids: np.ndarray, sampling: Sampling, seed: int | None) -> dict[str, Any]:
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_tokens,
    }
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if seed is not None:
        params["sampling_seed"] = seed
    return {
        "input_ids": np.ascontiguousarray(input_ids, dtype=np.int32),
        "sampling_params": params,
        "return_logprob": True,
        "logprob_start_len": -1,
        "return_text_in_logprobs": False,
        "stream": False,
    }


def _excerpt(body: bytes) -> str:
    text = " ".join(body.decode(errors="replace").split())
    return text if len(text) <= 300 else text[:300] + "..."
