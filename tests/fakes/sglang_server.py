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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from aiohttp import web

from tests.fakes.generation import Generation, NextToken, Running, hashed_token
from tests.fakes.weight_group import WeightGroup


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


class FakeSGLang(Generation):
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
        settings: more that server_info reports.
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
        settings: Mapping[str, Any] | None = None,
        port: int = 0,
    ) -> None:
        self.next_token, self.decode, self.encode = next_token, decode, encode
        self.eos_token_id, self.token_delay_s = eos_token_id, token_delay_s
        self.session_endpoints, self.version_spans, self.join_groups = session_endpoints, version_spans, join_groups
        self.tp_size, self.dp_size, self.version, self.model_path = tp_size, dp_size, version, model_path
        self.weight_version = weight_version
        self.settings = dict(settings or {})
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
        self._running: dict[str, Running] = {}
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
        self._healed = asyncio.Event()
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
        """Ends all faults; requests that hang are answered now, as by a process that was stopped and goes on."""
        self._faults.clear()
        self._loop.call_soon_threadsafe(self._go_on)

    def _go_on(self) -> None:
        self._healed.set()
        self._healed = asyncio.Event()

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
        return await handler(body, request) if path == "generate" else await handler(body)

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
                await self._healed.wait()
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

    async def _on_freeze_gc(self, body: dict[str, Any]) -> web.Response:
        return web.Response(text="Garbage collection frozen.\n")

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
                **self.settings,
            }
        )

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
