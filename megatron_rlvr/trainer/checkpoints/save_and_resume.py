"""Saves a run and takes it up again; every method is collective over the trainer's ranks.

A save has two halves. `begin` keeps the run waiting: it copies the state into memory. Then a thread of every rank
writes, while training goes on, and `tend` at the next step boundary, or `complete`, gives the folder its name once
all ranks have written. What goes wrong with the disk costs a checkpoint and not the run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_rlvr.config.checkpoints import EXIT_RESUMABLE
from megatron_rlvr.config.schema import Resume
from megatron_rlvr.policy import checkpoint, random_state
from megatron_rlvr.policy.checkpoint import CheckpointWriteError
from megatron_rlvr.policy.model import TORCH_DTYPE
from megatron_rlvr.report.run_record import RunRecord
from megatron_rlvr.report.run_status import RunStatus
from megatron_rlvr.report.samples import remove_samples
from megatron_rlvr.trainer.checkpoints.folder import CheckpointFolder, Kept, first_corrupt
from megatron_rlvr.trainer.checkpoints.run_state import (
    STATE_FILE,
    Progress,
    RunState,
    compare_configs,
    plain_config,
    versions,
)
from megatron_rlvr.trainer.session import Session
from megatron_rlvr.trainer.stopping import RunInterruptedError
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.safetensors_writer import copy_companions
from megatron_rlvr.weights.torch_dist_reader import HF_FOLDER

FOLDER = "checkpoints"
EXPORTS = "export"
MODEL = "model"
"""The trained policy, of a run that has come to its end."""


class _Writing(Protocol):
    """A checkpoint under way."""

    @property
    def done(self) -> bool: ...

    @property
    def checksums(self) -> dict[str, str]: ...

    def finish(self) -> None: ...


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: what is saved and restored.
        record: rank 0's metrics, which are cut back to the checkpoint.
        status: rank 0's status file, which names the newest checkpoint.
    """

    def __init__(self, run: Session, record: RunRecord | None, status: RunStatus) -> None:
        self.run = run
        self.config = run.config.checkpoint
        self.failures = 0
        """Checkpoints that could not be written."""
        self._record = record
        self._status = status
        self._folder = CheckpointFolder(run.run_dir / FOLDER)
        self._pending: _Writing | None = None
        self._pending_facts: dict[str, Any] = {}
        self._pending_step = 0
        self._newest = 0
        """Step of the newest complete one."""

    # resume

    def find(self) -> Path | None:
        """The checkpoint to go on from: the newest sound one; broken ones are named.

        Raises:
            ValueError: there are checkpoints and `checkpoint.resume` is never, or all of them are broken.
        """

        corrupt: dict[int, str] = {}
        while True:
            step, skipped = self.run.on_main(lambda: self._choose(corrupt))
            reason = self._first_corrupt(step) if step is not None else None
            if step is None or reason is None:
                break
            corrupt[step] = reason
        for line in skipped:
            self.run.note(f"checkpoint skipped: {line}")
        return self._folder.complete(step) if step is not None else None

    def _choose(self, corrupt: Mapping[int, str]) -> tuple[int | None, list[str]]:
        """On rank 0: the newest checkpoint that nothing speaks against yet, and what speaks against newer ones."""
        steps = self._folder.steps()
        if self.config.resume is Resume.never:
            if steps:
                raise ValueError(
                    f"checkpoint.resume must be auto in a folder with checkpoints, got never "
                    f"({self._folder.path} has {len(steps)}); another run_name starts anew"
                )
            return None, []
        step, skipped = self._folder.newest(corrupt)
        if step is None and steps:
            raise ValueError(
                f"no checkpoint in {self._folder.path} can be used: {'; '.join(skipped)}. "
                f"Remove them to start anew, or choose another run_name"
            )
        return step, skipped

    def _first_corrupt(self, step: int) -> str | None:
        """What is wrong with the first shard that is not what was written; the ranks share the reading."""
        parallel = self.run.parallel
        shards = self.run.on_main(lambda: self._folder.shards(step))
        mine = shards[parallel.ranks.rank :: parallel.ranks.world_size]
        reasons = parallel.gather_objects(first_corrupt(mine))
        return next((reason for reason in reasons if reason is not None), None)

    def resume(self, found: Path | None) -> Progress:
        """Restores everything from a checkpoint; a fresh start where there is none.

        Raises:
            ValueError: the configuration cannot continue it; names the field.
        """
        state = self.run.on_main(lambda: self._read(found)) if found is not None else None
        progress = state.progress if state is not None else Progress()
        if found is not None and state is not None:
            self._restore(found, state)
            self.run.note(f"going on after step {progress.step}, from {found}")
        self.run.on_main(lambda: self._cut_back(progress))
        self._newest = progress.step
        self._status.update(step=progress.step, checkpoint=found.name if found is not None else None)
        return progress

    def _read(self, found: Path) -> RunState:
        run = self.run
        state = RunState.read(found)
        for change in compare_configs(state.config, run.config, origin=found):
            run.note(f"resumed with other settings: {change}")
        if run.config.train.enabled:
            saved = ModelShape.from_hf(found / HF_FOLDER)
            for name in saved.__dataclass_fields__:
                if getattr(saved, name) != getattr(run.policy.shape, name):
                    raise ValueError(
                        f"model.path must be a model with {name} {getattr(saved, name)} to resume from {found}, "
                        f"got {getattr(run.policy.shape, name)}"
                    )
        run.supply.load_state_dict(state.rollouts)
        # The other ranks have no use for groups of rollouts.
        state.rollouts = {}
        return state

    def _restore(self, found: Path, state: RunState) -> None:
        run = self.run
        for name, stateful in run.stateful.items():
            if name in state.stateful:
                stateful.load_state_dict(state.stateful[name])
            else:
                run.note(f"{name} starts anew: the checkpoint knows nothing of it")
        run.policy_version = state.policy_version
        if run.config.train.enabled:
            checkpoint.load(run.policy, found)
            run.updater.num_updates = state.num_updates
            run.push_weights()
        # Last, since all before may draw.
        if state.layout == self._layout():
            random_state.restore(state.random[run.parallel.ranks.rank])
        else:
            run.note("another layout: the random generators start from the seed")

    def _cut_back(self, progress: Progress) -> None:
        """Takes back what was written after the checkpoint: its steps are done again."""
        assert self._record is not None
        last = progress.step - (progress.unrecorded is not None)
        run_dir = self.run.run_dir
        self._record.rewind(last)
        remove_samples(run_dir, after=progress.step)
        for export in (run_dir / EXPORTS).glob("step_*"):
            if int(export.name.removeprefix("step_")) > progress.step:
                shutil.rmtree(export)
        if progress.step < self.run.config.train.steps and (run_dir / MODEL).exists():
            shutil.rmtree(run_dir / MODEL)
        self._folder.clean()

    # save

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        every = self.config.every
        return bool(every) and (step % every == 0 or step == self.run.config.train.steps)

    def tend(self) -> None:
        """At a step boundary: names a checkpoint that all ranks have written, and agrees on requests to stop.

        Raises:
            RunInterruptedError: a rank was asked to stop.
        """
        written = self._pending is not None and self._pending.done
        answers = self.run.parallel.gather_objects((self.run.stop.reason, written))
        if self._pending is not None and all(done for _, done in answers):
            self.complete()
        for rank, (reason, _) in enumerate(answers):
            if reason is not None:
                raise RunInterruptedError(f"{reason} at rank {rank}")

    def begin(self, progress: Progress, *, background: bool) -> None:
        """Starts to write the state of this moment; waits for a checkpoint that is still being written.

        Args:
            background: return once the state is copied; otherwise once it is written.
        """
        self.complete()
        run, step = self.run, progress.step
        content = self._content(progress)
        partial = self._folder.partial(step)
        if self._guarded(lambda: self._folder.begin(step)):
            return

        def besides(folder: Path) -> None:
            (folder / STATE_FILE).write_bytes(content)
            if run.config.train.enabled:
                (folder / HF_FOLDER).mkdir()
                copy_companions(run.policy.path, folder / HF_FOLDER, dtype=TORCH_DTYPE[run.config.model.dtype])

        self._pending_step = step
        self._pending_facts = {"accuracy": progress.accuracy if progress.accuracy_at == step else None}
        if run.config.train.enabled:
            self._pending = checkpoint.PendingSave(
                partial, run.parallel, run.policy, besides=besides, background=background
            )
        elif not self._guarded(lambda: besides(partial)):
            self._pending = _Written()

    def complete(self) -> None:
        """Waits for the checkpoint that is being written, if any, and names it; removes older ones."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.finish()
        except CheckpointWriteError as error:
            self._failed(str(error))
            return
        step, facts = self._pending_step, self._pending_facts
        if self._guarded(lambda: self._folder.commit(step, facts, pending.checksums)):
            return
        self._newest = step
        self._status.update(checkpoint=self._folder.complete(step).name)
        kept = Kept(last=self.config.keep_last, every=self.config.keep_every, best=self.config.keep_best)
        self._guarded(lambda: self._folder.prune(kept))

    def save_and_stop(self, progress: Progress, reason: str) -> None:
        """On a request to stop: makes sure that this moment is saved, and says so in the status."""
        self.complete()
        if progress.step and (self._newest != progress.step or progress.unrecorded is not None):
            self.begin(progress, background=False)
            self.complete()
        self._status.update(state="stopped", exit_code=EXIT_RESUMABLE, reason=reason, step=progress.step)
        saved = f"saved at step {self._newest}" if self._newest else "nothing is trained yet"
        self.run.note(f"stopped by {reason}; {saved}; run_name={self.run.run_dir.name} goes on from there")
        self.run.stop.release()

    def abandon(self) -> None:
        """However the run ends: leaves no half-written checkpoint behind. Not collective: others may be gone."""
        if self.run.is_main:
            with contextlib.suppress(OSError):
                self._folder.clean()

    def save_model(self) -> Path:
        """Writes the trained policy, unless a start that found nothing left to do has it already."""
        out = self.run.run_dir / MODEL
        if not self.run.on_main(out.exists):
            self.run.policy.save_hf(out, like=self.run.policy.path)
        return out

    def export(self, step: int) -> None:
        """Writes the policy as a Hugging Face folder where that is due."""
        every = self.config.export_hf_every
        out = self.run.run_dir / EXPORTS / f"step_{step:06d}"
        if every and step % every == 0 and not self.run.on_main(out.exists):
            self.run.policy.save_hf(out, like=self.run.policy.path)

    def _content(self, progress: Progress) -> bytes:
        """The run's state as bytes, on rank 0; empty on the others."""
        run = self.run
        generators = run.parallel.gather_objects(random_state.capture())
        if not run.is_main:
            return b""
        return RunState(
            progress=progress,
            policy_version=run.policy_version,
            num_updates=run.updater.num_updates if run.config.train.enabled else 0,
            rollouts=run.supply.state_dict(),
            stateful={name: stateful.state_dict() for name, stateful in run.stateful.items()},
            random=generators,
            layout=self._layout(),
            config=plain_config(run.config),
            versions=versions(),
        ).to_bytes()

    def _layout(self) -> dict[str, Any]:
        return {"world_size": self.run.parallel.ranks.world_size, **plain_config(self.run.config)["parallel"]}

    def _guarded(self, call: Callable[[], object]) -> bool:
        """Runs `call` on rank 0; what the disk refuses is noted. Returns whether it failed, on every rank."""
        problem: str | None = None
        if self.run.is_main:
            try:
                call()
            except OSError as error:
                problem = str(error)
        problem = self.run.parallel.broadcast_object(problem)
        if problem is not None:
            self._failed(problem)
        return problem is not None

    def _failed(self, reason: str) -> None:
        self.failures += 1
        newest = f"the newest is of step {self._newest}" if self._newest else "there is none yet"
        self.run.note(f"warning: a checkpoint could not be written: {reason}; training goes on, {newest}")
        if self.run.is_main:
            try:
                self._folder.clean()
            except OSError as error:
                self.run.note(f"warning: what was written of it could not be removed: {error}")


class _Written:
    """A checkpoint without a policy is written at once."""

    done = True

    def __init__(self) -> None:
        self.checksums: dict[str, str] = {}

    def finish(self) -> None:
        pass
