"""Writes a Hugging Face model as a Megatron ``torch_dist`` checkpoint: streaming, resumable, all or nothing.

Megatron loads the result at any layout. Parameters are written unit by unit (a layer at a time), one chunk in
memory; a journal records finished units, the index comes last, and the folder gets its name when all is there.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.safetensors_io import CheckpointError
from megatron_rlvr.weights.safetensors_writer import copy_companions
from megatron_rlvr.weights.slices import (
    Box,
    ShardSpec,
    SliceMap,
    SliceReader,
    box_shape,
    intersect,
    load_shard,
    shift_box,
)
from megatron_rlvr.weights.torch_dist_names import GlobalParam, global_params, layers_differ
from megatron_rlvr.weights.torch_dist_reader import CONFIG_FILE, HF_FOLDER, METADATA_FILE

_JOURNAL = "journal-{rank}.jsonl"
_PLAN = "plan.json"


class TorchDistWriter:
    """Writes one model into a new checkpoint folder.

    Several processes may write at once, each with its own ``rank``: rank 0 is constructed before the others, and
    commits after all have written (the caller's barriers).

    Example:
        >>> writer = TorchDistWriter(out, shape, layout=Layout(tp=2, pp=2), dtype=torch.bfloat16)
        >>> for unit in writer.missing():
        ...     writer.write_unit(unit, checkpoint)
        >>> writer.commit(companions=hf_folder)
    """

    def __init__(
        self,
        folder: str | Path,
        shape: ModelShape,
        *,
        layout: Layout,
        dtype: torch.dtype,
        vocab_multiple: int = 128,
        source: str = "",
        resume: bool = True,
        rank: int = 0,
    ) -> None:
        """Lays out the checkpoint, or takes up an interrupted write of the same model.

        Args:
            folder: destination; must not exist.
            layout: chunks are stored as a trainer of this layout would store them.
            dtype: type to write.
            vocab_multiple: as in `Mapping`.
            source: what the weights come from; an interrupted write is taken up only for the same source.
            resume: keep what an interrupted write has left.
            rank: this process among those that write the same folder.

        Raises:
            ValueError: where the destination exists or the layout does not fit the model.
        """
        self.folder = Path(folder)
        if self.folder.exists():
            raise ValueError(f"output folder must not exist, but {self.folder} does")
        mapping = Mapping(shape, layout=layout, naming="local", vocab_multiple=vocab_multiple)
        self.shape = shape
        self.layout = layout
        self.dtype = dtype
        self.params = global_params(shape, padded_vocab_size=mapping.padded_vocab_size, per_layer=layers_differ(shape))
        self._rank = rank
        self._partial = self.folder.with_name(f".{self.folder.name}.incomplete")
        self._units: dict[int, list[GlobalParam]] = {}
        for entry in self.params:
            self._units.setdefault(entry.unit, []).append(entry)
        if rank == 0:
            plan = {"source": source, "dtype": str(dtype), "layout": asdict(layout), "shape": asdict(shape),
                    "vocab": mapping.padded_vocab_size}  # fmt: skip
            self._prepare(json.dumps(plan), resume)
        self._done = self._read_journals()

    @property
    def units(self) -> list[int]:
        """Units in the order of the model: embedding, layers, head."""
        return sorted(self._units)

    def missing(self) -> list[int]:
        """Units that were not written when this process started, nor by itself since then."""
        return [unit for unit in self.units if unit not in self._done]

    def unit_elements(self, unit: int) -> int:
        """Elements of a unit, for progress."""
        return sum(int(torch.Size(entry.param.shard_shape).numel()) for entry in self._units[unit])

    def write_unit(self, unit: int, reader: SliceReader, *, check: Callable[[GlobalParam, Tensor], None]) -> None:
        """Writes the parameters of one unit into a file of its own.

        Args:
            reader: the Hugging Face tensors.
            check: is given every chunk before it is written, and raises where it must not be.
        """
        items: list[tuple[str, list[int] | None, int, int]] = []
        name = self._file(unit)
        with (self._partial / name).open("wb") as file:
            for entry in self._units[unit]:
                shards = self.layout.etp if entry.param.expert else self.layout.tp
                for box in entry.chunks(shards):
                    chunk = self._chunk(entry, box, reader)
                    check(entry, chunk)
                    offsets = [start for start, _ in entry.global_box(box)]
                    start = file.tell()
                    torch.save(chunk.view(*(1,) * len(entry.lead), *chunk.shape), file)
                    items += [(key, offsets, start, file.tell() - start) for key in entry.keys]
                extra = entry.extra_state_key()
                if extra is not None:
                    start = file.tell()
                    torch.save([None], file)
                    items.append((extra, None, start, file.tell() - start))
            file.flush()
            os.fsync(file.fileno())
        with (self._partial / _JOURNAL.format(rank=self._rank)).open("a", encoding="utf-8") as journal:
            journal.write("\n" + json.dumps({"unit": unit, "items": items}) + "\n")
        self._done[unit] = items

    def commit(self, *, companions: Path) -> None:
        """Checks that everything is there, writes the index, and gives the folder its final name.

        Args:
            companions: model folder whose config, tokenizer, generation and licence files are copied.

        Raises:
            CheckpointError: where units are missing.
        """
        self._done = self._read_journals() | self._done
        if absent := self.missing():
            raise CheckpointError(f"{self.folder}: {len(absent)} units were not written, first {absent[0]}")
        hf_folder = self._partial / HF_FOLDER
        hf_folder.mkdir(exist_ok=True)
        copy_companions(companions, hf_folder, dtype=self.dtype)
        torch.save({}, self._partial / "common.pt")
        with (self._partial / METADATA_FILE).open("wb") as file:
            pickle.dump(self._metadata(), file)
        for path in [self._partial / _PLAN, *self._partial.glob(_JOURNAL.format(rank="*"))]:
            path.unlink()
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
                  "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
        (self._partial / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        os.rename(self._partial, self.folder)

    def abort(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _chunk(self, entry: GlobalParam, box: Box, reader: SliceReader) -> Tensor:
        """A rectangle of the parameter, from the slices of Hugging Face tensors that lie in it."""
        whole = entry.param.shard(0)
        slices = []
        for piece in whole.slices:
            common = intersect(piece.shard_box, box)
            if common is not None:
                slices.append(
                    SliceMap(
                        piece.hf_name,
                        shift_box(common, piece.shard_box, piece.hf_box),
                        shift_box(common, box, tuple((0, stop - start) for start, stop in box)),
                    )
                )
        padding = [
            shift_box(common, box, tuple((0, stop - start) for start, stop in box))
            for rows in whole.padding
            if (common := intersect(rows, box)) is not None
        ]
        spec = ShardSpec(box_shape(box), tuple(slices), tuple(padding))
        chunk = load_shard(spec, reader, dtype=self.dtype).contiguous()
        # torch.save writes the whole storage, of which a slice may be a small part.
        return chunk if chunk.untyped_storage().nbytes() == chunk.nbytes else chunk.clone()

    def _metadata(self) -> Metadata:
        """The index of torch's distributed checkpoints."""
        state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for entry in self.params:
            shards = self.layout.etp if entry.param.expert else self.layout.tp
            for key in entry.keys:
                chunks = [
                    ChunkStorageMetadata(
                        torch.Size([start for start, _ in full]), torch.Size([stop - start for start, stop in full])
                    )
                    for full in map(entry.global_box, entry.chunks(shards))
                ]
                tensor = state.setdefault(
                    key,
                    TensorStorageMetadata(TensorProperties(dtype=self.dtype), torch.Size(entry.global_shape), []),
                )
                assert isinstance(tensor, TensorStorageMetadata)
                tensor.chunks.extend(chunks)
        for unit, items in self._done.items():
            for key, offsets, start, length in items:
                if offsets is None:
                    state[key] = BytesStorageMetadata()
                    index = MetadataIndex(key)
                else:
                    index = MetadataIndex(key, offsets)
                storage[index] = _StorageInfo(self._file(unit), start, length)
        return Metadata(state_dict_metadata=state, planner_data={}, storage_data=storage)  # type: ignore[arg-type]

    def _file(self, unit: int) -> str:
        """File of a unit, named after the pipeline stage that holds it."""
        per_stage = self.shape.num_layers // self.layout.pp
        stage = min(max(0, unit - 1) // per_stage, self.layout.pp - 1)
        return f"__{stage}_{unit}.distcp"

    def _prepare(self, plan: str, resume: bool) -> None:
        plan_path = self._partial / _PLAN
        if resume and plan_path.is_file() and plan_path.read_text(encoding="utf-8") == plan:
            return
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        plan_path.write_text(plan, encoding="utf-8")

    def _read_journals(self) -> dict[int, list]:
        done: dict[int, list] = {}
        for path in self._partial.glob(_JOURNAL.format(rank="*")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    # Cut off by a crash: the unit counts as not written.
                    continue
                done[entry["unit"]] = entry["items"]
        return done
