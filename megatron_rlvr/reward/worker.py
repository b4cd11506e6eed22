"""One verifier process: reads (text, prompt) pickles from a socket, answers each with a verdict.

Wire format of an answer: `REPLY` (kind, whether the worker leaves, score, seconds, length of the detail), then the
detail as UTF-8. The first answer says that the verifier is loaded (`READY`) or why it is not (`FAILED`).
"""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import resource
import signal
import socket
import struct
import time

from megatron_rlvr.reward.answer import UnparsableError
from megatron_rlvr.reward.verifiers import Verifier, load_verifier
from megatron_rlvr.types import Prompt

REPLY = struct.Struct("<B?ddI")
OK, UNPARSABLE, CRASH, READY, FAILED = range(5)
_MAX_DETAIL = 2000
_PR_SET_PDEATHSIG = 1


def main(socket_fd: int, parent_pid: int, verifier_name: str, memory_limit_mb: int) -> None:
    """Serves until the socket closes.

    Args:
        socket_fd: inherited stream socket.
        parent_pid: the pool's process; the kernel kills this one when it ends, however it ends.
        verifier_name: of `load_verifier`.
        memory_limit_mb: address space allowed beyond what the loaded verifier takes, MiB.
    """
    # A hanging verifier never reads the socket, so its end alone would not stop it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return
    connection = socket.socket(fileno=socket_fd)
    try:
        verifier = load_verifier(verifier_name)
    except Exception as error:  # noqa: BLE001 - process edge: the pool reports it
        _reply(connection, FAILED, detail=f"{type(error).__name__}: {error}")
        return
    _limit_memory(memory_limit_mb)
    _reply(connection, READY)

    with connection.makefile("rb") as requests:
        while True:
            try:
                text, prompt = pickle.load(requests)
            except EOFError:
                return
            begin = time.perf_counter()
            kind, leaves, score, detail = _verify(verifier, text, prompt, memory_limit_mb)
            try:
                _reply(connection, kind, leaves=leaves, score=score, begin=begin, detail=detail)
            except (BrokenPipeError, ConnectionResetError):
                return
            if leaves:
                return


def _verify(verifier: Verifier, text: str, prompt: Prompt, memory_limit_mb: int) -> tuple[int, bool, float, str]:
    """(kind, whether the process is spoilt, score, detail)."""
    try:
        score = float(verifier(text, prompt))
    except UnparsableError as error:
        return UNPARSABLE, False, 0.0, str(error)
    except MemoryError:
        return CRASH, True, 0.0, f"MemoryError: the verifier took more than {memory_limit_mb} MiB"
    except Exception as error:  # noqa: BLE001 - process edge: whatever a verifier raises is its crash, counted as such
        return CRASH, False, 0.0, f"{type(error).__name__}: {error}"
    if not math.isfinite(score):
        return CRASH, False, 0.0, f"the verifier must return a finite number, got {score}"
    return OK, False, score, ""


def _reply(
    connection: socket.socket,
    kind: int,
    *,
    leaves: bool = False,
    score: float = 0.0,
    begin: float | None = None,
    detail: str = "",
) -> None:
    seconds = 0.0 if begin is None else time.perf_counter() - begin
    encoded = detail[:_MAX_DETAIL].encode(errors="replace")
    connection.sendall(REPLY.pack(kind, leaves, score, seconds, len(encoded)) + encoded)


def _limit_memory(memory_limit_mb: int) -> None:
    """Bounds the address space, so that a runaway computation raises MemoryError instead of filling the machine."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    limit = now + memory_limit_mb * 2**20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file behind
