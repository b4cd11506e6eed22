"""A plain client for the protocol's tests: one request, or one request caught while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import requests

LONG = {"max_new_tokens": 200, "temperature": 1.0, "ignore_eos": True}
"""Takes half a second: long enough to be caught half-way."""


def post(url: str, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(url + path, json=body, timeout=60.0)


def generate(url: str, input_ids: Any, sampling_params: Any, **fields: Any) -> Any:
    """The JSON answer of /generate with log-probs."""
    body = {"input_ids": input_ids, "sampling_params": sampling_params, "return_logprob": True, **fields}
    response = post(url, "/generate", body)
    assert response.status_code == 200, response.text
    return response.json()


class RunningRequest:
    """A streamed request that has produced its first tokens when the constructor returns."""

    def __init__(self, url: str, input_ids: list[int], **fields: Any) -> None:
        body = {"input_ids": input_ids, "sampling_params": LONG, "return_logprob": True, "stream": True, **fields}
        self._response = requests.post(url + "/generate", json=body, stream=True, timeout=60.0)
        assert self._response.status_code == 200
        self._chunks = self._read()
        self.first: dict[str, Any] = next(self._chunks)
        """The answer so far, after the first tokens."""

    def finish(self) -> dict[str, Any]:
        """The complete answer."""
        last = self.first
        for last in self._chunks:  # noqa: B007 - the last one is wanted
            pass
        return last

    def hang_up(self) -> None:
        """Closes the connection before the answer is complete."""
        self._response.close()

    def _read(self) -> Iterator[dict[str, Any]]:
        for line in self._response.iter_lines():
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))
