"""Reads the model out of a Megatron ``torch_dist`` checkpoint, parameter by parameter, without Megatron."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.safetensors_io import CheckpointError
from megatron_rlvr.weights.slices import Box, CoverageError, box_index, box_shape, intersect, prove_exact_cover
from megatron_rlvr.weights.torch_dist_names import (
    EXTRA_STATE,
    MODEL_PREFIXES,
    GlobalParam,
    global_params,
)

HF_FOLDER = "hf"
"""Folder inside a checkpoint that holds config, tokenizer and generation files."""
METADATA_FILE = ".metadata"
CONFIG_FILE = "metadata.json"


def is_torch_dist(folder: str | Path) -> bool:
    """Whether a folder is a Megatron ``torch_dist`` checkpoint."""
    return (Path(folder) / METADATA_FILE).is_file()


@dataclass(frozen=True, slots=True)
class _Stored:
    """A chunk of a global tensor and its bytes."""

    box: Box
    file: Path
    offset: int
    length: int


class TorchDistReader:
    """The model's tensors in a ``torch_dist`` checkpoint, under their Hugging Face names.

    Example:
        >>> reader = TorchDistReader(folder, ModelShape.from_hf(folder / "hf"))
        >>> for name, tensor in reader.tensors(): ...
    """

    def __init__(self, folder: str | Path, shape: ModelShape) -> None:
        """Reads the index and checks it against the model.

        Raises:
            CheckpointError: where the folder is no complete checkpoint of this model; names the key or file.
        """
        self.folder = Path(folder)
        self.shape = shape
        self._sizes, self._dtypes, self._chunks = _read_index(self.folder)
        per_layer = "decoder.layers.0.self_attention.linear_proj.weight" in self._sizes
        embedding = self._sizes.get("embedding.word_embeddings.weight", (shape.vocab_size, 0))
        if embedding[0] < shape.vocab_size:
            raise CheckpointError(
                f"{self.folder}: embedding.word_embeddings.weight has {embedding[0]} rows, "
                f"config.json says vocab_size {shape.vocab_size}"
            )
        self.params = global_params(shape, padded_vocab_size=embedding[0], per_layer=per_layer)
        self._verify()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored embedding."""
        return self._dtypes["embedding.word_embeddings.weight"]

    def tensors(self, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, Tensor]]:
        """Whole Hugging Face tensors, one Megatron parameter in memory at a time.

        Args:
            skip: Hugging Face names that are not wanted.
        """
        for entry in self.params:
            if not all(name in skip for name, _ in entry.param.hf):
                yield from self.read(entry)

    def read(self, entry: GlobalParam) -> list[tuple[str, Tensor]]:
        """The Hugging Face tensors of one parameter."""
        return entry.param.gather([self._read_global(self._key(entry), entry)])

    def _key(self, entry: GlobalParam) -> str:
        for key in entry.keys:
            if key in self._sizes:
                return key
        raise CheckpointError(f"{self.folder}: {entry.keys[0]} is missing")

    def _read_global(self, key: str, entry: GlobalParam) -> Tensor:
        """The parameter as a single rank holds it, put together from the stored chunks."""
        shape = entry.param.shard_shape
        wanted = entry.global_box(tuple((0, size) for size in shape))
        result = torch.empty(shape, dtype=self._dtypes[key])
        for chunk in self._chunks[key]:
            common = intersect(chunk.box, wanted)
            if common is None:
                continue
            tensor = self._load(key, chunk)
            if common == wanted == chunk.box:
                return tensor.reshape(shape)
            source = tuple((a - c, b - c) for (a, b), (c, _) in zip(common, chunk.box, strict=True))
            inner = common[len(entry.lead) :]
            result[box_index(inner)] = tensor[box_index(source)].reshape(box_shape(inner))
        return result

    def _load(self, key: str, chunk: _Stored) -> Tensor:
        try:
            with chunk.file.open("rb") as file:
                view = io.BufferedReader(_FileSlice(file, chunk.offset, chunk.length))
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{chunk.file}: {key} cannot be read: {error}") from error
        if tuple(tensor.shape) != box_shape(chunk.box):
            # Megatron leaves out leading axes of length one.
            tensor = tensor.reshape(box_shape(chunk.box))
        return tensor

    def _verify(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for entry in self.params:
            expected[self._key(entry)] = entry.global_shape
            for key in entry.keys:
                if key in self._sizes:
                    expected[key] = entry.global_shape
        for key, shape in expected.items():
            if self._sizes[key] != shape:
                raise CheckpointError(f"{self.folder}: {key} has shape {self._sizes[key]}, config.json says {shape}")
            try:
                prove_exact_cover(key, shape, [chunk.box for chunk in self._chunks[key]])
            except CoverageError as error:
                raise CheckpointError(f"{self.folder}: chunks do not cover their tensor: {error}") from error
        extra = [
            key
            for key in self._sizes
            if key.startswith(MODEL_PREFIXES) and key not in expected and EXTRA_STATE not in key
        ]
        if extra:
            raise CheckpointError(f"{self.folder}: {extra[0]} is extra (and {len(extra) - 1} more): another model's")
        sizes: dict[Path, int] = {}
        for key in expected:
            for chunk in self._chunks[key]:
                if chunk.file not in sizes:
                    sizes[chunk.file] = chunk.file.stat().st_size if chunk.file.is_file() else -1
                if sizes[chunk.file] < 0:
                    raise CheckpointError(f"{chunk.file} is missing ({key} lies there)")
                if sizes[chunk.file] < chunk.offset + chunk.length:
                    raise CheckpointError(
                        f"{chunk.file} is truncated: {sizes[chunk.file]} bytes, {key} ends at "
                        f"{chunk.offset + chunk.length}"
                    )


def checkpoint_shape(folder: str | Path, hf_config: str | Path | None = None) -> ModelShape:
    """The model of a checkpoint, from the Hugging Face files that travel with it or that are given.

    Raises:
        ValueError: where neither exists.
    """
    source = Path(folder) / HF_FOLDER if hf_config is None else Path(hf_config)
    if hf_config is None and not source.is_dir():
        raise CheckpointError(f"{folder} has no {HF_FOLDER}/config.json; name a model folder with --hf-config")
    return ModelShape.from_hf(source)


def _read_index(
    folder: Path,
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype], dict[str, list[_Stored]]]:
    """Sizes, types and chunks of the model's keys."""
    for name in (METADATA_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no complete torch_dist checkpoint: {name} is missing")
    try:
        backend = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["sharded_backend"]
        with (folder / METADATA_FILE).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
    except (json.JSONDecodeError, KeyError, TypeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the index is damaged: {error!r}") from error
    if backend != "torch_dist" or not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder}: sharded_backend must be 'torch_dist', got {backend!r}")
    sizes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    lengths: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    chunks: dict[str, list[_Stored]] = defaultdict(list)
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata) and key.startswith(MODEL_PREFIXES):
            sizes[key] = tuple(stored.size)
            dtypes[key] = stored.properties.dtype
            for chunk in stored.chunks:
                lengths[key, tuple(chunk.offsets)] = tuple(chunk.sizes)
    for index, info in metadata.storage_data.items():
        if index.fqn in sizes:
            offsets = tuple(index.offset)
            box = tuple((o, o + n) for o, n in zip(offsets, lengths[index.fqn, offsets], strict=True))
            chunks[index.fqn].append(_Stored(box, folder / info.relative_path, info.offset, info.length))
    return sizes, dtypes, chunks


class _IndexUnpickler(pickle.Unpickler):
    """Builds only the index's own classes, so that a foreign checkpoint cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = module.startswith("torch.distributed.checkpoint.") or (module, name) in {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("builtins", "frozenset"),
            ("pathlib", "PosixPath"),
        }
        if allowed:
            found = super().find_class(module, name)
            if isinstance(found, type) or module == "torch.serialization":
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        if module.startswith(("megatron.", "torch.")):
            # Save plans and the like, which a reader has no use for.
            return _Ignored
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint index")


class _Ignored:
    """Stands for what the index says beyond tensors."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _FileSlice(io.RawIOBase):
    """A part of a file as a file, so that a tensor is read without a copy of its bytes."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view[:count])
        self._position += count
        return count


def num_elements(reader: TorchDistReader) -> int:
    """Hugging Face elements of the model."""
    return sum(math.prod(shape) for entry in reader.params for _, shape in entry.param.hf)
