"""The key of servers: its file, who needs one, and what is answered without it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.rollout import api_key
from megatron_rlvr.rollout.api_key import RequireKey, check_listening, is_loopback, read_key, use_key_file

KEY = "0123456789abcdef-secret"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(KEY + "\n")
    return path


@pytest.fixture(autouse=True)
def _no_key_afterwards() -> Iterator[None]:
    yield
    use_key_file(None)


def test_requests_carry_the_key(key_file: Path) -> None:
    assert api_key.headers() == {}
    use_key_file(key_file)
    assert api_key.headers() == {"Authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (KEY, 0o640, "owner alone .* mode 640"),
        (KEY, 0o604, "owner alone .* mode 604"),
        ("short", 0o600, "at least 16 .* got 5 characters"),
        (f"{KEY}\n{KEY}", 0o600, "one line"),
        ("", 0o600, "got 0 characters"),
    ],
)
def test_a_file_that_will_not_do_is_refused_without_its_content(
    key_file: Path, content: str, mode: int, message: str
) -> None:
    key_file.write_text(content)
    key_file.chmod(mode)
    with pytest.raises(ValueError, match=message) as refused:
        read_key(key_file)
    assert KEY not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout.api_key_file must be an existing file, got '.*/none'"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", os.uname().nodename + ".invalid"])
def test_servers_that_others_reach_need_a_key(host: str, key_file: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout.api_key_file must be given while rollout.server.host is .*" + host):
        check_listening(host, None)
    check_listening(host, str(key_file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host)
    check_listening(host, None)


@pytest.mark.parametrize(
    ("path", "authorization", "status"),
    [
        ("/generate", f"Bearer {KEY}", 200),
        ("/generate", f"Bearer {KEY}x", 401),
        ("/generate", KEY, 401),
        ("/generate", None, 401),
        ("/health", None, 200),
        ("/health_generate", None, 401),
        ("/health/../generate", None, 401),
    ],
)
def test_what_is_answered(path: str, authorization: str | None, status: int) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    given = [] if authorization is None else [(b"authorization", authorization.encode())]
    scope = {"type": "http", "path": path, "headers": given}
    asyncio.run(RequireKey(app, key=KEY)(scope, receive, send))
    assert sent[0]["status"] == status
