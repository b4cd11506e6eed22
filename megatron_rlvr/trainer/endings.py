"""How a run ends: the last line a user reads, the exit code, and what torchrun is told.

torchrun prints a report of its own after a rank's failure. Its last line is what the rank leaves in the file named by
``TORCHELASTIC_ERROR_FILE``; without that it is a link to PyTorch's manual.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from megatron_rlvr.config.checkpoints import EXIT_RESUMABLE
from megatron_rlvr.trainer.stopping import RunInterruptedError, StopSignals

USER_MISTAKE = 2
FAILED = 1
STOPPED = 128 + signal.SIGINT
MAIN_SPEAKS_S = 3.0
REQUEST_COMES_S = 1.0
"""After another rank has already ended by it."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOST_PEER_WORDS = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "remote process exited")
"""How gloo, NCCL and the TCP store tell that the process at the other end is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What a failure means to a user."""

    code: int
    text: str
    """One line, or a few; no traceback."""
    everywhere: bool
    """Whether only this rank knows it. What all ranks find out alike, rank 0 says."""


def ending_of(error: BaseException, *, rank: int) -> Ending | None:
    """The ending that an exception stands for; None for one that nobody foresaw, whose traceback is the message.

    Args:
        error: what ended the run on this rank.
        rank: global rank.
    """
    if isinstance(error, KeyboardInterrupt):
        return Ending(code=STOPPED, text="stopped", everywhere=False)
    if isinstance(error, ValueError):
        return Ending(code=USER_MISTAKE, text=f"error: {error}", everywhere=False)
    if isinstance(error, RunInterruptedError):
        return Ending(code=EXIT_RESUMABLE, text=f"stopped by {error}", everywhere=False)

    # Imported late: a mistake in the configuration answers before torch is loaded.
    from megatron_rlvr.types import EngineError

    if isinstance(error, EngineError):
        return Ending(code=FAILED, text=f"error: {error}", everywhere=False)

    from megatron_rlvr.policy.peer_watch import PeerLostError
    from megatron_rlvr.rollout.messages import RolloutError
    from megatron_rlvr.rollout.server import ServerStartError
    from megatron_rlvr.trainer.session import RunStoppedError
    from megatron_rlvr.trainer.update.steps import TrainingDivergedError

    if isinstance(error, PeerLostError):
        # Rank 0 says it; where rank 0 is the one, the next does.
        return Ending(code=FAILED, text=f"error: {error}", everywhere=error.rank == 0 and rank == 1)
    if isinstance(error, TrainingDivergedError):
        return Ending(code=FAILED, text=f"error: {error}", everywhere=False)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return Ending(code=FAILED, text=f"error: rank {rank} could not write: {error}", everywhere=True)
    if isinstance(error, RunStoppedError):
        return Ending(code=FAILED, text=f"error: {error}", everywhere=False)
    if isinstance(error, RolloutError | ServerStartError):
        return Ending(code=FAILED, text=f"error: {error}", everywhere=False)
    if is_lost_connection(error):
        reason = str(error).splitlines()[0]
        return Ending(code=FAILED, text=f"error: rank {rank} lost another trainer rank: {reason}", everywhere=True)
    return None


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because the process at the other end is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER_WORDS)


@contextmanager
def lost_peers_explained(stop: StopSignals) -> Iterator[None]:
    """Where ranks are asked to stop one after the other, a rank may first hear of it from a connection that is gone.

    Raises:
        RunInterruptedError: that is why a collective in this block failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        time.sleep(REQUEST_COMES_S)  # the signal's handler raises here
        if stop.reason is not None:
            raise RunInterruptedError(stop.reason) from error
        raise


def tell_torchrun(text: str) -> None:
    """Leaves `text` where torchrun looks for a failed rank's reason; nothing without torchrun, or after its end."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None and Path(path).parent.is_dir():
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}))


def leave(error: BaseException) -> NoReturn:
    """Ends this process in a signal handler, before there is anything to save or to end in order; rank 0 says so.

    Args:
        error: what asked for it, a RunInterruptedError or a KeyboardInterrupt.
    """
    rank = int(os.environ.get("RANK", "0"))
    ending = ending_of(error, rank=rank)
    assert ending is not None
    tell_torchrun(ending.text)
    if rank == 0:
        os.write(sys.stderr.fileno(), f"{ending.text}\n".encode())
    os._exit(ending.code)


def let_main_speak() -> None:
    """Keeps a rank that has nothing to add from ending first: its launcher would end rank 0 before it has spoken."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    time.sleep(MAIN_SPEAKS_S)


class SafeExit:
    """Makes the end of a process its exit code, whatever the process groups' threads are doing then.

    A thread that lets go of a tensor while Python takes itself apart is ended in the middle of a C++ destructor, and
    that aborts the process ("terminate called without an active exception"): on a busy machine runs that were finished
    have failed so. Entered before anything else registers an exit handler, this leaves after all of them, without the
    taking apart.

    Example:
        >>> with SafeExit():
        ...     train()
    """

    def __init__(self) -> None:
        self._code = FAILED
        """That of an exception that nobody catches."""

    def __enter__(self) -> None:
        atexit.register(self._leave)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self._code = 0
        elif isinstance(error, SystemExit):
            self._code = error.code if isinstance(error.code, int) else 0 if error.code is None else FAILED
        elif isinstance(error, KeyboardInterrupt):
            self._code = STOPPED

    def _leave(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self._code)


def shared_errors() -> tuple[type[BaseException], ...]:
    """Errors that every rank runs into alike, so that one that ends by them has not failed alone."""
    from megatron_rlvr.trainer.session import RunStoppedError
    from megatron_rlvr.trainer.update.steps import TrainingDivergedError
    from megatron_rlvr.types import EngineError

    return (ValueError, EngineError, RunStoppedError, RunInterruptedError, TrainingDivergedError)
