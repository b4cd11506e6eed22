"""Writes a Hugging Face checkpoint folder as a stream: one tensor in memory, any order, resumable, all or nothing.

The header of a safetensors file comes first and needs only names and shapes, so files are laid out before any
weight exists and each tensor is written at its place. Everything happens in ``.<folder>.incomplete`` beside the
destination, which is renamed when the last byte is there: a folder under the final name is always complete.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_rlvr.weights.safetensors_io import INDEX_FILE, SINGLE_FILE, TORCH_DTYPES, CheckpointError

COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
)
"""Files that travel with the weights."""

_JOURNAL = "journal-{rank}.txt"
_PLAN = "plan.json"
_HF_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Slot:
    """Place of a tensor: file name, offset of its first byte, its shape."""

    file: str
    offset: int
    shape: tuple[int, ...]


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, max_file_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Distributes tensors over files in the given order; a file is over the limit only by a single tensor."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if used and used + size > max_file_bytes:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += size
    return files


class ShardedWriter:
    """Writes the tensors of one model into a new folder.

    Several processes may write at once, each with its own ``rank``; rank 0 must be constructed before the
    others, and commits after all have written (the caller's barriers). Leaving the ``with`` block by an exception
    removes the incomplete folder, unless ``resume`` is set and the exception is an interruption: after a `ValueError`
    (wrong data) a second attempt would only repeat it.

    Example:
        >>> with ShardedWriter(folder, mapping.hf_tensors(), dtype=torch.bfloat16) as writer:
        ...     for name, tensor in tensors:
        ...         writer.write(name, tensor)
        ...     writer.commit(companions=source_folder)
    """

    def __init__(
        self,
        folder: str | Path,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        max_file_bytes: int = 5 << 30,
        source: str = "",
        resume: bool = False,
        rank: int = 0,
    ) -> None:
        """Lays out the files, or takes up an interrupted write of the same tensors.

        Args:
            folder: destination; must not exist.
            shapes: every tensor of the model, in the order of the files.
            dtype: float32, bfloat16 or float16; tensors are cast to it.
            max_file_bytes: weights per file; one file is called ``model.safetensors`` and has no index.
            source: what the tensors come from; an interrupted write is taken up only for the same source.
            resume: keep what an interrupted write has left, and leave it for the next attempt on failure.
            rank: this process among those that write the same folder.

        Raises:
            ValueError: where the destination exists or the type cannot be written.
        """
        self.folder = Path(folder)
        if self.folder.exists():
            raise ValueError(f"output folder must not exist, but {self.folder} does")
        if dtype not in _HF_NAMES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.dtype = dtype
        self._resume = resume
        self._rank = rank
        self._partial = self.folder.with_name(f".{self.folder.name}.incomplete")
        self._slots: dict[str, _Slot] = {}
        self._headers: dict[str, bytes] = {}
        self._lay_out(plan_files(shapes, dtype=dtype, max_file_bytes=max_file_bytes))
        plan = json.dumps(
            {"source": source, "dtype": str(dtype), "files": {f: len(h) for f, h in self._headers.items()},
             "slots": {name: [slot.file, slot.offset, slot.shape] for name, slot in self._slots.items()}}
        )  # fmt: skip
        if rank == 0:
            self._prepare(plan)
        self._done = self._read_journals()
        self._handles: dict[str, int] = {}
        self._journal = (self._partial / _JOURNAL.format(rank=rank)).open("a", encoding="utf-8")
        self._journal.write("\n")  # ends a name that a crash cut off

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        interrupted = kind is not None and not issubclass(kind, ValueError)
        if self._rank == 0 and self._partial.is_dir() and not (interrupted and self._resume):
            shutil.rmtree(self._partial)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(math.prod(slot.shape) for slot in self._slots.values()) * self.dtype.itemsize

    def missing(self) -> list[str]:
        """Tensors that no process had written when this one started or since then itself, in file order."""
        return [name for name in self._slots if name not in self._done]

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor at its place, cast to the folder's type.

        Raises:
            ValueError: for an unknown name, a wrong shape, or a tensor written before.
        """
        slot = self._slots.get(name)
        if slot is None:
            raise ValueError(f"{name} is no tensor of the model that {self.folder} was laid out for")
        if tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{name} must have shape {slot.shape}, got {tuple(tensor.shape)}")
        if name in self._done:
            raise ValueError(f"{name} was written before")
        data = tensor.detach().to(device="cpu", dtype=self.dtype).contiguous().reshape(-1).view(torch.uint8)
        view = data.numpy().data
        handle, offset = self._handle(slot.file), slot.offset
        while view:
            written = os.pwrite(handle, view, offset)
            view, offset = view[written:], offset + written
        # The journal names a tensor only after its bytes were handed to the kernel, so that a killed process
        # never leaves a name without its bytes.
        self._journal.write(name + "\n")
        self._journal.flush()
        self._done.add(name)

    def commit(self, *, companions: Path | None = None) -> None:
        """Checks that everything is there, adds index and companions, and gives the folder its final name.

        Args:
            companions: model folder whose config, tokenizer, generation and licence files are copied; the
                type named in config.json is set to the one written.

        Raises:
            CheckpointError: where tensors are missing.
        """
        self._done |= self._read_journals()
        if absent := self.missing():
            raise CheckpointError(f"{self.folder}: {len(absent)} tensors were not written, first {absent[0]}")
        self.close()
        for file in self._headers:
            descriptor = os.open(self._partial / file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if len(self._headers) > 1:
            weight_map = {name: slot.file for name, slot in self._slots.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self._partial / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
        if companions is not None:
            copy_companions(companions, self._partial, dtype=self.dtype)
        for path in [self._partial / _PLAN, *self._partial.glob(_JOURNAL.format(rank="*"))]:
            path.unlink()
        os.rename(self._partial, self.folder)

    def close(self) -> None:
        """Closes the files; what was written stays."""
        self._journal.close()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _lay_out(self, files: list[dict[str, tuple[int, ...]]]) -> None:
        for number, tensors in enumerate(files, start=1):
            file = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            header: dict[str, object] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name, shape in tensors.items():
                size = math.prod(shape) * self.dtype.itemsize
                header[name] = {
                    "dtype": _HF_NAMES[self.dtype],
                    "shape": list(shape),
                    "data_offsets": [offset, offset + size],
                }
                offset += size
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self._headers[file] = struct.pack("<Q", len(text)) + text
            for name, shape in tensors.items():
                start = header[name]["data_offsets"][0]  # type: ignore[index]
                self._slots[name] = _Slot(file, len(self._headers[file]) + start, shape)

    def _prepare(self, plan: str) -> None:
        """Creates the incomplete folder, unless one of the same plan is to be taken up."""
        plan_path = self._partial / _PLAN
        if self._resume and plan_path.is_file() and plan_path.read_text(encoding="utf-8") == plan:
            return
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        sizes = {file: len(header) for file, header in self._headers.items()}
        for slot in self._slots.values():
            end = slot.offset + math.prod(slot.shape) * self.dtype.itemsize
            sizes[slot.file] = max(sizes[slot.file], end)
        for file, header in self._headers.items():
            with (self._partial / file).open("wb") as out:
                out.write(header)
                out.truncate(sizes[file])
        # Last, so that a folder with a plan has all its files.
        plan_path.write_text(plan, encoding="utf-8")

    def _read_journals(self) -> set[str]:
        done: set[str] = set()
        for path in self._partial.glob(_JOURNAL.format(rank="*")):
            # A line without its end was cut off by a crash.
            done.update(line[:-1] for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n")
        return done & self._slots.keys()

    def _handle(self, file: str) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(self._partial / file, os.O_WRONLY)
        return self._handles[file]


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 << 30,
) -> None:
    """Writes a whole model from one process; the folder appears complete or not at all (see `ShardedWriter`).

    Args:
        folder: destination; must not exist.
        tensors: every tensor of ``shapes`` once, in any order.
        like: model folder whose config, tokenizer, generation and licence files are copied.
        shapes: as `Mapping.hf_tensors` gives them.
        dtype: type to write; None takes the type of the first tensor.

    Raises:
        ValueError: where the destination exists, or a tensor is unknown, missing, repeated or of another shape.
    """
    stream = iter(tensors)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"{folder}: no tensors to write")
    written_dtype = first[1].dtype if dtype is None else dtype
    with ShardedWriter(folder, shapes, dtype=written_dtype, max_file_bytes=max_file_bytes) as writer:
        writer.write(*first)
        for name, tensor in stream:
            writer.write(name, tensor)
        writer.commit(companions=Path(like))


def copy_companions(source: Path, target: Path, *, dtype: torch.dtype | None) -> list[str]:
    """Copies config, tokenizer, generation and licence files; returns their names.

    Args:
        dtype: weight type to name in config.json; None leaves the file as it is.
    """
    copied = []
    for path in sorted(source.iterdir()):
        if not path.is_file() or not any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANION_FILES):
            continue
        if path.name == "config.json" and dtype is not None:
            config = json.loads(path.read_text(encoding="utf-8"))
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = str(dtype).removeprefix("torch.")
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (target / path.name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, target / path.name)
        copied.append(path.name)
    return copied
