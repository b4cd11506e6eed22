"""Weights and optimizer as a Megatron ``torch_dist`` checkpoint: written in the background, read at any layout.

Megatron's parts plan what every rank writes, write it and read it (`megatron.core.dist_checkpointing`). Three things
are done here instead of by its `save`: the bytes are written by a thread of this process and not by forked ones (a
fork of a process with communication threads may hang, and what is forked outlives a killed trainer); what goes wrong
on one rank, such as a full disk, is known to all ranks and leaves none waiting; and nobody depends on a manager
process.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType

from megatron_rlvr.policy import optimizer_state, platform
from megatron_rlvr.policy.model import unwrap
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy

BesidesWeights = Callable[[Path], None]
"""Writes whatever else belongs into the folder; runs on rank 0, in the background."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; names the rank and the reason. Raised on every rank alike."""


class PendingSave:
    """A checkpoint that is being written. `finish` is collective, the rest is this rank's own.

    Args:
        folder: where it is written; exists, empty.
        background: write in a thread; otherwise it is written on return.
    """

    def __init__(
        self, folder: Path, parallel: ParallelContext, policy: Policy, *, besides: BesidesWeights, background: bool
    ) -> None:
        self.folder = folder
        self._parallel = parallel
        self._besides = besides if parallel.ranks.is_main else None
        platform.install()  # dist_checkpointing is imported late
        self._writer = _SnapshotWriter(folder, living=_living_storages(policy) if background else set())
        self._index = _plan(_model_and_optimizer(policy), self._writer, parallel)
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self.checksums: dict[str, str] = {}
        """SHA-256 of all ranks' files by name, once `finish` has returned."""
        if not background:
            self._write()
        else:
            self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank has written its part, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Waits for all ranks' parts and completes the folder, but for its name.

        Raises:
            CheckpointWriteError: a rank could not write.
        """
        if self._thread is not None:
            self._thread.join()
        outcome = self._error if self._error is not None else self._writer.results
        answers = self._parallel.gather_objects((_travelling(outcome), self._writer.checksums))
        outcomes = [of_rank for of_rank, _ in answers]
        for _, checksums in answers:
            self.checksums |= checksums
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if isinstance(text, str)]
        if not failures and self._parallel.ranks.is_main:
            try:
                self._complete(outcomes)
            except OSError as error:
                failures = [f"rank 0: {error}"]
        failures = self._parallel.broadcast_object(failures)
        if failures:
            raise CheckpointWriteError(f"{self.folder}: {'; '.join(failures)}")

    def _write(self) -> None:
        try:
            if self._besides is not None:
                self._besides(self.folder)
            self._writer.write()
        except Exception as error:  # noqa: BLE001 - of a thread; told to all ranks in `finish`
            self._error = error

    def _complete(self, results: Sequence[Any]) -> None:
        assert self._index is not None
        for name in {result.storage_data.relative_path for of_rank in results for result in of_rank}:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{name} of another rank is not here: all nodes must share output_dir")
        self._writer.finish(self._index, list(results))
        torch.save({}, self.folder / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))


def load(policy: Policy, folder: Path) -> None:
    """Reads weights, main weights and moments; collective, at any layout."""
    platform.install()
    assert policy.optimizer is not None
    model = _model_state(policy)
    where = optimizer_state.places(model)
    state = {"model": model, "optimizer": optimizer_state.targets(policy.optimizer, where)}
    steps = torch.zeros(1, dtype=torch.int64)
    state["steps"] = {"optimizer.num_steps": _step_count(policy, steps)}
    with warnings.catch_warnings():
        # Megatron's way of telling torch what lies where is one that torch will give up some day.
        warnings.simplefilter("ignore", FutureWarning)
        loaded = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
    with torch.no_grad():
        for index, chunk in enumerate(policy.chunks):
            unwrap(chunk).load_state_dict(loaded["model"][f"model{index}"])
    step = int(loaded["steps"]["optimizer.num_steps"])
    optimizer_state.restore(policy.optimizer, loaded["optimizer"], step=step)


def _model_state(policy: Policy) -> ShardedStateDict:
    return {f"model{index}": unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(policy.chunks)}


def _living_storages(policy: Policy) -> set[int]:
    """Addresses of the memory that training goes on to write to."""
    assert policy.optimizer is not None
    weights = (tensor for chunk in policy.chunks for tensor in chunk.state_dict().values())
    of_weights = {t.untyped_storage().data_ptr() for t in weights if isinstance(t, torch.Tensor)}
    return of_weights | optimizer_state.living_storages(policy.optimizer)


def _step_count(policy: Policy, value: torch.Tensor) -> dist_checkpointing.ShardedTensor:
    """The number of optimizer steps as a tensor that rank 0 writes and every rank reads."""
    return dist_checkpointing.ShardedTensor.from_rank_offsets(
        "optimizer.num_steps", value, replica_id=policy.parallel.ranks.rank
    )


def _model_and_optimizer(policy: Policy) -> ShardedStateDict:
    assert policy.optimizer is not None
    model = _model_state(policy)
    state = optimizer_state.sharded_state(policy.optimizer, optimizer_state.places(model))
    steps = torch.tensor([optimizer_state.num_steps(policy.optimizer)])
    return {"model": model, "optimizer": state, "steps": {"optimizer.num_steps": _step_count(policy, steps)}}


def _plan(state: ShardedStateDict, writer: _SnapshotWriter, parallel: ParallelContext) -> Metadata | None:
    """Agrees with all ranks on who writes what, and takes the snapshot; returns the index on rank 0."""
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    assert not any(common.values()), "everything in a checkpoint is sharded"
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    (_, index, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(by_key, False),
        writer,
        parallel.control_group,
        0,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    return index


class _SnapshotWriter(FileSystemWriterAsync):
    """Takes this rank's items into memory when they are planned, and writes them into one file when told to.

    Args:
        living: addresses of storages that change while the snapshot is written: it takes a copy of them.
    """

    def __init__(self, folder: Path, *, living: set[int]) -> None:
        super().__init__(str(folder))
        self.results: list[Any] = []
        self.checksums: dict[str, str] = {}
        """SHA-256 of what was written, by file name."""
        self._living = living
        self._items: tuple[str, str, tuple[list[Any], list[Any]]] | None = None

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        data: tuple[list[Any], list[Any]] = ([], [])
        for item in plan.items:
            is_tensor = item.type is not WriteItemType.BYTE_IO
            value = planner.resolve_data(item)
            if is_tensor:
                assert isinstance(value, torch.Tensor)
                value = value.detach().to("cpu", copy=value.untyped_storage().data_ptr() in self._living)
            data[is_tensor].append((item, value))
        if plan.items:
            name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
            self._items = (str(Path(self.checkpoint_dir) / name), name, data)

    def write(self) -> None:
        """Writes and syncs the file; raises what went wrong."""
        if self._items is None:
            return
        transforms = [self.transforms] if hasattr(self, "transforms") else []
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(0)
        path, name, (plain, tensors) = self._items
        # Of a slice the whole storage would be written; its copy lives no longer than its writing.
        whole = ((i, t if t.untyped_storage().nbytes() == t.nbytes else t.clone()) for i, t in tensors)
        self.write_preloaded_data(transforms, 0, (path, name, (plain, whole)), answers, pending, True)
        _, outcome = answers.get()
        self._items = None
        if isinstance(outcome, Exception):
            raise outcome
        self.results = outcome
        with open(path, "rb") as written:  # the system still has it in memory
            self.checksums[name] = hashlib.file_digest(written, "sha256").hexdigest()


def _travelling(outcome: Exception | list[Any]) -> list[Any] | str:
    """Results as they are; an error as text, that of the system where torch's writer has one of its own."""
    if not isinstance(outcome, Exception):
        return outcome
    cause: BaseException | None = outcome
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    found = outcome if cause is None else cause
    return f"{type(found).__name__}: {found}"
