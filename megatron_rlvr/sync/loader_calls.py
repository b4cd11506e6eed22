"""The trainer's side of `engine_loader`: messages to all engine ranks and what they report back."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlvr.sync.engine_loader import LOADER
from megatron_rlvr.sync.interfaces import Engine, EngineError
from megatron_rlvr.sync.payload import pack_payload
from megatron_rlvr.sync.process_group import open_store

_REPORT_PATIENCE = timedelta(seconds=30)
"""For a rank's report after its server has answered; other ranks of the server may still be at work."""

OF_OTHERS = ("RuntimeError", "Dist")
"""What torch raises in a rank whose peer is gone."""

Calls = list[tuple[Engine, Future[None], list[str]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportAddress:
    """Where loaders report; every trainer rank may know it.

    Example:
        >>> address.message("report7", {"action": "receive"})
    """

    name: str
    """Of the transfer; loaders keep their state under it."""
    host: str
    port: int
    timeout_s: float
    """Bound of waits inside the engines."""

    def message(self, key: str, fields: Mapping[str, Any]) -> str:
        """A message whose report goes to `key`."""
        return json.dumps({**asdict(self), "report": key, **fields}, separators=(",", ":"))


class LoaderCalls:
    """Talks to the loaders of all engines, for the rank that controls the servers.

    Args:
        engines: every server.
        host: address under which the engines reach this process.
        timeout_s: bound of waits inside the engines.

    Example:
        >>> calls = LoaderCalls(engines, host="127.0.0.1", timeout_s=60)
        >>> reports = calls.wait(calls.post({"action": "receive"}))
    """

    def __init__(self, engines: Sequence[Engine], *, host: str, timeout_s: float) -> None:
        self.engines = list(engines)
        self.store = open_store(host, timeout_s=timeout_s)
        self.address = ReportAddress(
            name=f"megatron_rlvr_{uuid.uuid4().hex}", host=host, port=self.store.port, timeout_s=timeout_s
        )
        self._threads = ThreadPoolExecutor(max(1, len(self.engines)), thread_name_prefix="loader")
        self._numbers = itertools.count()

    def post(self, common: Mapping[str, Any], by_rank: Sequence[Sequence[Mapping[str, Any]]] | None = None) -> Calls:
        """Sends every engine rank its message, in the background.

        Args:
            common: fields that are the same for all.
            by_rank: by engine and tensor-parallel rank, further fields.
        """
        keys = [[f"report{next(self._numbers)}" for _ in range(engine.num_ranks)] for engine in self.engines]
        nothing = torch.empty(0, dtype=torch.uint8)
        payloads = [
            [
                pack_payload(self.address.message(key, {**common, **(by_rank[i][j] if by_rank else {})}), nothing)
                for j, key in enumerate(of_engine)
            ]
            for i, of_engine in enumerate(keys)
        ]
        return self.post_payloads(payloads, keys)

    def post_payloads(self, payloads: Sequence[Sequence[str]], keys: Sequence[Sequence[str]]) -> Calls:
        """Sends every engine rank a payload that was made elsewhere.

        Args:
            payloads: by engine and tensor-parallel rank.
            keys: those of the messages in them.
        """
        return [
            (engine, self._threads.submit(engine.update_from_tensors, list(own), load_format=LOADER), list(own_keys))
            for engine, own, own_keys in zip(self.engines, payloads, keys, strict=True)
        ]

    def wait(self, calls: Calls) -> dict[str, list[dict[str, Any]]]:
        """Reports of all ranks by the server's address.

        Raises:
            EngineError: a server refused, or a rank of it failed; all of them are named, and the first one blamed that
                failed by itself.
        """
        reports: dict[str, list[dict[str, Any]]] = {}
        failures: list[str] = []
        blamed: list[str] = []
        for engine, reply, keys in calls:
            try:
                reply.result()
                reports[engine.url] = [self._report(key) for key in keys]
            except EngineError as error:
                failures.append(str(error))
                blamed.insert(0, engine.url)
            except (dist.DistError, RuntimeError) as error:
                failures.append(f"{engine.url}: its loader did not report: {error}")
                blamed.append(engine.url)
            else:
                errors = [
                    (rank, report["error"]) for rank, report in enumerate(reports[engine.url]) if "error" in report
                ]
                failures += [f"{engine.url} rank {rank}: {error}" for rank, error in errors]
                blamed += [engine.url for _, error in errors if not error.startswith(OF_OTHERS)]
        if failures:
            raise EngineError("; ".join(failures), url=blamed[0] if blamed else None)
        return reports

    def _report(self, key: str) -> dict[str, Any]:
        self.store.wait([key], _REPORT_PATIENCE)
        report = json.loads(self.store.get(key))
        self.store.delete_key(key)
        return report

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
