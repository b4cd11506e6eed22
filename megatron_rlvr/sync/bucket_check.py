"""Checksums of broadcast buckets: a server tells what it made of each one before the next is sent.

Stock SGLang checks nothing of what a broadcast brings, but tells a checksum of any of its parameters. The rank that
sends a bucket sums the parameters that the bucket completes, as each engine rank must hold them, while the bucket is
under way, and every server is asked for the same ones as soon as it has loaded it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from megatron_rlvr.sync.buckets import meta_bytes
from megatron_rlvr.sync.interfaces import Engine, TensorMeta, WeightBucket
from megatron_rlvr.sync.parameter_sums import ParameterSums, compare_checksums
from megatron_rlvr.weights.engine_params import EnginePlace


class BucketCheck:
    """What servers must hold of the buckets that one rank sends.

    Args:
        places: where Hugging Face tensors lie on each rank of an engine of a given tensor-parallel size.
        dtype: of the engines' parameters.

    Example:
        >>> check.begin([2])
        >>> skip = check.announce(bucket.metas, last=False)
        >>> check.add(bucket)
        >>> check.compare(engine, engine.weights_checksums(skip=skip))
    """

    def __init__(self, *, places: Callable[[int], Sequence[Mapping[str, EnginePlace]]], dtype: torch.dtype) -> None:
        self._places = places
        self._dtype = dtype
        self._layouts: dict[int, Sequence[Mapping[str, EnginePlace]]] = {}
        self._sums: dict[int, ParameterSums] = {}
        self._awaited: dict[str, set[str]] = {}
        """By parameter, the Hugging Face tensors of it that are still to be announced."""
        self._param_of: dict[str, str] = {}
        self._due: list[str] = []
        """Parameters that are whole and of which no server has been asked."""
        self._can_skip = True
        """Whether servers leave out what they are told to; old ones sum all of their parameters at every question."""

    def begin(self, tp_sizes: Iterable[int]) -> None:
        """A transfer begins, to engines of these tensor-parallel sizes."""
        sizes = sorted(set(tp_sizes))
        self._layouts = {tp: self._layouts[tp] if tp in self._layouts else self._places(tp) for tp in sizes}
        self._sums = {tp: ParameterSums(ranks, self._dtype) for tp, ranks in self._layouts.items()}
        self._due = []
        self._awaited = {}
        self._param_of = {}
        for ranks in self._layouts.values():
            for places in ranks:
                for hf_name, place in places.items():
                    self._awaited.setdefault(place.param, set()).add(hf_name)
                    self._param_of[hf_name] = place.param

    def announce(self, metas: Iterable[TensorMeta], *, last: bool) -> list[str] | None:
        """The parameters to leave out when servers are asked after this bucket; None: they need not be asked.

        Args:
            metas: of the bucket.
            last: whether this rank has no other bucket.
        """
        for meta in metas:
            param = self._param_of[meta.name]
            self._awaited[param].discard(meta.name)
            if not self._awaited[param]:
                self._due.append(param)
        if not self._due or not (last or self._can_skip):
            return None
        return sorted(self._awaited.keys() - set(self._due))

    def add(self, bucket: WeightBucket) -> None:
        """Sums what a bucket brings; reads its memory."""
        offset = 0
        for meta in bucket.metas:
            end = offset + meta_bytes(meta)
            tensor = bucket.flat[offset:end].view(getattr(torch, meta.dtype)).view(meta.shape)
            for sums in self._sums.values():
                sums.add(meta.name, tensor)
            offset = end
        assert offset == math.prod(bucket.flat.shape)

    def compare(self, answers: Sequence[tuple[Engine, Sequence[Mapping[str, str]]]]) -> None:
        """Compares what every server answered after the bucket that was added last.

        Raises:
            WeightMismatchError: naming the server and the parameters that differ.
        """
        due, self._due = set(self._due), []
        for engine, held in answers:
            expected = self._sums[engine.num_ranks].checksums
            self._can_skip &= all(name in due for name in self._param_of.values() if name in held[0])
            compare_checksums(engine, held, {name: expected[name] for name in due})
        for sums in self._sums.values():
            for name in due:
                del sums.checksums[name]
