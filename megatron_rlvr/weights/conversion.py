"""Hugging Face folders to Megatron checkpoints and back, and comparison of any two; bounded memory, any rank count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.safetensors_io import TORCH_DTYPES, CheckpointError, CheckpointReader
from megatron_rlvr.weights.safetensors_writer import ShardedWriter
from megatron_rlvr.weights.torch_dist_names import GlobalParam
from megatron_rlvr.weights.torch_dist_reader import HF_FOLDER, TorchDistReader, checkpoint_shape, is_torch_dist
from megatron_rlvr.weights.torch_dist_writer import TorchDistWriter

Progress = Callable[[int, int], None]
"""Called with (elements done by this process, elements that it has to do)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """The processes that convert one model together.

    Example:
        >>> Team()  # alone
        Team(rank=0, size=1, barrier=...)
    """

    rank: int = 0
    size: int = 1
    barrier: Callable[[], object] = lambda: None

    def mine(self, work: list) -> list:
        """This process's share."""
        return work[self.rank :: self.size]


def hf_to_megatron(
    hf_folder: str | Path,
    out_folder: str | Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None,
    team: Team,
    progress: Progress,
) -> None:
    """Converts a Hugging Face folder into a ``torch_dist`` checkpoint that Megatron loads at any layout.

    An interrupted conversion of the same source goes on where it stopped; after an error nothing is left behind.

    Args:
        layout: chunks are stored as a trainer of this layout would store them.
        dtype: type to write; None keeps the folder's.

    Raises:
        ValueError: for a broken, foreign or non-finite source, an impossible layout, an existing destination.
    """
    hf_folder = Path(hf_folder)
    shape = ModelShape.from_hf(hf_folder)
    with CheckpointReader(hf_folder) as reader:
        reader.verify(Mapping(shape, layout=Layout(), naming="local").hf_tensors(), tied=shape.tie_embeddings)
        if dtype is None:
            dtype = TORCH_DTYPES[reader.tensors["model.embed_tokens.weight"].dtype]
        if team.rank:
            team.barrier()
        writer = TorchDistWriter(
            out_folder, shape, layout=layout, dtype=dtype, source=_fingerprint(hf_folder), rank=team.rank
        )
        if not team.rank:
            team.barrier()
        try:
            units = team.mine(writer.missing())
            # All processes must have read the journals before one adds to them.
            team.barrier()
            total = sum(map(writer.unit_elements, units))
            done = 0
            for unit in units:
                writer.write_unit(unit, reader, check=_check_chunk)
                done += writer.unit_elements(unit)
                progress(done, total)
            team.barrier()
            if team.rank == 0:
                writer.commit(companions=hf_folder)
        except ValueError:
            writer.abort()
            raise
        team.barrier()


def megatron_to_hf(
    checkpoint: str | Path,
    out_folder: str | Path,
    *,
    dtype: torch.dtype | None,
    hf_config: str | Path | None,
    team: Team,
    progress: Progress,
    max_file_bytes: int = 5 << 30,
) -> None:
    """Converts the model of a ``torch_dist`` checkpoint, saved at any layout, into a Hugging Face folder.

    Resumes and fails as `hf_to_megatron` does.

    Args:
        dtype: type to write; None keeps the checkpoint's.
        hf_config: model folder with config and tokenizer, where none travels with the checkpoint.

    Raises:
        ValueError: for a broken, foreign or non-finite source, an existing destination.
    """
    checkpoint = Path(checkpoint)
    reader = TorchDistReader(checkpoint, checkpoint_shape(checkpoint, hf_config))
    shapes = {name: shape for entry in reader.params for name, shape in entry.param.hf}
    if team.rank:
        team.barrier()
    with ShardedWriter(
        out_folder,
        shapes,
        dtype=reader.dtype if dtype is None else dtype,
        source=_fingerprint(checkpoint),
        max_file_bytes=max_file_bytes,
        resume=True,
        rank=team.rank,
    ) as writer:
        if not team.rank:
            team.barrier()
        missing = set(writer.missing())
        entries = team.mine([e for e in reader.params if any(name in missing for name, _ in e.param.hf)])
        team.barrier()
        total = sum(map(_elements, entries))
        done = 0
        for entry in entries:
            _copy_parameter(reader, entry, writer, missing)
            done += _elements(entry)
            progress(done, total)
        team.barrier()
        if team.rank == 0:
            source = checkpoint / HF_FOLDER if hf_config is None else Path(hf_config)
            writer.commit(companions=source if source.is_dir() else source.parent)
    team.barrier()


def _copy_parameter(reader: TorchDistReader, entry: GlobalParam, writer: ShardedWriter, missing: set[str]) -> None:
    # A function of its own, so that nothing of one parameter is alive when the next is read.
    for name, tensor in reader.read(entry):
        if name in missing:
            cast = tensor.to(writer.dtype)
            _check_finite(name, f"{reader.folder} ({entry.keys[0]})", cast)
            writer.write(name, cast)


class ModelSource(Protocol):
    """A model on disk, whichever way it is stored."""

    shape: ModelShape

    def groups(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Hugging Face tensors, a Megatron parameter at a time, in the order of the mapping."""
        ...


class HfSource:
    """A Hugging Face folder, checked against its config.json on opening."""

    def __init__(self, folder: Path) -> None:
        self.shape = ModelShape.from_hf(folder)
        self._reader = CheckpointReader(folder)
        mapping = Mapping(self.shape, layout=Layout(), naming="local")
        self._params = mapping.params()
        self._reader.verify(mapping.hf_tensors(), tied=self.shape.tie_embeddings)

    def groups(self) -> Iterator[list[tuple[str, Tensor]]]:
        for param in self._params:
            yield [(name, self._reader.read_tensor(name)) for name, _ in param.hf]
        self._reader.close()


class MegatronSource:
    """A ``torch_dist`` checkpoint, checked against the config.json that travels with it on opening."""

    def __init__(self, folder: Path, hf_config: Path | None) -> None:
        self.shape = checkpoint_shape(folder, hf_config)
        self._reader = TorchDistReader(folder, self.shape)

    def groups(self) -> Iterator[list[tuple[str, Tensor]]]:
        for entry in self._reader.params:
            yield self._reader.read(entry)


def open_model(folder: str | Path, hf_config: str | Path | None = None) -> ModelSource:
    """Opens either kind of checkpoint.

    Raises:
        ValueError: where it is neither, or is broken, or does not fit its config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist")
    if is_torch_dist(folder):
        return MegatronSource(folder, None if hf_config is None else Path(hf_config))
    return HfSource(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDifference:
    """How one tensor of two checkpoints differs."""

    name: str
    dtypes: tuple[str, str]
    equal: bool
    """Bit by bit, or, for different types, value by value."""
    max_abs: float
    relative_norm: float
    """||a - b|| / ||a||, in fp32 (inf where a is zero and b is not)."""
    not_finite: tuple[int, int]
    """Elements of either side that are NaN or infinite."""


def compare(left: ModelSource, right: ModelSource) -> Iterator[TensorDifference]:
    """Compares tensor by tensor.

    Raises:
        CheckpointError: where the two are not the same architecture.
    """
    if left.shape != right.shape:
        fields = [f for f in left.shape.__dataclass_fields__ if getattr(left.shape, f) != getattr(right.shape, f)]
        named = ", ".join(f"{f} ({getattr(left.shape, f)!r}, {getattr(right.shape, f)!r})" for f in fields)
        raise CheckpointError(f"the checkpoints are of different models: {named}")
    for first, second in zip(left.groups(), right.groups(), strict=True):
        for (name, a), (other, b) in zip(first, second, strict=True):
            assert name == other, "both sides follow the mapping's order"
            yield _difference(name, a, b)


def _difference(name: str, a: Tensor, b: Tensor) -> TensorDifference:
    dtypes = (str(a.dtype).removeprefix("torch."), str(b.dtype).removeprefix("torch."))
    if a.dtype == b.dtype:
        # Integers of the same width compare NaNs and signed zeros by their bits.
        width = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
        equal = torch.equal(a.view(width), b.view(width))
    else:
        equal = torch.equal(a.float(), b.float())
    not_finite = int((~torch.isfinite(a)).sum()), int((~torch.isfinite(b)).sum())
    if equal:
        return TensorDifference(
            name=name, dtypes=dtypes, equal=True, max_abs=0.0, relative_norm=0.0, not_finite=not_finite
        )
    difference = a.float() - b.float()
    norm, scale = float(difference.norm()), float(a.float().norm())
    relative = norm / scale if scale else (float("inf") if norm else 0.0)
    return TensorDifference(
        name=name,
        dtypes=dtypes,
        equal=False,
        max_abs=float(difference.abs().max()),
        relative_norm=relative,
        not_finite=not_finite,
    )


def _elements(entry: GlobalParam) -> int:
    return sum(int(torch.Size(shape).numel()) for _, shape in entry.param.hf)


def _check_chunk(entry: GlobalParam, chunk: Tensor) -> None:
    _check_finite(", ".join(name for name, _ in entry.param.hf), entry.keys[0], chunk)


def _check_finite(name: str, where: str, tensor: Tensor) -> None:
    # The extremes tell without a temporary of the tensor's size: a NaN anywhere makes both NaN.
    if not all(map(math.isfinite, (float(extreme) for extreme in torch.aminmax(tensor)))):
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{name} holds {count} values that are not finite as {tensor.dtype} (in {where})")


def _fingerprint(folder: Path) -> str:
    """Names a source well enough to tell whether an interrupted conversion was of the same one."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return f"{folder.resolve()}:" + ",".join(
        f"{path.name}={path.stat().st_size}@{path.stat().st_mtime_ns}" for path in files
    )
