"""How the fake server generates: requests token by token, held, retracted or aborted as the real one does."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

SAMPLING_FIELDS = {
    "max_new_tokens", "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "min_new_tokens", "stop", "stop_token_ids", "stop_regex", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "logit_bias", "sampling_seed",
    "json_schema", "regex", "ebnf", "custom_params",
}  # fmt: skip

NextToken = Callable[[Sequence[int], int, int], tuple[int, float]]
"""(token ids so far, prompt included; sample index; weight updates so far) -> (token id, log-prob)."""


def hashed_token(context: Sequence[int], sample: int, updates: int, *, vocab_size: int = 100) -> tuple[int, float]:
    """A pseudo-random token id in [2, vocab_size) and a log-prob in (-4, 0), fixed by the arguments."""
    digest = hashlib.blake2b(repr((list(context), sample, updates)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    return 2 + number % (vocab_size - 2), -((number >> 32) % 4000) / 1000.0 - 1e-3


@dataclass(kw_only=True, slots=True)
class Running:
    """A request being answered."""

    rid: str
    aborted: bool = False
    spans: list[list[Any]] = field(default_factory=list)
    """[weight version, start, end) of the tokens so far."""


class Generation:
    """The generating half of `FakeSGLang`."""

    next_token: NextToken
    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], list[int]]
    eos_token_id: int | None
    token_delay_s: float
    version_spans: bool
    session_endpoints: bool
    weight_version: str
    updates: int
    max_in_flight: int
    pause_mode: str | None
    _running: dict[str, Running]
    _unpaused: asyncio.Event
    _in_flight: int

    async def _on_generate(self, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            return await self._generate(body, request)
        finally:
            self._in_flight -= 1

    async def _generate(self, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
        if ("text" in body) == ("input_ids" in body):
            return bad_request("Either text or input_ids should be provided, but not both.")
        given = body["text"] if "text" in body else body["input_ids"]
        batched = isinstance(given, list) and bool(given) and isinstance(given[0], (list, str))
        prompts = given if batched else [given]
        params = body.get("sampling_params") or {}
        params_of = params if isinstance(params, list) else [params] * len(prompts)
        refusal = _refusal(params_of)
        if refusal is not None:
            return refusal
        rid = body.get("rid")
        answers: list[AsyncIterator[dict[str, Any]]] = []
        for row, (prompt, p) in enumerate(zip(prompts, params_of, strict=True)):
            ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for sample in range(p.get("n", 1)):
                own = rid[row] if isinstance(rid, list) else f"{rid}_{row}" if rid and batched else rid
                # with n > 1 the real server makes up new ids, so that an abort by rid misses
                name = own if own and p.get("n", 1) == 1 else uuid.uuid4().hex
                answers.append(self._respond(ids, p, sample, name, bool(body.get("return_logprob"))))
        if body.get("stream"):
            assert len(answers) == 1, "the fake streams single requests only"
            return await _stream(answers[0], request)
        last = await asyncio.gather(*(_last(answer) for answer in answers))
        return web.json_response(last if len(last) > 1 or batched else last[0])

    async def _respond(
        self, prompt: list[int], params: dict[str, Any], sample: int, rid: str, with_logprobs: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The answer so far after every token, at last with its finish reason."""
        started = time.monotonic()
        running = self._running[rid] = Running(rid=rid)
        limit = params.get("max_new_tokens", 128)
        stops = params.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        stop_ids = set(params.get("stop_token_ids") or [])
        if self.eos_token_id is not None and not params.get("ignore_eos"):
            stop_ids.add(self.eos_token_id)
        variant = 0 if params.get("temperature", 1.0) == 0.0 else sample
        output: list[int] = []
        logprobs: list[float] = []

        def answer(reason: dict[str, Any] | None) -> dict[str, Any]:
            text = self.decode([t for t in output if t != self.eos_token_id])
            if reason is not None and isinstance(reason.get("matched"), str) and not params.get("no_stop_trim"):
                text = text[: text.index(reason["matched"])]
            meta = self._meta(running, reason, len(prompt), len(output), time.monotonic() - started)
            if with_logprobs:
                meta["output_token_logprobs"] = [[lp, t, None] for lp, t in zip(logprobs, output, strict=True)]
                meta["input_token_logprobs"] = []
            return {"text": text, "output_ids": list(output), "meta_info": meta}

        try:
            while len(output) < limit:
                # a retracted request is in the queue, from which an abort takes it at once
                while not (self._unpaused.is_set() or (running.aborted and self.pause_mode == "retract")):
                    await asyncio.sleep(0.001)
                await asyncio.sleep(self.token_delay_s)
                if running.aborted:
                    yield answer({"type": "abort", "message": "Abort in decode"})
                    return
                if not self._unpaused.is_set():
                    continue
                token, logprob = self.next_token([*prompt, *output], variant, self.updates)
                self._extend_span(running, len(output))
                output.append(token)
                logprobs.append(logprob)
                matched = next((s for s in stops if s in self.decode(output)), None)
                if token in stop_ids or matched is not None:
                    yield answer({"type": "stop", "matched": token if token in stop_ids else matched})
                    return
                if len(output) < limit:
                    yield answer(None)
            yield answer({"type": "length", "length": limit})
        finally:
            del self._running[rid]

    def _meta(
        self, running: Running, reason: dict[str, Any] | None, num_prompt: int, num_output: int, latency_s: float
    ) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": running.rid,
            "finish_reason": reason,
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "cached_tokens": 0,
            "weight_version": self.weight_version,
            "num_retractions": 0,
            "e2e_latency": latency_s,
        }
        if self.version_spans:
            meta["weight_versions"] = [dict(zip(("version", "start", "end"), s, strict=True)) for s in running.spans]
        return meta

    def _extend_span(self, running: Running, position: int) -> None:
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
        # 0.5.17 refuses also while retracted requests wait in the queue
        if self._running and (self.pause_mode != "retract" or not self.session_endpoints):
            return web.Response(text="Flush cache failed.\n", status=400)
        return web.Response(text="Cache flushed.\n")


def _refusal(params_of: Sequence[dict[str, Any]]) -> web.Response | None:
    for p in params_of:
        if set(p) - SAMPLING_FIELDS:
            return web.Response(text="Internal Server Error", status=500)
        if p.get("temperature", 1.0) < 0.0:
            return bad_request(f"temperature must be a non-negative finite number, got {p['temperature']}.")
        if not 0.0 < p.get("top_p", 1.0) <= 1.0:
            return bad_request(f"top_p must be in (0, 1], got {p['top_p']}.")
    return None


async def _last(answers: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    async for last in answers:  # noqa: B007 - the last one is wanted
        pass
    return last


async def _stream(answers: AsyncIterator[dict[str, Any]], request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    async for answer in answers:
        await response.write(b"data: " + json.dumps(answer).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


def bad_request(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)
