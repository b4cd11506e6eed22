"""Which servers requests go to: load, health, and the way out of and back into routing.

A server leaves the routing when it fails, holds older weights than asked for, or says nothing for too long. It is
probed and comes back when it is healthy and its weights are right. Whether they are, its own version number tells,
unless its process has ended: then it was started with other weights, under whatever number, and comes back when the
trainer has synced it and says so (`ServerRouting.use`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import aiohttp
import orjson

from megatron_rlvr.rollout.answer import MalformedAnswerError, parse_version
from megatron_rlvr.rollout.messages import RolloutError, ServerTrouble, TroubleKind

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.25, 8.0
LOOKS_PER_SILENCE = 4
"""How often, within the time for which a server may be silent, it is looked at."""

Get = Callable[[str, float | None], Awaitable[tuple[int, bytes]]]
"""(URL, seconds or None for the usual limit) -> HTTP status and body."""


class Server:
    """One address and what is known about it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.load = 0
        """Responses under way or planned here."""
        self.failure: str | None = None
        """Why it is out of routing; None while it is in."""
        self.lost = False
        """Whether its process may have ended: whoever answers at the address now holds unknown weights."""
        self.num_failures = 0
        """How often it left the routing without a good answer in between."""
        self.last_answer = self.last_look = time.monotonic()
        self.requests: set[asyncio.Timeout] = set()
        """Of the attempts under way; each can be cut short."""


class Placement:
    """The responses of one prompt, planned on one server; entering it counts them as that server's load."""

    def __init__(self, server: Server, count: int) -> None:
        self.server = server
        self._count = count
        self._left = 0

    def __enter__(self) -> Placement:
        self._left = self._count
        self.server.load += self._left
        return self

    def release(self) -> None:
        """One response is done (or goes elsewhere)."""
        if self._left:
            self._left -= 1
            self.server.load -= 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.server.load -= self._left
        self._left = 0


class ServerRouting:
    """The servers of a client, and the router before them if there is one.

    Args:
        urls: base URLs of the servers.
        router_url: base URL of sglang-router.
        get: asks an address.
        recovery_s: how long a request waits, in seconds, while no server is healthy.
        silence_s: after how many seconds without any answer, its health check included, requests are taken away from
            a server that has some.
        on_trouble: told, again and again while it lasts, of servers that the trainer must bring weights to and of those
            that say nothing. None where nobody brings weights: then a lost server that is healthy again is used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        router_url: str | None,
        get: Get,
        recovery_s: float,
        silence_s: float,
        on_trouble: Callable[[ServerTrouble], None] | None,
    ) -> None:
        if not urls:
            raise ValueError("rollout.urls must name at least one server, got none")
        self.min_version = 0
        """Lowest policy version whose tokens are taken."""
        self.servers = [Server(url) for url in urls]
        self.router = None if router_url is None else Server(router_url)
        self.recovered = asyncio.Event()
        self._get, self._on_trouble = get, on_trouble
        self._recovery_s, self._silence_s = recovery_s, silence_s
        self._watching = True
        self._watcher: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends all probes."""
        tasks = [*self._background, *([self._watcher] if self._watcher is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def spawn(self, work: Any) -> None:
        """Runs something beside the requests, until `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def settle(self) -> None:
        """Waits for what runs beside the requests."""
        await asyncio.gather(*self._background)

    # choice

    def place(self, count: int) -> Placement:
        """Plans ``count`` responses of one prompt on the router or the least loaded healthy server."""
        if self.router is not None and self.router.failure is None:
            return Placement(self.router, count)
        return Placement(self._pick(avoid=None), count)

    def _pick(self, *, avoid: Server | None) -> Server:
        """Least loaded healthy server, not ``avoid`` if there is another; of all servers if none is healthy."""
        healthy = [server for server in self.servers if server.failure is None]
        return min(healthy or self.servers, key=lambda server: (server is avoid, server.load))

    async def healthy(self, preferred: Server, *, avoid: Server | None) -> Server:
        """``preferred`` while it is in routing, else another, waiting at most ``recovery_s`` for one.

        Raises:
            RolloutError: there is none; names all and why they are out.
        """
        deadline = time.monotonic() + self._recovery_s
        while True:
            if preferred is not avoid and preferred.failure is None:
                return preferred
            server = self._pick(avoid=avoid)
            if server.failure is None:
                return server
            self.recovered.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self.recovered.wait()
            except TimeoutError:
                down = "; ".join(f"{s.url}: {s.failure}" for s in self.servers)
                raise RolloutError(f"no server has been healthy for {self._recovery_s:g} s ({down})") from None

    # out and in

    def use(self, urls: Sequence[str], *, router_url: str | None) -> None:
        """These servers, and no others, from now on: the trainer has just brought the weights to all of them.

        Requests under way go on, except at servers that are left out: those are repeated elsewhere.
        """
        known = {server.url: server for server in self.servers}
        kept = [known.get(url.rstrip("/")) or Server(url) for url in urls]
        if not kept:
            raise ValueError("rollouts need at least one server, got none")
        self.servers = kept
        if router_url is None or self.router is None or self.router.url != router_url.rstrip("/"):
            self.router = None if router_url is None else Server(router_url)
        for server in kept:
            server.lost = False
            self._let_in(server)
        for gone in known.values():
            if gone not in kept:
                gone.failure = "is not among the run's servers any more"
                self._cut_off(gone)

    def hold(self, held: bool) -> None:
        """While servers are held by a weight sync their silence means nothing."""
        self._watching = not held
        for server in self.servers:
            server.last_answer = time.monotonic()

    def take_out(self, server: Server, reason: str, *, lost: bool = False) -> None:
        """Out of routing until it is healthy; probes begin.

        Args:
            lost: its process may be gone.
        """
        # A router holds no weights.
        server.lost = server.lost or (lost and server is not self.router)
        if server.failure is None:
            server.num_failures += 1
            logger.warning("server %s leaves the routing: %s", server.url, reason)
            self.spawn(self._probe(server))
        server.failure = reason

    def answered(self, server: Server) -> None:
        """A good answer came."""
        server.num_failures = 0
        server.last_answer = time.monotonic()

    def stale(self, version: int) -> str | None:
        """Why weights of this version are not good enough; None if they are.

        A server that was restarted holds the weights it was launched with until the next sync.
        """
        if version >= self.min_version:
            return None
        return f"holds weights of policy version {version}, older than {self.min_version}"

    def _let_in(self, server: Server) -> None:
        if server.failure is not None:
            logger.warning("server %s is back in the routing", server.url)
        server.failure = None
        server.last_answer = time.monotonic()
        self.recovered.set()

    def _cut_off(self, server: Server) -> None:
        """Ends the attempts under way there, which are then repeated elsewhere."""
        now = asyncio.get_running_loop().time()
        for request in server.requests:
            request.reschedule(now)

    async def _probe(self, server: Server) -> None:
        """Returns when the server is in routing, or is nobody's any more."""
        # One that answers its health check and fails its requests stays out longer each time.
        delay = min(FIRST_BACKOFF_S * 2 ** max(0, server.num_failures - 1), LAST_BACKOFF_S)
        if server.num_failures > 1:
            await asyncio.sleep(delay)
        while server.failure is not None and (server is self.router or server in self.servers):
            trouble = await self._trouble(server)
            if server.failure is None:
                return  # `use` was faster
            if trouble is None:
                self._let_in(server)
                return
            server.failure = trouble
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_BACKOFF_S)

    async def _trouble(self, server: Server) -> str | None:
        """Why the server cannot be used, or None."""
        try:
            status, _ = await self._get(server.url + "/health", None)
            if status != 200:
                return f"/health answers HTTP {status}"
            if server is self.router:
                return None
            status, body = await self._get(server.url + "/model_info", None)
            if status == 404:
                status, body = await self._get(server.url + "/get_model_info", None)
            if status != 200:
                return f"/model_info answers HTTP {status}"
            version = parse_version(orjson.loads(body)["weight_version"])
        except (aiohttp.ClientError, OSError) as error:
            return reason_of(error)
        except (ValueError, KeyError, TypeError, MalformedAnswerError) as error:
            return f"/model_info makes no sense: {reason_of(error)}"
        stale = self.stale(version)
        if self._on_trouble is None:
            return stale
        if stale is None and server.lost:
            stale = "was started anew: its weights are not known"
        if stale is not None:
            self._on_trouble(ServerTrouble(url=server.url, kind=TroubleKind.stale, reason=stale))
        return stale

    # silence

    def watch(self) -> None:
        """From now on takes requests away from servers that say nothing, not even that they are healthy.

        The time limit of a request cannot do it: a response may well take that long.
        """
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._silence_s / LOOKS_PER_SILENCE)
            routed = self.router is not None and bool(self.router.requests)
            busy = [server for server in self.servers if server.failure is None and (server.requests or routed)]
            await asyncio.gather(*map(self._look_at, busy))

    async def _look_at(self, server: Server) -> None:
        pause = self._silence_s / LOOKS_PER_SILENCE
        if time.monotonic() - server.last_look > 3 * pause:
            server.last_answer = time.monotonic()  # it had nothing to do since
        server.last_look = time.monotonic()
        if not self._watching or time.monotonic() - server.last_answer < pause:
            return
        try:
            # Answers when any token has come, on a busy server too; asks the scheduler, which /health does not.
            status, _ = await self._get(server.url + "/health_generate", pause)
        except (aiohttp.ClientError, OSError) as error:
            logger.info("server %s does not say that it is healthy: %s", server.url, reason_of(error))
        else:
            if status == 200:
                server.last_answer = time.monotonic()
        if not self._watching or time.monotonic() - server.last_answer < self._silence_s or server.failure is not None:
            return
        reason = f"has said nothing for {self._silence_s:g} s"
        self.take_out(server, reason)
        self._cut_off(server)
        if self.router is not None:
            self._cut_off(self.router)  # it does not say which of its requests that server has
        if self._on_trouble is not None:
            self._on_trouble(ServerTrouble(url=server.url, kind=TroubleKind.silent, reason=reason))


def reason_of(error: BaseException) -> str:
    """An exception's text, or its name where it has none."""
    return str(error) or type(error).__name__
