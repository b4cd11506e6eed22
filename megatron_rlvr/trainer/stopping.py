"""Signals that ask a run to stop; what they promise stands in `megatron_rlvr.config.checkpoints`."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from megatron_rlvr.config.checkpoints import SIGNAL_ECHO_S

REQUESTS = (signal.SIGUSR1, signal.SIGTERM)


class RunInterruptedError(RuntimeError):
    """The run was asked to stop, and all ranks know; started again, it goes on."""


class StopSignals:
    """Takes SIGUSR1, SIGTERM and Ctrl-C of this process.

    Until `begin` a request calls `leave`: libraries are being loaded, and an exception in the middle of one leaves it
    in pieces. Then until `hold` it ends the run where it stands (nothing has been trained that could be lost); after
    that, at the next safe point, or inside `interruptible`. Ctrl-C is a KeyboardInterrupt at any time.

    Args:
        leave: ends the process; gets what would have been raised.

    Example:
        >>> stop = StopSignals(leave=endings.leave)
        >>> stop.install()
        >>> import torch
        >>> stop.begin()
        >>> stop.hold()
        >>> with stop.interruptible():
        ...     wait_for_rollouts()
    """

    def __init__(self, leave: Callable[[BaseException], NoReturn]) -> None:
        self.reason: str | None = None
        """What asked, the name of a signal as a rule; None while nothing did."""
        self.because: str | None = None
        """What stands behind the next signal, where this process knows and a name would mislead."""
        self.interruption: BaseException | None = None
        """What was raised to end the run where it stood; what ends it may be an error of what was interrupted."""
        self._asked_at = 0.0
        self._leave: Callable[[BaseException], NoReturn] | None = leave
        self._raises = self._held = False

    def install(self) -> None:
        """Takes the signals over; for the main thread."""
        for number in REQUESTS:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody else's, or ignored
            signal.signal(signal.SIGINT, self._on_interrupt)

    def begin(self) -> None:
        """All is loaded: from now on a request raises `RunInterruptedError`."""
        self._leave, self._raises = None, True

    def hold(self) -> None:
        """From now on requests wait for a safe point."""
        self._leave, self._raises, self._held = None, False, True
        self.interruption = None  # where it was swallowed, the request is still known

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A request made before or in this block ends it with `RunInterruptedError`."""
        before, self._raises = self._raises, True
        try:
            if self.reason is not None:
                raise RunInterruptedError(self.reason)
            yield
        finally:
            self._raises = before

    def release(self) -> None:
        """The request is met, or being met: what still comes must not disturb the end."""
        for number in REQUESTS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._asked_at = self.because or signal.Signals(number).name, now
            if self._raises and self._held:
                raise RunInterruptedError(self.reason)
            if not self._held:
                self.release()  # the launcher sends it again when another rank has ended first
                self._interrupt(RunInterruptedError(self.reason))
        elif now - self._asked_at > SIGNAL_ECHO_S:
            self._interrupt(KeyboardInterrupt())

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupt(KeyboardInterrupt())

    def _interrupt(self, error: BaseException) -> None:
        if self._leave is not None:
            self._leave(error)
        self.interruption = error
        raise error
