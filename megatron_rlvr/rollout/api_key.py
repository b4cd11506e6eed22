"""The key that servers want from whoever talks to them, read from a file, and nowhere else to be seen.

It is on no command line, in no environment, configuration, log or metric: processes get the file's name. SGLang's own
``--api-key`` would show it in the process list and in the line of settings that every server logs at its start.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

SHORTEST = 16
OPEN_PATHS = ("/health",)
"""What a router asks of servers without a key: whether they are alive."""

Scope = MutableMapping[str, Any]
AsgiApp = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

_key: str | None = None


def read_key(path: str | Path) -> str:
    """The key in a file of one line.

    Raises:
        ValueError: there is no such file, others can read it, or it holds no key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"rollout.api_key_file must be an existing file, got {str(path)!r}")
    if path.stat().st_mode & 0o077:
        raise ValueError(
            f"rollout.api_key_file must be readable by its owner alone (chmod 600), got mode "
            f"{path.stat().st_mode & 0o777:o} of {str(path)!r}"
        )
    key = path.read_text(encoding="utf-8", errors="replace").strip()
    if len(key) < SHORTEST or not (key.isascii() and key.isprintable()) or " " in key:
        # Not the content: that is the secret.
        raise ValueError(
            f"rollout.api_key_file must hold one line of at least {SHORTEST} printable characters, got "
            f"{len(key)} characters in {str(path)!r}"
        )
    return key


def use_key_file(path: str | Path | None) -> None:
    """Sends the key with every request to servers that this process makes from now on; None: no key.

    Raises:
        ValueError: as `read_key`.
    """
    global _key
    _key = None if path is None else read_key(path)


def current_key() -> str | None:
    """The key of this process's servers, for a router that has to send it on."""
    return _key


def headers() -> dict[str, str]:
    """HTTP headers that carry the key; empty without one."""
    return {} if _key is None else {"Authorization": f"Bearer {_key}"}


def check_listening(host: str, api_key_file: str | None) -> None:
    """Refuses servers that other machines could use without a key.

    Raises:
        ValueError: `host` is no loopback address and there is no key; or the key's file is not as it must be.
    """
    if api_key_file is not None:
        read_key(api_key_file)
    elif not is_loopback(host):
        raise ValueError(
            f"rollout.api_key_file must be given while rollout.server.host is {host!r}, which other machines reach: "
            "whoever reaches a server could use it and change its weights (make one: "
            "(umask 077; openssl rand -hex 32 > FILE))"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        pass  # a name
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ip_address(str(entry[4][0])).is_loopback for entry in found)


class RequireKey:
    """ASGI middleware: answers 401 to requests without the key.

    Args:
        app: what is protected.
        key: what ``Authorization: Bearer`` must carry.
    """

    def __init__(self, app: AsgiApp, *, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        start = {"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]}
        await send(start)
        await send({"type": "http.response.body", "body": b'{"error":{"message":"the API key is missing or wrong"}}'})

    def _knows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return secrets.compare_digest(given, self._expected)
