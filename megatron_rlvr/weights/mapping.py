"""Which rank holds which rectangle of which Hugging Face tensor, for one model in one layout.

The only place that turns the rules of `weights.families` into names, shapes and slices. Loading, export to
engines, conversion tools, checkpoint checks and the resharding plan all go through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from megatron_rlvr.weights.families import FAMILIES
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.rules import Kind, Place, Rule, joined_segments, split_axis
from megatron_rlvr.weights.slices import (
    Box,
    CoverageError,
    ShardSpec,
    SliceMap,
    axis_box,
    prove_exact_cover,
    whole_box,
)

Naming = Literal["local", "te"]
Allocator = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""Contiguous memory for a Hugging Face tensor, by name, shape and dtype."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range of one shard along the split axis; part None is padding."""

    part: int | None
    hf_start: int
    shard_start: int
    length: int


@lru_cache(maxsize=4096)
def _pieces(
    kind: Kind, sizes: tuple[int, ...], shards: int, groups: int, padding: int
) -> tuple[tuple[_Piece, ...], ...]:
    """Cuts the joined tensor into equal shards: pieces of each rank, in order."""
    segments = joined_segments(kind, sizes, shards=shards, groups=groups, padding=padding)
    total = sum(segment.length for segment in segments)
    if total % shards:
        raise ValueError(f"a parameter of {total} rows or columns cannot be cut into {shards} equal shards")
    per_rank = total // shards
    ranks: list[list[_Piece]] = [[] for _ in range(shards)]
    offset = 0
    for segment in segments:
        for rank in range(offset // per_rank, (offset + segment.length - 1) // per_rank + 1):
            start = max(offset, rank * per_rank)
            stop = min(offset + segment.length, (rank + 1) * per_rank)
            hf_start = segment.start + start - offset
            ranks[rank].append(_Piece(segment.part, hf_start, start - rank * per_rank, stop - start))
        offset += segment.length
    return tuple(map(tuple, ranks))


def _joined(parts: list[Tensor], axis: int, hf: tuple[str, tuple[int, ...]], into: Allocator | None) -> Tensor:
    if into is not None:
        out = into(hf[0], hf[1], parts[0].dtype)
        return out.copy_(parts[0]) if len(parts) == 1 else torch.cat(parts, axis, out=out)
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, axis)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamMap:
    """One Megatron parameter of one chunk and the Hugging Face tensors that it is made of."""

    name: str
    """As ``chunk.named_parameters()`` yields it: layers and experts counted inside the chunk."""
    kind: Kind
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes of the Hugging Face tensors, in the order of the rule."""
    num_shards: int
    """Tensor-parallel shards: tp, or etp for experts; 1 where every rank holds the whole parameter."""
    groups: int
    padding: int
    """Rows of vocabulary padding behind the joined tensor."""
    expert: bool
    """Sharded over the expert tensor-parallel group, and held by one expert-parallel rank."""
    expert_index: int | None
    """Which expert of the layer, counted over all ranks; None where `expert` is false."""
    duplicate: bool
    """A second copy (tied output layer on the last stage): loaded, but never exported."""

    @property
    def replicated(self) -> bool:
        """Whether every tensor-parallel rank holds the same whole parameter."""
        return self.kind is Kind.whole

    @property
    def axis(self) -> int:
        """Axis that tensor parallelism splits (0 where replicated)."""
        return split_axis(self.kind)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of every rank's shard."""
        first = self.hf[0][1]
        if self.replicated:
            return first
        total = sum(shape[self.axis] for _, shape in self.hf) + self.padding
        return tuple(total // self.num_shards if i == self.axis else size for i, size in enumerate(first))

    def shard(self, rank: int) -> ShardSpec:
        """What the shard of a tensor-parallel rank (for experts, of the expert tensor-parallel group) holds."""
        shape = self.shard_shape
        if self.replicated:
            name, hf_shape = self.hf[0]
            return ShardSpec(shape, (SliceMap(name, whole_box(hf_shape), whole_box(shape)),), ())
        slices: list[SliceMap] = []
        padding: list[Box] = []
        for piece in self._rank_pieces()[rank]:
            shard_box = axis_box(shape, self.axis, piece.shard_start, piece.length)
            if piece.part is None:
                padding.append(shard_box)
            else:
                name, hf_shape = self.hf[piece.part]
                slices.append(SliceMap(name, axis_box(hf_shape, self.axis, piece.hf_start, piece.length), shard_box))
        return ShardSpec(shape, tuple(slices), tuple(padding))

    def gather(self, shards: Sequence[Tensor], *, into: Allocator | None = None) -> list[tuple[str, Tensor]]:
        """Whole Hugging Face tensors from all tensor-parallel shards, one copy; empty for a duplicate.

        Args:
            shards: one tensor a rank, in rank order, any dtype and device (one alone where `replicated`).
            into: gives the memory of every result by name, shape and dtype, e.g. a place in a bucket that is
                used again and again: fresh memory for a large tensor costs more than the copy.

        Returns:
            Contiguous tensors under their Hugging Face names; without ``into``, where a shard is the whole tensor,
            the shard itself.
        """
        if self.duplicate:
            return []
        if len(shards) != self.num_shards or any(tuple(shard.shape) != self.shard_shape for shard in shards):
            raise ValueError(
                f"{self.name}: shards must be {self.num_shards} of shape {self.shard_shape}, "
                f"got {[tuple(shard.shape) for shard in shards]}"
            )
        if self.replicated:
            return [(self.hf[0][0], _joined([shards[0]], 0, self.hf[0], into))]
        views: list[list[tuple[int, Tensor]]] = [[] for _ in self.hf]
        for shard, pieces in zip(shards, self._rank_pieces(), strict=True):
            for piece in pieces:
                if piece.part is not None:
                    view = shard.narrow(self.axis, piece.shard_start, piece.length)
                    views[piece.part].append((piece.hf_start, view))
        return [
            (hf[0], _joined([view for _, view in sorted(parts, key=lambda part: part[0])], self.axis, hf, into))
            for hf, parts in zip(self.hf, views, strict=True)
        ]

    def _rank_pieces(self) -> tuple[tuple[_Piece, ...], ...]:
        sizes = tuple(shape[self.axis] for _, shape in self.hf)
        return _pieces(self.kind, sizes, self.num_shards, self.groups, self.padding)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What `Mapping.prove_complete` counted."""

    num_hf_tensors: int
    num_hf_elements: int
    num_shards: int
    """Distinct shards, replicas left out."""
    num_megatron_elements: int
    """Elements of those shards."""
    num_padding_elements: int
    num_duplicate_elements: int
    """Elements of the tied output layer's copy."""


class Mapping:
    """Names, shapes and slices of every shard of one model in one layout.

    Example:
        >>> mapping = Mapping(ModelShape.from_hf(folder), layout=Layout(tp=2, pp=2), naming="local")
        >>> for name, spec in mapping.shards(tp_rank=0, pp_rank=1).items():
        ...     parameters[name].copy_(load_shard(spec, checkpoint))
        >>> for param in mapping.params(pp_rank=1):
        ...     for hf_name, tensor in param.gather(all_gather(parameters[param.name])): ...
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        layout: Layout,
        naming: Naming,
        grouped_experts: bool = False,
        vocab_multiple: int = 128,
        padded_vocab_size: int | None = None,
    ) -> None:
        """Args:
            naming: parameter names of the local or of the transformer-engine layer spec.
            grouped_experts: experts are one TEGroupedMLP a layer instead of a SequentialMLP.
            vocab_multiple: the vocabulary is padded to the next multiple of this and of tp. The padded size is
                the same for every tp that divides ``vocab_multiple``, so checkpoints change layout freely.
            padded_vocab_size: instead, this size.

        Raises:
            ValueError: where the layout does not fit the model, or options contradict each other.
        """
        layout.check(shape)
        if naming not in ("local", "te"):
            raise ValueError(f"naming must be 'local' or 'te', got {naming!r}")
        if grouped_experts and naming == "local":
            raise ValueError("grouped_experts must be false with naming 'local': the legacy GroupedMLP transposes")
        if padded_vocab_size is None:
            multiple = math.lcm(vocab_multiple, layout.tp)
            padded_vocab_size = -(-shape.vocab_size // multiple) * multiple
        elif padded_vocab_size < shape.vocab_size or padded_vocab_size % layout.tp:
            raise ValueError(
                f"padded_vocab_size must be a multiple of tp ({layout.tp}) and at least {shape.vocab_size}, "
                f"got {padded_vocab_size}"
            )
        self.shape = shape
        self.layout = layout
        self.naming = naming
        self.grouped_experts = grouped_experts
        self.padded_vocab_size = padded_vocab_size
        self._rules = FAMILIES[shape.family].rules
        self._chunk_params: dict[tuple[int, int, int], list[ParamMap]] = {}

    def params(self, pp_rank: int = 0, vpp_rank: int | None = None, ep_rank: int = 0) -> list[ParamMap]:
        """Parameters of one chunk, in Hugging Face order: embedding, layers, final norm, output layer.

        Kept for the next call; do not change the list.
        """
        chunk = (pp_rank, 0 if vpp_rank is None else vpp_rank, ep_rank)
        if chunk not in self._chunk_params:
            self._chunk_params[chunk] = self._build_params(*chunk)
        return self._chunk_params[chunk]

    def shards(
        self, tp_rank: int = 0, pp_rank: int = 0, vpp_rank: int | None = None, ep_rank: int = 0, etp_rank: int = 0
    ) -> dict[str, ShardSpec]:
        """Shard of every parameter of one chunk on one rank, by ``chunk.named_parameters()`` name."""
        self._check_rank("tp_rank", tp_rank, self.layout.tp)
        self._check_rank("etp_rank", etp_rank, self.layout.etp)
        return {
            param.name: param.shard(etp_rank if param.expert else tp_rank)
            for param in self.params(pp_rank, vpp_rank, ep_rank)
        }

    def chunks(self) -> Iterator[tuple[int, int]]:
        """All (pp_rank, vpp_rank), in the order of the layers."""
        for vpp_rank in range(self.layout.vpp):
            for pp_rank in range(self.layout.pp):
                yield pp_rank, vpp_rank

    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model with its shape, independent of the layout."""
        one = Mapping(self.shape, layout=Layout(), naming=self.naming)
        return {name: shape for param in one._build_params(0, 0, 0) for name, shape in param.hf}

    def prove_complete(self) -> Coverage:
        """Proves by slice arithmetic that all shards together cover every Hugging Face element exactly once.

        Also that the slices and the padding of each shard cover the shard exactly once. Replicas (whole
        parameters on other tensor-parallel ranks, everything but experts on other expert-parallel ranks) and the
        tied output layer's copy count once; nothing is materialised.

        Raises:
            CoverageError: naming the tensor and the rectangles at fault.
        """
        expected = self.hf_tensors()
        covered: dict[str, list[Box]] = {name: [] for name in expected}
        num_shards = elements = padding = duplicate = 0
        for pp_rank, vpp_rank in self.chunks():
            for ep_rank in range(self.layout.ep):
                for param in self._build_params(pp_rank, vpp_rank, ep_rank):
                    if ep_rank and not param.expert:
                        continue
                    numel = math.prod(param.shard_shape)
                    for rank in range(1 if param.replicated else param.num_shards):
                        spec = param.shard(rank)
                        prove_exact_cover(
                            f"shard {rank} of {param.name} (pp {pp_rank}, vpp {vpp_rank}, ep {ep_rank})",
                            spec.shape,
                            [piece.shard_box for piece in spec.slices] + list(spec.padding),
                        )
                        if param.duplicate:
                            duplicate += numel
                            continue
                        num_shards += 1
                        elements += numel
                        padding += sum(math.prod(stop - start for start, stop in box) for box in spec.padding)
                        for piece in spec.slices:
                            if piece.hf_name not in covered:
                                raise CoverageError(f"{param.name}: {piece.hf_name} is no tensor of the model")
                            covered[piece.hf_name].append(piece.hf_box)
        for name, boxes in covered.items():
            prove_exact_cover(name, expected[name], boxes)
        num_hf = sum(map(math.prod, expected.values()))
        if elements != num_hf + padding:
            raise CoverageError(f"{elements} Megatron elements for {num_hf} elements and {padding} of padding")
        return Coverage(
            num_hf_tensors=len(expected),
            num_hf_elements=num_hf,
            num_shards=num_shards,
            num_megatron_elements=elements,
            num_padding_elements=padding,
            num_duplicate_elements=duplicate,
        )

    def _build_params(self, pp_rank: int, vpp_rank: int, ep_rank: int) -> list[ParamMap]:
        self._check_rank("pp_rank", pp_rank, self.layout.pp)
        self._check_rank("vpp_rank", vpp_rank, self.layout.vpp)
        self._check_rank("ep_rank", ep_rank, self.layout.ep)
        first = self.layout.is_first_chunk(pp_rank=pp_rank, vpp_rank=vpp_rank)
        last = self.layout.is_last_chunk(pp_rank=pp_rank, vpp_rank=vpp_rank)
        params: list[ParamMap] = []
        if first:
            params += self._of_place(Place.embedding)
        layers = self.layout.chunk_layers(self.shape.num_layers, pp_rank=pp_rank, vpp_rank=vpp_rank)
        for local_layer, layer in enumerate(layers):
            params += self._layer_params(local_layer, layer, ep_rank)
        if last:
            params += self._of_place(Place.final)
            if not self.shape.tie_embeddings:
                params += self._of_place(Place.untied_head)
            elif not first:
                params += self._of_place(Place.tied_head)
        return params

    def _layer_params(self, local_layer: int, layer: int, ep_rank: int) -> list[ParamMap]:
        moe = self.shape.is_moe_layer(layer)
        prefix = f"decoder.layers.{local_layer}."
        params: list[ParamMap] = []
        for rule in self._rules:
            if rule.place is Place.layer or rule.place is (Place.moe_layer if moe else Place.dense_layer):
                params.append(self._param(rule, prefix + self._name(rule), layer=layer))
        if moe:
            per_rank = self.shape.num_experts // self.layout.ep
            for local_expert in range(per_rank):
                for rule in self._rules:
                    if rule.place is Place.expert:
                        name = f"{prefix}mlp.experts.{self._expert_name(rule, local_expert)}"
                        params.append(self._param(rule, name, layer=layer, expert=ep_rank * per_rank + local_expert))
        return params

    def _of_place(self, place: Place) -> list[ParamMap]:
        return [self._param(rule, self._name(rule)) for rule in self._rules if rule.place is place]

    def _name(self, rule: Rule) -> str:
        return rule.te if self.naming == "te" and rule.te is not None else rule.local

    def _expert_name(self, rule: Rule, local_expert: int) -> str:
        # SequentialMLP has a module an expert; TEGroupedLinear has weight0, weight1, ... in one module.
        return f"{rule.local}{local_expert}" if self.grouped_experts else f"local_experts.{local_expert}.{rule.local}"

    def _param(self, rule: Rule, name: str, *, layer: int = 0, expert: int | None = None) -> ParamMap:
        hf = tuple(
            (
                tensor.name.format(layer=layer, expert=expert),
                tuple(self.shape.size(symbol) for symbol in tensor.symbols),
            )
            for tensor in rule.hf
        )
        shards = self.layout.etp if rule.place is Place.expert else self.layout.tp
        return ParamMap(
            name=name,
            kind=rule.kind,
            hf=hf,
            num_shards=1 if rule.kind is Kind.whole else shards,
            groups=self.shape.num_kv_heads,
            padding=self.padded_vocab_size - self.shape.vocab_size if rule.kind is Kind.vocab else 0,
            expert=rule.place is Place.expert,
            expert_index=expert,
            duplicate=rule.place is Place.tied_head,
        )

    @staticmethod
    def _check_rank(name: str, rank: int, size: int) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"{name} must be in [0, {size}), got {rank}")
