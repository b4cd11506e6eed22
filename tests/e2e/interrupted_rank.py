"""A rank of the training command that something happens to. Run by test_resume_run.py.

First argument: JSON with what happens, to which rank and when; the rest are the command's overrides. What can happen:
``signal`` (``to_launcher``: sent to the launcher) ``at`` "step", "update", "evaluation" or "write" of step ``step``,
``file_limit``, the size that no file of the checkpoint after step ``step`` may exceed, and ``small_bytes``, the size of
files in a checkpoint that are not shared out to be read.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_rlvr import train
from megatron_rlvr.policy import checkpoint, optimizer
from megatron_rlvr.rollout.recording import ReplayService
from megatron_rlvr.trainer import endings
from megatron_rlvr.trainer.checkpoints import folder
from megatron_rlvr.trainer.checkpoints.save_and_resume import Checkpoints
from megatron_rlvr.trainer.stopping import StopSignals
from tests.e2e import holed_losses


class Accident:
    """Counts steps and does what was asked when it is time."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan if plan.get("rank", 0) == int(os.environ["RANK"]) else {}
        self.limit, self.limited_step = plan.get("file_limit"), plan.get("step")
        self.step = 0
        self.stop = StopSignals(leave=endings.leave)

    def now(self, moment: str) -> bool:
        return self.plan.get("at") == moment and self.plan["step"] == self.step

    def strike(self, stop: StopSignals) -> None:
        number = getattr(signal, self.plan["signal"])
        if not self.plan.get("to_launcher"):
            os.kill(os.getpid(), number)
            return
        # Every rank gets it back from there.
        os.kill(os.getppid(), number)
        while stop.reason is None:
            time.sleep(0.01)

    def install(self) -> None:
        tend, write, step_optimizer = Checkpoints.tend, checkpoint._SnapshotWriter.write, optimizer.step_optimizer
        begin, evaluate = Checkpoints.begin, ReplayService.evaluate

        def tend_and_count(checkpoints: Checkpoints) -> None:
            self.stop = checkpoints.run.stop
            if self.now("step"):
                self.strike(self.stop)
            tend(checkpoints)
            self.step += 1
            holed_losses.step = self.step

        def limited_begin(checkpoints: Checkpoints, *args: Any, **kwargs: Any) -> None:
            limited = self.limit is not None and self.limited_step == self.step
            if limited and self.plan:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
            begin(checkpoints, *args, **kwargs)
            if limited:  # on all ranks, to the end while the limit holds
                checkpoints.complete()
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        def torn_write(writer: Any) -> None:
            # In a thread, while the run goes on to the next step: what is written says which step's it is.
            if self.plan.get("at") == "write" and f"step_{self.plan['step']:06d}" in str(writer.checkpoint_dir):
                Path(writer._items[0]).write_bytes(b"half of it")
                self.strike(self.stop)
            write(writer)

        def torn_update(*args: Any, **kwargs: Any) -> Any:
            if self.now("update"):
                self.strike(self.stop)
            return step_optimizer(*args, **kwargs)

        def torn_evaluation(*args: Any, **kwargs: Any) -> Any:
            if self.now("evaluation"):
                self.strike(self.stop)
            return evaluate(*args, **kwargs)

        ReplayService.evaluate = torn_evaluation
        Checkpoints.tend, Checkpoints.begin = tend_and_count, limited_begin
        checkpoint._SnapshotWriter.write = torn_write
        optimizer.step_optimizer = torn_update


if __name__ == "__main__":
    plan = json.loads(sys.argv.pop(1))
    folder.SMALL_BYTES = plan.pop("small_bytes", folder.SMALL_BYTES)
    accident = Accident(plan)
    accident.install()
    # The step under way, as the run counts it after a resume.
    resume = Checkpoints.resume

    def resume_and_know(checkpoints: Checkpoints, found: Path | None) -> Any:
        progress = resume(checkpoints, found)
        accident.step = progress.step
        return progress

    Checkpoints.resume = resume_and_know
    train.main()
