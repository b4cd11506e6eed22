"""One SGLang server as weight transfer sees it: the control calls of its HTTP protocol, 0.5.17 to 0.5.23."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from megatron_rlvr.rollout import wire
from megatron_rlvr.types import EngineAddress, EngineError, EngineSilentError, TensorMeta

FIRST_VERSION, VERSION_BEFORE = "0.5.17", "0.5.24"
"""The range of SGLang's versions that this client was run with, the end not in it."""
PAUSE_MODES = ("finish", "in_place", "retract", "abort")
NO_FLUSH = {"flush_cache": False}
"""An update that flushes by itself kills the server (by an assertion of its scheduler) when a request is still there,
and one is for a moment after its client hung up; /flush_cache is refused instead."""
PLAIN_LAYOUT: dict[str, tuple[Any, ...]] = {
    "pp_size": (1,),
    "enable_dp_attention": (False, None),
    "attn_cp_size": (1,),
    "moe_dp_size": (1,),
    "moe_dense_tp_size": (None,),
    "dwdp_size": (1,),
    "quantization": (None,),
    "speculative_algorithm": (None,),
    "enable_eplb": (False, None),
    "ep_num_redundant_experts": (0, None),
    "init_expert_location": ("trivial", None),
    "moe_runner_backend": ("auto", "triton", None),
    "load_format": ("auto", "safetensors", "pt", "dummy", None),
}
"""Server settings and the values with which a rank's weights are the plain slices of `weights.engine_slices`."""
DTYPES = {
    "float32": "float32",
    "float": "float32",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
}
"""What SGLang's --dtype may be, besides auto."""
FLUSH_PATIENCE_S = 10.0
RETRACT_PATIENCE_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerInfo:
    """What a server says about itself."""

    url: str
    num_ranks: int
    """Engine ranks that join a weight-update group: its tensor-parallel size."""
    dp_size: int
    """SGLang's own replicas (1 with attention DP, which stays inside the tensor-parallel ranks)."""
    version: str
    model_path: str
    weight_version: str
    weight_loaders: tuple[str, ...]
    """Dotted paths that `HttpEngine.update_from_tensors` may name."""
    ep_size: int
    """Expert-parallel size inside the tensor-parallel ranks."""
    dtype: str | None
    """Torch name of its parameters' type; None where it depends on the model's files."""
    device: str
    """Where it runs, as SGLang names it: cuda or cpu."""
    odd_layout: tuple[str, ...]
    """Settings that lay weights out in another way than tensor and expert parallelism do, as ``name=value``."""

    @property
    def address(self) -> EngineAddress:
        """As a server that nobody else knows."""
        return EngineAddress(id=self.url, url=self.url, num_ranks=self.num_ranks, restarts=0)

    @property
    def tried(self) -> bool:
        """Whether its version is one that this client was run with."""
        try:
            return Version(FIRST_VERSION) <= Version(self.version) < Version(VERSION_BEFORE)
        except InvalidVersion:
            return False

    def __str__(self) -> str:
        """For a person, e.g. ``http://127.0.0.1:30000 (SGLang 0.5.21)``."""
        untried = "" if self.tried else f", never tried; {FIRST_VERSION} and later, before {VERSION_BEFORE}, were"
        return f"{self.url} (SGLang {self.version}{untried})"


def probe(url: str, *, timeout_s: float) -> ServerInfo:
    """Asks a server who it is.

    Raises:
        EngineError: it does not answer in time, or is no SGLang server; names the URL.
    """
    server = _get_json(url, "/server_info", timeout_s)
    model = _get_json(url, "/model_info", timeout_s)
    try:
        return ServerInfo(
            url=url.rstrip("/"),
            num_ranks=int(server["tp_size"]),
            # Up to 0.5.21 dp_size counts the groups of attention DP, from then on attn_dp_size does.
            dp_size=1 if server["enable_dp_attention"] and "attn_dp_size" not in server else int(server["dp_size"]),
            version=server["version"],
            model_path=model["model_path"],
            weight_version=model["weight_version"],
            weight_loaders=tuple(server.get("custom_weight_loader") or ()),
            ep_size=int(server.get("ep_size") or 1),
            dtype=DTYPES.get(str(server.get("dtype"))),
            device=str(server.get("device") or "cuda"),
            odd_layout=tuple(
                f"{name}={server[name]}"
                for name, plain in PLAIN_LAYOUT.items()
                if name in server and server[name] not in plain
            ),
        )
    except KeyError as error:
        raise EngineError(f"{url} is not an SGLang server: its server_info has no {error}") from error


class HttpEngine:
    """The `Engine` protocol of weight transfer, spoken over HTTP. Calls block; each carries a deadline.

    Args:
        url: ``http://host:port`` of the server itself, not of a router.
        num_ranks: its engine ranks, from `probe`.
        timeout_s: deadline of calls that move weights.
        control_timeout_s: deadline of all others; null: the same.

    Example:
        >>> engine = HttpEngine("http://127.0.0.1:30000", num_ranks=1, timeout_s=300)
        >>> engine.pause("retract"); engine.begin_update(); ...; engine.end_update(); engine.resume()
    """

    def __init__(self, url: str, *, num_ranks: int, timeout_s: float, control_timeout_s: float | None = None) -> None:
        self.url = url.rstrip("/")
        self.num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._control_timeout_s = timeout_s if control_timeout_s is None else control_timeout_s
        self._has_sessions: bool | None = None
        self._pause_mode: str | None = None

    def freeze_gc(self) -> None:
        """Takes what the server has built up to now out of its garbage collections, as its own warm-up would.

        Without a GPU every flush of the cache is a full collection: 0.4 s over all that an import of SGLang leaves,
        twice a sync. Call it once a server; those without the endpoint stay as they are.
        """
        status, raw = self._send("/freeze_gc", {})
        if status != 404:
            self._check("/freeze_gc", status, raw)

    def settle(self, *, timeout_s: float | None = None) -> None:
        """Ends an update that was cut off, if there is one; returns once the server's scheduler has answered.

        The server's HTTP side answers some questions while its scheduler waits for a transfer that never comes; this
        asks the scheduler. An engine that is paused stays so.

        Args:
            timeout_s: deadline of each question; null: that of control calls.
        """
        if self._has_sessions is not False:
            status, raw = self._send("/end_weight_update", {}, timeout_s)
            if status not in (400, 404):  # none is open; there is no such thing
                self._check("/end_weight_update", status, raw)
        status, raw = self._send("/flush_cache", {}, timeout_s)
        if status != 400:  # requests run
            self._check("/flush_cache", status, raw)

    def pause(self, mode: str) -> None:
        """Stops generation; returns when nothing is being computed.

        Args:
            mode: ``finish`` lets running requests end, as long as weight calls may take, and treats what has begun
                meanwhile as ``retract``. ``in_place`` holds running requests with their KV cache, ``retract`` sends
                them back to the queue to be prefilled anew, ``abort`` ends them.
        """
        if mode not in PAUSE_MODES:
            raise ValueError(f"pause mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")
        if mode == "finish":
            self._await_idle()
            mode = "retract"
        if mode != "in_place":
            # A scheduler that is paused keeps its last, finished batch and refuses to flush because of it. A flush
            # while it still runs clears that batch; an engine that is busy refuses this one, which is no matter.
            self._send("/flush_cache", {})
        self._post("/pause_generation", {"mode": mode})
        self._pause_mode = mode

    def resume(self) -> None:
        """Lets generation go on; harmless when nothing is paused."""
        self._post("/continue_generation", {})
        self._pause_mode = None

    def begin_update(self) -> None:
        """Opens a weight update; servers before 0.5.21 have no such call, which is found out once."""
        self._session_call("/begin_weight_update", {"selector": "all"})

    def end_update(self) -> None:
        """Closes a weight update."""
        self._session_call("/end_weight_update", {})

    def init_group(
        self, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Makes the server's ranks join a process group; blocks until all of the group's ranks have come.

        Engine rank i becomes rank ``rank_offset + i``. A rendezvous that the others never join blocks the server's
        scheduler for half an hour: after an error here, restart the server.
        """
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._post("/init_weights_update_group", body)

    def destroy_group(self, group_name: str) -> None:
        """Makes the server's ranks leave a process group."""
        self._post("/destroy_weights_update_group", {"group_name": group_name})

    def update_from_distributed(
        self, metas: Sequence[TensorMeta], *, group_name: str, weight_version: int | None
    ) -> None:
        """Receives one flattened bucket: one uint8 broadcast from rank 0 of the tensors in the order of ``metas``.

        Args:
            metas: names, dtypes and shapes.
            group_name: of `init_group`.
            weight_version: set on success; None leaves the version (all buckets but the last).
        """
        body = {
            "names": [meta.name for meta in metas],
            "dtypes": [meta.dtype for meta in metas],
            "shapes": [list(meta.shape) for meta in metas],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "weight_version": None if weight_version is None else str(weight_version),
            **NO_FLUSH,
        }
        self._post("/update_weights_from_distributed", body)

    def update_from_tensors(self, payloads: Sequence[str], *, load_format: str) -> None:
        """Hands each tensor-parallel rank its own payload, for a loader that the server was started with.

        A loader that the server does not know ends the server: see `ServerInfo.weight_loaders`.

        Args:
            payloads: by rank, base64 of a pickled list of (name, tensor).
            load_format: dotted path of the loader.
        """
        body = {"serialized_named_tensors": list(payloads), "load_format": load_format, **NO_FLUSH}
        self._post("/update_weights_from_tensor", body)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Gives the GPU memory behind the tags (``weights``, ``kv_cache``) back; an engine that works must not.

        What lies in it is lost. Without SGLang's ``--enable-memory-saver`` nothing is given back.
        """
        self._post("/release_memory_occupation", {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Takes the memory again; weights and cache in it are undefined."""
        self._post("/resume_memory_occupation", {"tags": list(tags)})

    def update_from_disk(self, path: str, *, weight_version: int) -> None:
        """Loads all weights from a Hugging Face folder that the server can read.

        An engine that is not paused is, around this, with its requests retracted; cached prefixes are dropped unless
        requests are held in place.
        """
        running = self._pause_mode is None
        if running:
            self.pause("retract")
        body = {"model_path": path, "weight_version": str(weight_version), **NO_FLUSH}
        self._post("/update_weights_from_disk", body)
        if self._pause_mode != "in_place":
            self.flush_cache()
        if running:
            self.resume()

    def set_weight_version(self, version: int) -> None:
        """Sets the version without touching weights or requests."""
        self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def weight_version(self) -> str:
        """The version the server reports, ``"0"`` on local servers that have had no update."""
        return str(_get_json(self.url, "/model_info", self._control_timeout_s)["weight_version"])

    def weights_checksum(self) -> str:
        """A checksum of all weights as the engine holds them: equal exactly when bits, names and layout are equal."""
        answer = self._post("/weights_checker", {"action": "checksum"})
        return str(answer["per_engine_checksum"])

    def weights_checksums(self, *, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        """Checksum of every parameter on every tensor-parallel rank, by name; 16 hexadecimal digits each.

        Args:
            skip: parameters to leave out; servers that cannot do so tell all.
        """
        answer = self._post("/weights_checker", {"action": "checksum", "skip_tensor_list": list(skip)})
        try:
            return [rank["checksums"] for rank in sorted(answer["ranks"], key=_tp_rank)]
        except (KeyError, TypeError, IndexError) as error:
            raise EngineError(f"POST {self.url}/weights_checker: no checksums: {error!r}", url=self.url) from error

    def prompt_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Log-probs (nats, temperature 1) of all tokens of a prompt but the first."""
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = self._post("/generate", body)
        try:
            return [float(entry[0]) for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise EngineError(f"POST {self.url}/generate: no log-probs: {error!r}", url=self.url) from error

    def flush_cache(self) -> None:
        """Drops cached prefixes, once the last requests of clients that hung up have ended.

        Old servers (0.5.17) refuse while retracted requests wait in the queue; those are then aborted, as prefixes of
        old weights must not be served: their clients get what there is, and ask again.

        Raises:
            EngineError: requests run on, or are held in place.
        """
        started = time.monotonic()
        aborted = False
        while True:
            status, raw = self._send("/flush_cache", {})
            waited = time.monotonic() - started
            if status != 400 or self._pause_mode == "in_place" or waited > FLUSH_PATIENCE_S:
                self._check("/flush_cache", status, raw)
                return
            if self._pause_mode == "retract" and not aborted and waited > RETRACT_PATIENCE_S:
                self._check("/abort_request", *self._send("/abort_request", {"abort_all": True}))
                aborted = True
            time.sleep(0.05)

    def _await_idle(self) -> None:
        """Returns once no request runs or waits, or when it has taken as long as weight calls may."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            status, raw = self._send("/flush_cache", {})
            if status != 400:
                self._check("/flush_cache", status, raw)
                return
            time.sleep(0.05)

    def _session_call(self, path: str, body: dict[str, Any]) -> None:
        if self._has_sessions is False:
            return
        status, raw = self._send(path, body)
        if status == 404 and self._has_sessions is None:
            self._has_sessions = False
            return
        self._check(path, status, raw)
        self._has_sessions = True

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, raw = self._send(path, body)
        return self._check(path, status, raw)

    def _send(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> tuple[int, bytes]:
        if timeout_s is None:
            timeout_s = self._timeout_s if path in WEIGHT_CALLS else self._control_timeout_s
        try:
            return wire.request(self.url, "POST", path, body=body, timeout_s=timeout_s)
        except wire.WireError as error:
            kind = EngineSilentError if isinstance(error.__cause__, TimeoutError) else EngineError
            raise kind(str(error), url=self.url) from error

    def _check(self, path: str, status: int, raw: bytes) -> dict[str, Any]:
        answer = _parse(raw)
        if status != 200 or answer.get("success") is False:
            raise EngineError(f"POST {self.url}{path}: HTTP {status}: {_message(answer, raw)}", url=self.url)
        if not answer and path not in TEXT_ANSWERS:
            message = f"POST {self.url}{path}: HTTP 200 with an answer that is not JSON: {raw[:200]!r}"
            raise EngineError(message, url=self.url)
        return answer


WEIGHT_CALLS = (
    "/init_weights_update_group",
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/update_weights_from_disk",
    "/weights_checker",
    "/generate",
)
"""Endpoints whose answer takes as long as weights take."""
TEXT_ANSWERS = (
    "/flush_cache",
    "/abort_request",
    "/freeze_gc",
    "/release_memory_occupation",
    "/resume_memory_occupation",
)
"""Endpoints that answer in plain text or nothing."""


def _tp_rank(rank: dict[str, Any]) -> int:
    """Of one entry of weights_checker; its parallelism_info is a list from 0.5.21 on, an object before."""
    info = rank["parallelism_info"]
    return int((info[0] if isinstance(info, list) else info)["tp_rank"])


def _get_json(url: str, path: str, timeout_s: float) -> dict[str, Any]:
    try:
        status, raw = wire.request(url, "GET", path, timeout_s=timeout_s)
    except wire.WireError as error:
        raise EngineError(str(error)) from error
    answer = _parse(raw)
    if status != 200 or not answer:
        raise EngineError(f"GET {url}{path}: HTTP {status}: {_message(answer, raw)}")
    return answer


def _parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in an answer; empty when there is none."""
    try:
        answer = json.loads(raw)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _message(answer: dict[str, Any], raw: bytes) -> str:
    """The server's own words, in whichever of its forms."""
    for candidate in (answer.get("message"), answer.get("error"), answer.get("detail")):
        if isinstance(candidate, dict):
            candidate = candidate.get("message")
        if candidate:
            return str(candidate)
    return raw[:500].decode(errors="replace") or "empty answer"
