"""One HTTP request with a deadline, without proxies, pools or retries: control calls to servers on known hosts."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from megatron_rlvr.rollout import api_key


class WireError(OSError):
    """No proper HTTP answer came back in time."""


def request(
    url: str, method: str, path: str, *, body: dict[str, Any] | None = None, timeout_s: float
) -> tuple[int, bytes]:
    """HTTP status and body.

    Args:
        url: ``http://host:port`` of the server.
        method: GET or POST.
        path: with its leading slash.
        body: sent as JSON.
        timeout_s: seconds for the connection, and for each wait for bytes after it.

    Raises:
        WireError: refused, dropped, garbled, or out of time; says which.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"a server URL must look like http://host:port, got {url!r}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    payload = None if body is None else json.dumps(body).encode()
    headers = {"Connection": "close", **api_key.headers()} | (
        {} if payload is None else {"Content-Type": "application/json"}
    )
    try:
        connection.request(method, parts.path.rstrip("/") + path, body=payload, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError as error:
        raise WireError(f"{method} {url}{path}: no answer within {timeout_s:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise WireError(f"{method} {url}{path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
