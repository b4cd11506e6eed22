"""What an engine says of its parameters, and what it must say: SGLang's own checksums, on both sides."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

import torch

from megatron_rlvr.sync.gpu_checksum import tile_checksum
from megatron_rlvr.sync.interfaces import Engine, EngineError
from megatron_rlvr.weights.engine_params import EnginePlace
from megatron_rlvr.weights.slices import box_index, box_shape

Checksums = Mapping[str, Sequence[str | None]]
"""By parameter, the checksum on every tensor-parallel rank; None where a rank holds nothing of it."""


class WeightMismatchError(EngineError):
    """A server holds other weights than were exported, or computes something else with them."""


class ParameterSums:
    """Checksums of an engine's parameters, put together from Hugging Face tensors as they come.

    Args:
        ranks: where Hugging Face tensors lie on each rank.
        dtype: of the engine's parameters.
        unchecked: parameters to leave out.

    Example:
        >>> sums = ParameterSums(ranks, torch.bfloat16)
        >>> sums.add("model.norm.weight", tensor)
        >>> sums.checksums["model.norm.weight"][0]
        '9f86d081884c7d65'
    """

    def __init__(
        self, ranks: Sequence[Mapping[str, EnginePlace]], dtype: torch.dtype, unchecked: Collection[str] = ()
    ) -> None:
        self._ranks = ranks
        self._dtype = dtype
        self._unchecked = unchecked
        self._missing: list[dict[str, int]] = []
        """By rank, elements of each parameter that have not come yet."""
        for places in ranks:
            missing: dict[str, int] = {}
            for place in places.values():
                missing[place.param] = missing.get(place.param, 0) + math.prod(box_shape(place.box))
            self._missing.append(missing)
        self._partial: dict[tuple[int, str], torch.Tensor] = {}
        self.checksums: dict[str, list[str | None]] = {}
        """Of the parameters that are whole, by name: the checksum on every rank; None where it holds nothing of it."""

    def wants(self, hf_name: str) -> bool:
        """Whether a tensor belongs to a parameter that is checked."""
        return any(hf_name in places and places[hf_name].param not in self._unchecked for places in self._ranks)

    def add(self, hf_name: str, tensor: torch.Tensor) -> None:
        """Lays one tensor into every rank's parameter; sums those that are whole."""
        for rank, places in enumerate(self._ranks):
            place = places.get(hf_name)
            if place is None or place.param in self._unchecked:
                continue
            piece = tensor[box_index(place.hf_box)].to(self._dtype)
            key = (rank, place.param)
            if key not in self._partial:
                # What an engine pads a vocabulary with is zero.
                self._partial[key] = torch.zeros(place.param_shape, dtype=self._dtype, device=tensor.device)
            self._partial[key][box_index(place.box)] = piece.reshape(box_shape(place.box))
            self._missing[rank][place.param] -= piece.numel()
            if self._missing[rank][place.param] == 0:
                sums = self.checksums.setdefault(place.param, [None] * len(self._ranks))
                sums[rank] = checksum(self._partial.pop(key))


def compare_checksums(engine: Engine, held: Sequence[Mapping[str, str]], expected: Checksums) -> None:
    """Compares what an engine said of its parameters with what they must be.

    Args:
        held: of every rank, by parameter; others may be among them.

    Raises:
        WeightMismatchError: naming the parameters that differ.
    """
    wrong = []
    for name, sums in expected.items():
        for rank, checksum in enumerate(sums):
            found = held[rank].get(name)
            if checksum is not None and found != checksum:
                where = f"{name} on rank {rank}" if engine.num_ranks > 1 else name
                wrong.append(f"{where} ({'not there' if found is None else f'{found} instead of {checksum}'})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightMismatchError(
            f"{engine.url} holds other weights than were sent: {', '.join(wrong[:3])}{more}", url=engine.url
        )


def checksum(tensor: torch.Tensor) -> str:
    """SGLang's own checksum of a parameter, 16 hexadecimal digits: by another algorithm on a GPU than on a CPU.

    Source: ``weight_checker._hash_tensor`` and ``mm_utils.tensor_hash`` of SGLang 0.5.21.
    """
    if tensor.is_cuda:
        return f"{tile_checksum(tensor):016x}"
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).digest()[:8].hex()  # type: ignore[arg-type]
