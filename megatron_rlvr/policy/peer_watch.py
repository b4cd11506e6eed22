"""Ends a trainer rank soon after another one is gone or stands still, whatever it is waiting for.

A collective notices a dead rank when it runs next, on NCCL only after a watchdog's minutes; rank 0 may be waiting for
rollouts, and then notices nothing at all. Here every rank holds a connection to rank 0: the kernel closes it when the
process ends, however it ends. A node that vanishes is told by TCP's own keep-alives. A process that stands still
(stopped, or on a machine that hangs) keeps its connection and stops to send its beats, which a thread sends however
long the main thread computes.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from megatron_rlvr.policy.parallel import ParallelContext

CONNECT_TIMEOUT_S = 60.0
OWN_END_S = 1.5
"""For a rank to notice by itself, from a collective that fails, before it is interrupted."""
HARD_END_S = 20.0
"""For a rank to end in good order; then it ends without."""
KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A vanished node is noticed after 10 + 3 * 5 seconds."""
BEAT_S = 2.0
SILENCE_S = 300.0
"""A rank from which there was no beat for so long stands still. What a sync's servers may take is as long."""
LONGEST_NAP_S = 1.0
"""Of this rank's own watch: when all ranks were stopped together and go on, nobody was silent."""
BYE, GONE, BEAT = b"b", b"g", b"h"
"""A rank ends in order; which rank does not, and the text of it, follow; a rank is there."""
HEADER = struct.Struct("!II")
FAILED = 1


class PeerLostError(RuntimeError):
    """Another trainer rank is gone or has failed; the message says which.

    Args:
        rank: global rank of the one that is gone.
    """

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class PeerWatch:
    """Watches the other ranks from entering to leaving; collective, in the main thread.

    Args:
        parallel: the ranks.
        shared: errors that all ranks run into alike: to end by one of them is to end in order.
        silence_s: seconds without a beat after which a rank counts as lost.

    Example:
        >>> with PeerWatch(parallel, shared=(ValueError,)):
        ...     train(...)   # PeerLostError, on all ranks that are left, when one is gone
    """

    def __init__(
        self, parallel: ParallelContext, *, shared: tuple[type[BaseException], ...], silence_s: float = SILENCE_S
    ) -> None:
        self._parallel = parallel
        self._shared = (*shared, KeyboardInterrupt, SystemExit)
        self._silence_s = silence_s
        self._rank = parallel.ranks.rank
        self._lost: PeerLostError | None = None
        self._told = threading.Event()
        self._over = threading.Event()
        self._peers: dict[int, socket.socket] = {}
        """Connections: on rank 0 to all others, elsewhere to rank 0."""
        self._names: list[str] = []
        self._ctrl_c: Any = signal.SIG_DFL
        """What took SIGINT before."""

    def __enter__(self) -> PeerWatch:
        if self._parallel.ranks.world_size == 1:
            return self
        self._names = [
            f"trainer rank {rank} (pid {pid} on {host})"
            for rank, (host, pid) in enumerate(self._parallel.gather_objects((socket.gethostname(), os.getpid())))
        ]
        if self._rank == 0:
            self._accept()
        else:
            self._connect()
        for connection in self._peers.values():
            connection.setblocking(True)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEP_ALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._ctrl_c = signal.signal(signal.SIGINT, self._interrupt)
        threading.Thread(target=self._watch, name="peer-watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._names:
            return
        if error is not None:
            # An error of a collective comes together with the news of why.
            self._told.wait(OWN_END_S / 2)
        self._over.set()
        signal.signal(signal.SIGINT, self._ctrl_c)
        lost = self._lost
        if lost is not None:
            self._say(_gone(lost.rank, str(lost)))
        elif error is None or isinstance(error, self._shared):
            self._say(BYE)
        else:
            reason = str(error).splitlines()[0] if str(error) else ""
            self._say(_gone(self._rank, f"{self._names[self._rank]} failed: {type(error).__name__}: {reason}"))
        for connection in self._peers.values():
            connection.close()
        if lost is not None and error is not None and error is not lost:
            raise lost from error

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """In the main thread: what `_end` sends, or a Ctrl-C of the user's."""
        if self._lost is not None:
            raise self._lost
        if callable(self._ctrl_c):
            self._ctrl_c(number, frame)

    def _accept(self) -> None:
        single_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        with socket.create_server(("127.0.0.1" if single_machine else "", 0)) as listener:
            token = secrets.token_bytes(16)
            host = "127.0.0.1" if single_machine else os.environ["MASTER_ADDR"]
            self._parallel.broadcast_object((host, listener.getsockname()[1], token))
            listener.settimeout(CONNECT_TIMEOUT_S)
            while len(self._peers) < self._parallel.ranks.world_size - 1:
                connection, _ = listener.accept()
                connection.settimeout(CONNECT_TIMEOUT_S)
                greeting = _receive(connection, len(token) + 4)
                if greeting is None or greeting[: len(token)] != token:
                    connection.close()  # none of us
                    continue
                self._peers[struct.unpack("!I", greeting[len(token) :])[0]] = connection

    def _connect(self) -> None:
        host, port, token = self._parallel.broadcast_object(None)
        try:
            connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
            connection.sendall(token + struct.pack("!I", self._rank))
        except OSError as error:
            raise PeerLostError(
                f"trainer rank {self._rank} cannot reach rank 0 at {host}:{port}: {error}", rank=0
            ) from error
        self._peers[0] = connection

    def _watch(self) -> None:
        silent = dict.fromkeys(self._peers, 0.0)
        looked = beaten = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map() and not self._over.is_set():
                lost: PeerLostError | None = None
                heard = set()
                for key, _ in selector.select(0.2):
                    rank = key.data
                    word = _receive(self._peers[rank], 1)
                    if word == BEAT:
                        heard.add(rank)
                        continue
                    selector.unregister(key.fileobj)
                    del silent[rank]
                    lost = lost or self._news(word, rank)
                now = time.monotonic()
                for rank in silent:
                    silent[rank] = 0.0 if rank in heard else silent[rank] + min(now - looked, LONGEST_NAP_S)
                    if silent[rank] > self._silence_s and lost is None:
                        text = f"{self._names[rank]} stands still: no sign of it for {self._silence_s:g} s"
                        lost = PeerLostError(text, rank=rank)
                looked = now
                if lost is not None and not self._over.is_set():
                    self._end(lost)
                    return
                if now - beaten > BEAT_S:
                    self._say(BEAT)
                    beaten = now

    def _news(self, word: bytes | None, rank: int) -> PeerLostError | None:
        """What has become of the rank at the other end, or of one that it tells of; None when it ended in order.

        Args:
            word: what it said; None where the connection is closed.
        """
        connection = self._peers[rank]
        if word == BYE:
            return None
        if word == GONE and (header := _receive(connection, HEADER.size)) is not None:
            lost_rank, length = HEADER.unpack(header)
            text = _receive(connection, length)
            if text is not None:
                return PeerLostError(text.decode(), rank=lost_rank)
        return PeerLostError(f"{self._names[rank]} is gone", rank=rank)

    def _end(self, lost: PeerLostError) -> None:
        """Tells the others, gives this rank's main thread the time to find out, then interrupts it, then ends it."""
        self._lost = lost
        self._told.set()
        if self._rank == 0:
            self._say(_gone(lost.rank, str(lost)))
        if self._over.wait(OWN_END_S):
            return
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(HARD_END_S)
        # Whatever holds the main thread: what this process has started ends with it.
        print(f"error: {lost}; rank {self._rank} could not end in order", file=sys.stderr, flush=True)
        os._exit(FAILED)

    def _say(self, word: bytes) -> None:
        for connection in self._peers.values():
            try:
                connection.sendall(word)
            except OSError:
                continue  # that one is gone


def _gone(rank: int, text: str) -> bytes:
    data = text.encode()
    return GONE + HEADER.pack(rank, len(data)) + data


def _receive(connection: socket.socket, length: int) -> bytes | None:
    """So many bytes; None when the other end is closed before."""
    data = b""
    while len(data) < length:
        try:
            part = connection.recv(length - len(data))
        except OSError:
            return None
        if not part:
            return None
        data += part
    return data
