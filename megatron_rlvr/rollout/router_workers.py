"""Tells a running sglang-router which servers it may send requests to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote

from megatron_rlvr.rollout import wire
from megatron_rlvr.rollout.api_key import current_key
from megatron_rlvr.rollout.messages import RolloutError

TIMEOUT_S = 30.0


def worker_urls(router_url: str) -> dict[str, str]:
    """The router's workers: id by URL."""
    answer = _call(router_url, "GET", "/workers", None)
    return {worker["url"]: worker["id"] for worker in answer["workers"]}


def use_workers(router_url: str, urls: Sequence[str]) -> None:
    """Takes all other servers out of the router, and brings these in.

    The router's own health checks would let a server back that was started anew, with the weights of long ago.

    Raises:
        RolloutError: the router does not answer or refuses; says what.
    """
    known = worker_urls(router_url)
    for url, worker_id in known.items():
        if url not in urls:
            _call(router_url, "DELETE", f"/workers/{quote(worker_id, safe='')}", None)
    for url in urls:
        if url not in known:
            # The router asks a new server about itself; it sends requests on with the key of whoever sent them.
            key = current_key()
            _call(router_url, "POST", "/workers", {"url": url} | ({} if key is None else {"api_key": key}))


def _call(router_url: str, method: str, path: str, body: dict[str, str] | None) -> dict:
    try:
        status, raw = wire.request(router_url, method, path, body=body, timeout_s=TIMEOUT_S)
    except wire.WireError as error:
        raise RolloutError(f"router: {error}") from error
    if status not in (200, 202):
        raise RolloutError(f"router {router_url}: {method} {path}: HTTP {status}: {raw[:200]!r}")
    try:
        answer = json.loads(raw)
    except ValueError as error:
        raise RolloutError(f"router {router_url}: {method} {path}: not JSON: {raw[:200]!r}") from error
    return answer
