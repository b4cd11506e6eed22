"""torchrun that ends with the run's own words: ``python -m megatron_rlvr.launch --nproc-per-node 2 -m MODULE ...``.

Takes torchrun's arguments. Where torchrun would add a traceback of its own to a rank's failure and exit with 1, this
adds one line at most and exits with the rank's own code: 2 for a mistake of the user's, 130 after Ctrl-C, 75 when
the run was asked to stop and can be resumed. SIGUSR1 and SIGTERM are passed on to the ranks, which take the time that a
checkpoint needs; torchrun would die of the first and kill the ranks 30 seconds after the second. When this process
itself is killed, the ranks save and end as well (`megatron_rlvr.trainer.launcher_watch`).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import psutil

from megatron_rlvr.config.checkpoints import EXIT_RESUMABLE
from megatron_rlvr.trainer.endings import STOPPED
from megatron_rlvr.trainer.launcher_watch import FOLDER_VARIABLE, PID_VARIABLE

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)
LEFT_TO_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"
LATE_RANKS_S = 2.0
"""From the making of the ranks' folders to their start, at most."""


class Launcher:
    """torchrun, and what becomes of signals to it."""

    def __init__(self) -> None:
        self._folder: str | None = None
        """torchrun's: for the ranks' error files, made just before the ranks."""
        self._passed_on: set[int] = set()

    def launch(self, arguments: Sequence[str]) -> int:
        """Runs torchrun to the end; the exit code of the rank that failed first, 0 when none did."""
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._leave)  # until torchrun takes it over
        # Imported late: from the first moment on, a signal is not lost.
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        # What torchrun's agent logs is the failure that is told below.
        logging.disable(logging.ERROR)
        # torchrun makes a folder for its error files and leaves it behind.
        with tempfile.TemporaryDirectory(prefix="rlvr-torchrun-") as folder:
            self._folder = folder
            os.environ |= {PID_VARIABLE: str(os.getpid()), FOLDER_VARIABLE: folder}
            try:
                run.run(run.parse_args(["--log-dir", folder, f"--signals-to-handle={LEFT_TO_TORCHRUN}", *arguments]))
            except ChildFailedError as error:
                return self._tell_failure(error.failures)
            except SignalException as error:
                return 128 + int(error.sigval)
        return 0

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Sends the signal to the ranks; that they end is what ends this process."""
        if self._folder is None or not os.listdir(self._folder):
            self._leave(number, frame)  # what children there are belong to a library that is being loaded
        if not self._send(number):
            threading.Thread(target=self._send_late, args=(number,), daemon=True).start()

    def _send(self, number: int) -> bool:
        """To all ranks that there are; whether there is one."""
        ranks = psutil.Process().children()
        if ranks:
            self._passed_on.add(number)
        for rank in ranks:
            try:
                rank.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        return bool(ranks)

    def _send_late(self, number: int) -> None:
        """To ranks that are just being started; where all have ended, to none."""
        give_up = time.monotonic() + LATE_RANKS_S
        while not self._send(number) and time.monotonic() < give_up:
            time.sleep(0.05)

    def _leave(self, number: int, frame: FrameType | None) -> NoReturn:
        """Before there are ranks: ends this process; an exception would leave half-imported libraries."""
        interrupted = number == signal.SIGINT
        text = "stopped" if interrupted else f"stopped by {signal.Signals(number).name}"
        os.write(sys.stderr.fileno(), f"{text}\n".encode())
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(STOPPED if interrupted else EXIT_RESUMABLE)

    def _tell_failure(self, failures: Mapping[int, ProcessFailure]) -> int:
        """Says what no rank could say itself; the exit code of the run."""
        rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
        told = {rank: failure for rank, failure in failures.items() if os.path.isfile(failure.error_file)}
        unheard = next(
            (-failure.exitcode for failure in failures.values() if -failure.exitcode in self._passed_on), None
        )
        if unheard is not None and 0 not in told:
            # Rank 0 had not begun to listen to signals.
            print(f"stopped by {signal.Signals(unheard).name}", file=sys.stderr)
            return EXIT_RESUMABLE
        stopped = all(failure.exitcode == EXIT_RESUMABLE for failure in told.values())
        if first.exitcode < 0 and stopped and not self._passed_on and -first.exitcode != signal.SIGTERM:
            told = {}  # they only say that torchrun asked them to stop when the first was gone
        if told:
            # A rank that failed and is ended before it has left by itself counts as failed, not as killed.
            codes = [failure.exitcode for failure in sorted(told.values(), key=lambda failure: failure.timestamp)]
            return next((code for code in codes if code > 0), 1)
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            print(f"error: trainer rank {rank} (pid {first.pid}) was killed by {name}; the others were ended",
                  file=sys.stderr)  # fmt: skip
            return 128 - first.exitcode
        return first.exitcode


if __name__ == "__main__":
    sys.exit(Launcher().launch(sys.argv[1:]))
