"""A fake SGLang server: the HTTP protocol the trainer talks to, without a model.

It answers in the shapes read off real servers (0.5.21; ``session_endpoints=False`` behaves as 0.5.17-0.5.20) and
can be told to misbehave. It runs an event loop in a thread of its own and leaves nothing behind.

Example:
    >>> with FakeSGLang() as server:
    ...     requests.post(server.url + "/generate", json={"input_ids": [1, 2], "sampling_params": {}})
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from aiohttp import web

from tests.fakes.weight_group import WeightGroup

SAMPLING_FIELDS = {
    "max_new_tokens", "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "min_new_tokens", "stop", "stop_token_ids", "stop_regex", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "logit_bias", "sampling_seed",
    "json_schema", "regex", "ebnf", "custom_params",
}  # fmt: skip

NextToken = Callable[[Sequence[int], int, int], tuple[int, float]]
"""(token ids so far, prompt included; sample index; weight version as counted by updates) -> (token id, log-prob)."""


class Fault(Enum):
    """How an endpoint misbehaves."""

    hang = "hang"
    """Accepts the request and never answers."""
    error = "error"
    """HTTP 500."""
    garbage = "garbage"
    """HTTP 200 with a body that is no JSON."""
    drop = "drop"
    """Closes the connection without an answer."""
    slow = "slow"
    """Answers properly, `delay_s` late."""
    refuse = "refuse"
    """HTTP 400 with a message, as a refused update answers."""


@dataclass(kw_only=True, slots=True)
class Call:
    """One request as received."""

    path: str
    body: dict[str, Any]
    at: float
    """time.monotonic() seconds."""


@dataclass(kw_only=True, slots=True)
class _Fault:
    kind: Fault
    times: int | None
    delay_s: float


@dataclass(kw_only=True, slots=True)
class _Running:
    rid: str
    aborted: bool = False
    spans: list[list[Any]] = field(default_factory=list)


def hashed_token(context: Sequence[int], sample: int, updates: int, *, vocab_size: int = 100) -> tuple[int, float]:
    """A pseudo-random token id in [2, vocab_size) and a log-prob in (-4, 0), fixed by the arguments."""
    digest = hashlib.blake2b(repr((list(context), sample, updates)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    return 2 + number % (vocab_size - 2), -((number >> 32) % 4000) / 1000.0 - 1e-3


class FakeSGLang:
    """An SGLang server that generates from a function.

    Args:
        next_token: the "model"; default `hashed_token` with the sample index dropped at temperature 0.
        decode: token ids to text.
        encode: text to token ids.
        eos_token_id: ends a response with finish reason ``stop`` unless ``ignore_eos``; None never.
        token_delay_s: seconds per generated token, so that requests can be caught half-way.
        session_endpoints: whether begin/end_weight_update exist (0.5.21 and later).
        version_spans: whether meta_info carries ``weight_versions`` (0.5.21 and later).
        join_groups: whether init_weights_update_group really joins a gloo group and receives tensors.
        tp_size, dp_size, version, weight_version: what model_info and server_info report.
        port: 0 picks a free one.
    """

    def __init__(
        self,
        *,
        next_token: NextToken = hashed_token,
        decode: Callable[[Sequence[int]], str] = lambda ids: "".join(f"<{i}>" for i in ids),
        encode: Callable[[str], list[int]] = lambda text: list(text.encode()),
        eos_token_id: int | None = 1,
        token_delay_s: float = 0.0,
        session_endpoints: bool = True,
        version_spans: bool = True,
        join_groups: bool = False,
        tp_size: int = 1,
        dp_size: int = 1,
        version: str = "0.5.21",
        weight_version: str = "default",
        model_path: str = "/models/fake",
        port: int = 0,
    ) -> None:
        self.next_token, self.decode, self.encode = next_token, decode, encode
        self.eos_token_id, self.token_delay_s = eos_token_id, token_delay_s
        self.session_endpoints, self.version_spans, self.join_groups = session_endpoints, version_spans, join_groups
        self.tp_size, self.dp_size, self.version, self.model_path = tp_size, dp_size, version, model_path
        self.weight_version = weight_version
        self.calls: list[Call] = []
        """Every request received, in order."""
        self.updates = 0
        """Weight updates that succeeded."""
        self.weights: dict[str, Any] = {}
        """Tensors received through a weight-update group, by name."""
        self.max_in_flight = 0
        """Most /generate requests ever answered at once."""
        self.pause_mode: str | None = None
        self._faults: dict[str, _Fault] = {}
        self._running: dict[str, _Running] = {}
        self._groups: dict[str, WeightGroup | None] = {}
        self._session_open = False
        self._port = port
        self._in_flight = 0
        self._ready = threading.Event()
        self._failure: BaseException | None = None

    # life

    def __enter__(self) -> FakeSGLang:
        self._thread = threading.Thread(target=self._run, name="fake-sglang", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port and ends the thread, as a killed server would; safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._unpaused = asyncio.Event()
        self._unpaused.set()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._dispatch)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True, access_log=None)
        try:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", self._port, reuse_address=True)
            await site.start()
            self._port = runner.addresses[0][1]
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._ready.set()
        await self._stopping.wait()
        await runner.cleanup()
        for group in self._groups.values():
            if group is not None:
                group.close()

    # faults and inspection

    def fault(self, path: str, kind: Fault, *, times: int | None = None, delay_s: float = 0.5) -> None:
        """Makes ``path`` (``"generate"``, or ``"*"`` for all) misbehave, ``times`` times or until `heal`."""
        self._faults[path.strip("/")] = _Fault(kind=kind, times=times, delay_s=delay_s)

    def heal(self) -> None:
        """Ends all faults. Requests that already hang stay hanging."""
        self._faults.clear()

    def count(self, path: str) -> int:
        """Requests received at ``path``."""
        return Counter(call.path for call in self.calls)[path.strip("/")]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """JSON bodies received at ``path``, in order."""
        return [call.body for call in self.calls if call.path == path.strip("/")]

    # dispatch

    async def _dispatch(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"].strip("/")
        raw = await request.read()
        body = json.loads(raw) if raw else {}
        self.calls.append(Call(path=path, body=body, at=time.monotonic()))
        response = await self._misbehave(path, request)
        if response is not None:
            return response
        handler = getattr(self, "_on_" + path.removeprefix("get_"), None)
        if handler is None or (not self.session_endpoints and path in {"begin_weight_update", "end_weight_update"}):
            return web.json_response({"detail": "Not Found"}, status=404)
        return await handler(body)

    async def _misbehave(self, path: str, request: web.Request) -> web.StreamResponse | None:
        key = path if path in self._faults else "*"
        fault = self._faults.get(key)
        if fault is None:
            return None
        if fault.times is not None:
            fault.times -= 1
            if fault.times <= 0:
                del self._faults[key]
        match fault.kind:
            case Fault.hang:
                await asyncio.Event().wait()
            case Fault.error:
                return web.Response(text="Internal Server Error", status=500)
            case Fault.garbage:
                return web.Response(text="<html>not json", content_type="application/json")
            case Fault.refuse:
                return web.json_response({"success": False, "message": "refused by the test"}, status=400)
            case Fault.slow:
                await asyncio.sleep(fault.delay_s)
            case Fault.drop:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
        return None

    # information

    async def _on_health(self, body: dict[str, Any]) -> web.Response:
        return web.Response()

    _on_health_generate = _on_ready = _on_health

    async def _on_model_info(self, body: dict[str, Any]) -> web.Response:
        return web.json_response(
            {
                "model_path": self.model_path,
                "is_generation": True,
                "weight_version": self.weight_version,
                "model_type": "qwen3",
            }
        )

    async def _on_server_info(self, body: dict[str, Any]) -> web.Response:
        return web.json_response(
            {
                "model_path": self.model_path,
                "tp_size": self.tp_size,
                "dp_size": self.dp_size,
                "pp_size": 1,
                "enable_dp_attention": False,
                "version": self.version,
            }
        )

    # generation

    async def _on_generate(self, body: dict[str, Any]) -> web.Response:
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            return await self._generate(body)
        finally:
            self._in_flight -= 1

    async def _generate(self, body: dict[str, Any]) -> web.Response:
        if ("text" in body) == ("input_ids" in body):
            return _bad_request("Either text or input_ids should be provided, but not both.")
        given = body["text"] if "text" in body else body["input_ids"]
        batched = isinstance(given, list) and bool(given) and isinstance(given[0], (list, str))
        prompts = given if batched else [given]
        params = body.get("sampling_params") or {}
        params_of = params if isinstance(params, list) else [params] * len(prompts)
        if any(set(p) - SAMPLING_FIELDS for p in params_of):
            return web.Response(text="Internal Server Error", status=500)
        for p in params_of:
            if p.get("temperature", 1.0) < 0.0:
                return _bad_request(f"temperature must be non-negative, got {p['temperature']}.")
            if not 0.0 < p.get("top_p", 1.0) <= 1.0:
                return _bad_request(f"top_p must be in (0, 1], got {p['top_p']}.")
        rid = body.get("rid")
        jobs = []
        for row, (prompt, p) in enumerate(zip(prompts, params_of, strict=True)):
            ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for sample in range(p.get("n", 1)):
                own = rid[row] if isinstance(rid, list) else f"{rid}_{row}" if rid and batched else rid
                # with n > 1 the real server makes up new ids, so that an abort by rid misses
                name = own if own and p.get("n", 1) == 1 else uuid.uuid4().hex
                jobs.append(self._sample(ids, p, sample, name, bool(body.get("return_logprob"))))
        answers = await asyncio.gather(*jobs)
        return web.json_response(answers if len(answers) > 1 or batched else answers[0])

    async def _sample(
        self, prompt: list[int], params: dict[str, Any], sample: int, rid: str, with_logprobs: bool
    ) -> dict[str, Any]:
        started = time.monotonic()
        running = self._running[rid] = _Running(rid=rid)
        limit = params.get("max_new_tokens", 128)
        stops = params.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        stop_ids = set(params.get("stop_token_ids") or [])
        if self.eos_token_id is not None and not params.get("ignore_eos"):
            stop_ids.add(self.eos_token_id)
        output: list[int] = []
        logprobs: list[float] = []
        reason: dict[str, Any] = {"type": "length", "length": limit}
        try:
            while len(output) < limit:
                await self._unpaused.wait()
                await asyncio.sleep(self.token_delay_s)
                if running.aborted:
                    reason = {"type": "abort", "message": "Abort in decode"}
                    break
                if not self._unpaused.is_set():
                    continue
                variant = 0 if params.get("temperature", 1.0) == 0.0 else sample
                token, logprob = self.next_token([*prompt, *output], variant, self.updates)
                self._extend_span(running, len(output))
                output.append(token)
                logprobs.append(logprob)
                if token in stop_ids:
                    reason = {"type": "stop", "matched": token}
                    break
                if stop := next((s for s in stops if s in self.decode(output)), None):
                    reason = {"type": "stop", "matched": stop}
                    break
        finally:
            del self._running[rid]
        text = self.decode([t for t in output if t != self.eos_token_id])
        if isinstance(reason.get("matched"), str) and not params.get("no_stop_trim"):
            text = text[: text.index(reason["matched"])]
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": reason,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output),
            "cached_tokens": 0,
            "weight_version": self.weight_version,
            "num_retractions": 0,
            "e2e_latency": time.monotonic() - started,
        }
        if self.version_spans:
            meta["weight_versions"] = [dict(zip(("version", "start", "end"), s, strict=True)) for s in running.spans]
        if with_logprobs:
            meta["output_token_logprobs"] = [[lp, t, None] for lp, t in zip(logprobs, output, strict=True)]
            meta["input_token_logprobs"] = []
        return {"text": text, "output_ids": output, "meta_info": meta}

    def _extend_span(self, running: _Running, position: int) -> None:
        if running.spans and running.spans[-1][0] == self.weight_version:
            running.spans[-1][2] = position + 1
        else:
            running.spans.append([self.weight_version, position, position + 1])

    async def _on_abort_request(self, body: dict[str, Any]) -> web.Response:
        for running in self._running.values():
            if body.get("abort_all") or running.rid == body.get("rid"):
                running.aborted = True
        return web.Response()

    async def _on_pause_generation(self, body: dict[str, Any]) -> web.Response:
        self.pause_mode = body.get("mode", "abort")
        if self.pause_mode == "abort":
            for running in self._running.values():
                running.aborted = True
            while self._running:
                await asyncio.sleep(0.001)
        self._unpaused.clear()
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _on_continue_generation(self, body: dict[str, Any]) -> web.Response:
        self.pause_mode = None
        self._unpaused.set()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _on_flush_cache(self, body: dict[str, Any]) -> web.Response:
        if self._running and self.pause_mode != "retract":
            return web.Response(text="Flush cache failed.\n", status=400)
        return web.Response(text="Cache flushed.\n")

    # weights

    async def _on_init_weights_update_group(self, body: dict[str, Any]) -> web.Response:
        name = body["group_name"]
        if name in self._groups:
            return _verdict(False, f"Failed to initialize custom process group: {name} exists.")
        if self.join_groups:
            try:
                self._groups[name] = await asyncio.to_thread(WeightGroup.join, body, self.tp_size)
            except RuntimeError as error:
                return _verdict(False, f"Failed to initialize custom process group: {error}.")
        else:
            self._groups[name] = None
        return _verdict(True, "Succeeded to initialize custom process group.")

    async def _on_destroy_weights_update_group(self, body: dict[str, Any]) -> web.Response:
        if body["group_name"] not in self._groups:
            return _verdict(False, "The group to be destroyed does not exist.")
        group = self._groups.pop(body["group_name"])
        if group is not None:
            group.close()
        return _verdict(True, "Succeeded to destroy custom process group.")

    async def _on_begin_weight_update(self, body: dict[str, Any]) -> web.Response:
        if self._session_open:
            return _verdict(False, "a weight-update session is already open; call end_weight_update() first")
        self._session_open = True
        return _verdict(True, "Success")

    async def _on_end_weight_update(self, body: dict[str, Any]) -> web.Response:
        if not self._session_open:
            return _verdict(False, "no weight-update session is open; call begin_weight_update() first")
        self._session_open = False
        return _verdict(True, "Success")

    async def _on_update_weights_from_distributed(self, body: dict[str, Any]) -> web.Response:
        if self.session_endpoints and not self._session_open:
            message = "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()"
            return _verdict(False, message)
        if body.get("group_name", "weight_update_group") not in self._groups:
            return _verdict(False, f"Failed to receive weights: Group not in {list(self._groups)}.")
        group = self._groups[body["group_name"]]
        if group is not None:
            self.weights.update(await asyncio.to_thread(group.receive, body))
        return self._updated(body, "Succeeded to update parameter online.")

    async def _on_update_weights_from_disk(self, body: dict[str, Any]) -> web.Response:
        self.model_path = body["model_path"]
        return self._updated(body, "Succeeded to update model weights.")

    async def _on_update_weight_version(self, body: dict[str, Any]) -> web.Response:
        if body.get("abort_all_requests", True):
            await self._on_abort_request({"abort_all": True})
        self.weight_version = body["new_version"]
        return _verdict(True, f"Weight version updated to {self.weight_version}")

    def _updated(self, body: dict[str, Any], message: str) -> web.Response:
        if body.get("flush_cache", True) and self._running and self.pause_mode != "retract":
            # the real scheduler dies of the assertion "Cache flush failed after updating weights"
            self._stopping.set()
            return _verdict(False, "Cache flush failed after updating weights")
        self.updates += 1
        if body.get("weight_version") is not None:
            self.weight_version = body["weight_version"]
        return _verdict(True, message)

    async def _on_weights_checker(self, body: dict[str, Any]) -> web.Response:
        if body["action"] != "checksum":
            return _verdict(False, f"Unsupported action={body['action']!r}")
        digest = hashlib.sha256(repr((self.model_path, self.updates)).encode()).hexdigest()
        answer = {"success": True, "message": "Success", "per_engine_checksum": digest, "ranks": []}
        return web.json_response(answer)


def _verdict(success: bool, message: str) -> web.Response:
    return web.json_response({"success": success, "message": message}, status=200 if success else 400)


def _bad_request(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)
