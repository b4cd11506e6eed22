"""A plain client for the protocol's tests: one request, or one request caught while it runs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import requests

FORCED = [87, 111, 114, 108, 100]

ENDLESS = {"max_new_tokens": 3500, "temperature": 1.0, "ignore_eos": True}
"""Takes many seconds: tests catch it half-way and then abort it, so that none depends on speed."""


def post(url: str, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(url + path, json=body, timeout=300.0)


def generate(url: str, input_ids: Any, sampling_params: Any, **fields: Any) -> Any:
    """The JSON answer of /generate with log-probs."""
    body = {"input_ids": input_ids, "sampling_params": sampling_params, "return_logprob": True, **fields}
    response = post(url, "/generate", body)
    assert response.status_code == 200, response.text
    return response.json()


def versions_of(answer: dict[str, Any]) -> list[str] | None:
    """Weight versions under which the tokens came, in order; None from servers before 0.5.21, which do not tell."""
    spans = answer["meta_info"].get("weight_versions")
    return None if spans is None else [span["version"] for span in spans]


def forced_logprobs(url: str, prompt: list[int]) -> np.ndarray:
    """float [5] log-probs of the tokens `FORCED` after a prompt: they show the weights, sampling apart."""
    answer = generate(url, prompt + FORCED, {"max_new_tokens": 1, "temperature": 0.0}, logprob_start_len=0)
    return np.array([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][len(prompt) :]])


class RunningRequest:
    """A streamed request that has produced its first tokens when the constructor returns."""

    def __init__(self, url: str, input_ids: list[int]) -> None:
        self.url = url
        self.rid = uuid.uuid4().hex
        body = {"rid": self.rid, "input_ids": input_ids, "sampling_params": ENDLESS, "return_logprob": True}
        self._response = requests.post(url + "/generate", json={**body, "stream": True}, stream=True, timeout=300.0)
        assert self._response.status_code == 200
        self._chunks = self._read()
        self.latest: dict[str, Any] = next(self._chunks)
        """The answer so far."""

    def read_until_version(self, version: str) -> None:
        """Returns once a token has come under a weight version."""
        while self.latest["meta_info"]["weight_version"] != version:
            self.latest = next(self._chunks)
        # that one may carry the last token of the version before, delivered late
        self.latest = next(self._chunks)

    def abort(self) -> dict[str, Any]:
        """Ends the request; the complete answer."""
        response = requests.post(self.url + "/abort_request", json={"rid": self.rid}, timeout=300.0)
        assert (response.status_code, response.content) == (200, b"")
        return self.rest()

    def rest(self) -> dict[str, Any]:
        """The complete answer of a request that has ended."""
        for chunk in self._chunks:
            self.latest = chunk
        return self.latest

    def hang_up(self) -> None:
        """Closes the connection before the answer is complete."""
        self._response.close()

    def _read(self) -> Iterator[dict[str, Any]]:
        for line in self._response.iter_lines():
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))
