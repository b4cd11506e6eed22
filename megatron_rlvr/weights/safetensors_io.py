"""Reads a Hugging Face checkpoint folder slice by slice, and says exactly what is wrong with a broken one."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rlvr.weights.slices import Box, box_index, whole_box

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TORCH_DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Weight types by their name in a safetensors header."""

# Buffers that old checkpoints stored though every loader computes them.
_COMPUTED = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
_MAX_HEADER_BYTES = 100 << 20


class CheckpointError(ValueError):
    """A checkpoint folder is incomplete, damaged or of another model; the message names the file and tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what the header says of it."""

    file: Path
    dtype: str
    """Safetensors name, e.g. ``BF16``."""
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file; checks that the file is as long as its header says.

    Raises:
        CheckpointError: for a missing, truncated or malformed file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {name: StoredTensor(path, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header: {error!r}") from error
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {state}: {size} bytes, {end} expected")
    return tensors


class CheckpointReader:
    """Slices of the tensors in a model folder (one safetensors file, or several with an index).

    Only headers are read on opening. Use as a context manager, or call `close`.

    Example:
        >>> with CheckpointReader(folder) as checkpoint:
        ...     checkpoint.verify(mapping.hf_tensors(), tied=shape.tie_embeddings)
        ...     shard = load_shard(spec, checkpoint)
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens the folder.

        Raises:
            CheckpointError: where the folder, the index or a shard file is missing, truncated or inconsistent.
        """
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = _scan(self.folder)
        """Every stored tensor by name."""
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, name: str, box: Box) -> Tensor:
        """A rectangle of a tensor on the CPU, in the file's type; reads no other bytes of it.

        Raises:
            CheckpointError: for an unknown tensor, a rectangle outside of it, or an unreadable file.
        """
        stored = self._stored(name)
        if len(box) != len(stored.shape) or any(
            not 0 <= start <= stop <= size for (start, stop), size in zip(box, stored.shape, strict=True)
        ):
            raise CheckpointError(f"{stored.file}: {name} has shape {stored.shape}, but {box} is wanted")
        try:
            handle = self._open(stored.file)
            if box == whole_box(stored.shape):
                return handle.get_tensor(name)
            return handle.get_slice(name)[box_index(box)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{stored.file}: {name} cannot be read: {error}") from error

    def read_tensor(self, name: str) -> Tensor:
        """A whole tensor on the CPU, in the file's type."""
        return self.read(name, whole_box(self._stored(name).shape))

    def verify(self, expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
        """Checks names, shapes and types against what config.json asks for.

        A stored ``lm_head.weight`` of a tied model is accepted where it equals the embedding bit by bit.

        Raises:
            CheckpointError: naming the folder and the first tensors that are missing, extra, of another shape or
                not floating point.
        """
        problems = [f"{name} is missing" for name in expected if name not in self.tensors]
        for name, stored in self.tensors.items():
            if name not in expected:
                if _COMPUTED.match(name) or (tied and name == "lm_head.weight" and self._equals_embedding()):
                    continue
                reason = " and differs from the embedding though tie_word_embeddings is true"
                problems.append(f"{name} is extra{reason if tied and name == 'lm_head.weight' else ''}")
            elif stored.shape != expected[name]:
                problems.append(
                    f"{name} has shape {stored.shape} in {stored.file.name}, config.json says {expected[name]}"
                )
            elif stored.dtype not in TORCH_DTYPES:
                problems.append(f"{name} is {stored.dtype} in {stored.file.name}, not one of {', '.join(TORCH_DTYPES)}")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise CheckpointError(
                f"{self.folder}: weights and config.json do not belong together: {'; '.join(problems[:5])}{more}"
            )

    def _equals_embedding(self) -> bool:
        name, head = "model.embed_tokens.weight", "lm_head.weight"
        if name not in self.tensors or self.tensors[name].shape != self.tensors[head].shape:
            return False
        shape = self.tensors[name].shape
        return all(torch.equal(self.read(name, box), self.read(head, box)) for box in _row_blocks(shape))

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self.tensors[name]

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        return self._files[path]


def _row_blocks(shape: tuple[int, ...], block_elements: int = 1 << 24) -> Iterator[Box]:
    rows = max(1, block_elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *((0, size) for size in shape[1:]))


def _scan(folder: Path) -> dict[str, StoredTensor]:
    """Headers of all weight files of a folder, checked against the index."""
    if not folder.is_dir():
        raise CheckpointError(f"model.path must be a model folder, but {folder} does not exist")
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        if (folder / SINGLE_FILE).is_file():
            return read_header(folder / SINGLE_FILE)
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".safetensors", ".gguf"))
        found = f", only {', '.join(others[:3])}" if others else ""
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_path} is no safetensors index: {error!r}") from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(files)} weight files are missing: {missing[0]}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_header(folder / file).items():
            if weight_map.get(name) != file:
                where = weight_map.get(name, "nowhere")
                raise CheckpointError(f"{folder / file} holds {name}, which {INDEX_FILE} places in {where}")
            tensors[name] = stored
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file} lacks {name}, which {INDEX_FILE} places there")
    return tensors
