"""A static plan of weight transfer, shard to shard: who sends which slice to whom, in which bucket and order.

Every engine rank receives the slices that it holds, once, and nothing else. A slice leaves a trainer rank (data
parallel replicas take turns, the least loaded first) and then runs along a chain: from node to node through one
entry rank each, and inside a node from the entry to the others that hold the same slice. So each byte leaves a node
at most once and enters a node at most once, and no rank sends a byte more than twice.

The plan's order is total: a rank that works off its buckets in this order never waits in a circle.
Global ranks: the trainer's first (Megatron's order tp-cp-ep-dp-pp), then the engines', server by server.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from megatron_rlvr.weights.engine_slices import EngineLayout, engine_boxes, expert_box
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping, ParamMap
from megatron_rlvr.weights.slices import Box, axis_box, box_elements, box_shape, intersect


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerLayout:
    """Megatron's ranks: axes that cut weights, and data-parallel replicas.

    Example:
        >>> TrainerLayout(layout=Layout(tp=4, pp=4, ep=8), dp=2).num_ranks
        32
    """

    layout: Layout
    dp: int = 1
    """Data-parallel size of dense parameters (context parallelism counts in)."""

    @property
    def num_ranks(self) -> int:
        return self.layout.tp * self.layout.pp * self.dp

    def check(self) -> None:
        """Raises:
        ValueError: where expert ranks do not fit into a pipeline stage.
        """
        if self.dp < 1:
            raise ValueError(f"dp must be at least 1, got {self.dp}")
        stage, expert = self.layout.tp * self.dp, self.layout.ep * self.layout.etp
        if stage % expert:
            raise ValueError(f"tp * dp ({stage}) must be a multiple of ep * etp ({expert})")

    def dense_holders(self, pp_rank: int, tp_rank: int) -> tuple[int, ...]:
        """Global ranks that hold a dense shard."""
        tp, dp = self.layout.tp, self.dp
        return tuple(tp_rank + tp * (replica + dp * pp_rank) for replica in range(dp))

    def stage_ranks(self, pp_rank: int) -> tuple[int, ...]:
        """Global ranks of a pipeline stage; all hold its replicated parameters."""
        size = self.layout.tp * self.dp
        return tuple(range(size * pp_rank, size * (pp_rank + 1)))

    def expert_holders(self, pp_rank: int, ep_rank: int, etp_rank: int) -> tuple[int, ...]:
        """Global ranks that hold a shard of an expert of this expert-parallel rank."""
        etp, ep = self.layout.etp, self.layout.ep
        replicas = self.layout.tp * self.dp // (etp * ep)
        return tuple(etp_rank + etp * (ep_rank + ep * (r + replicas * pp_rank)) for r in range(replicas))


def place_on_nodes(num_trainer_ranks: int, num_engine_ranks: int, gpus_per_node: int) -> np.ndarray:
    """Node of every global rank, int64 [trainer + engine ranks].

    Nodes are filled in order; engines start on a node of their own, unless everything fits on one.
    """
    if num_trainer_ranks + num_engine_ranks <= gpus_per_node:
        return np.zeros(num_trainer_ranks + num_engine_ranks, dtype=np.int64)
    first = -(-num_trainer_ranks // gpus_per_node)
    return np.concatenate(
        [np.arange(num_trainer_ranks) // gpus_per_node, first + np.arange(num_engine_ranks) // gpus_per_node]
    )


@dataclass(frozen=True, slots=True)
class PlannedSlice:
    """A rectangle of a Hugging Face tensor."""

    hf_name: str
    box: Box


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanBucket:
    """Slices that go the same way together."""

    source: int
    """Global rank of the trainer rank that sends it."""
    engine_tp_ranks: tuple[int, ...]
    """Ranks of every server that hold these slices."""
    slices: tuple[PlannedSlice, ...]
    num_bytes: int
    turn: int
    """Rotates the chain, so that entry ranks take turns."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One message of a bucket."""

    sender: int
    receiver: int
    inter_node: bool


@dataclass(kw_only=True, slots=True)
class ReshardPlan:
    """Transfers from one trainer layout to one engine layout, in the order in which they happen."""

    trainer: TrainerLayout
    engine: EngineLayout
    node_of_rank: np.ndarray
    """int64 [trainer + engine ranks]."""
    buckets: list[PlanBucket]
    bytes_per_element: int
    num_elements: int
    """Elements of the model's Hugging Face tensors."""
    _receivers: dict[tuple[int, ...], dict[int, list[int]]] = field(default_factory=dict, repr=False)

    @property
    def num_ranks(self) -> int:
        return self.trainer.num_ranks + self.engine.num_ranks

    def engine_rank(self, replica: int, tp_rank: int) -> int:
        """Global rank of a server's tensor-parallel rank."""
        return self.trainer.num_ranks + replica * self.engine.tp + tp_rank

    def receivers(self, engine_tp_ranks: tuple[int, ...]) -> dict[int, list[int]]:
        """Engine ranks of all servers that hold what these tensor-parallel ranks hold, by node in rising order."""
        if engine_tp_ranks not in self._receivers:
            by_node: dict[int, list[int]] = defaultdict(list)
            for replica in range(self.engine.replicas):
                for tp_rank in engine_tp_ranks:
                    rank = self.engine_rank(replica, tp_rank)
                    by_node[int(self.node_of_rank[rank])].append(rank)
            self._receivers[engine_tp_ranks] = dict(sorted(by_node.items()))
        return self._receivers[engine_tp_ranks]

    def chain(self, bucket: PlanBucket) -> list[list[int]]:
        """Engine ranks that receive a bucket, grouped by node in the order of the chain; the first of a node is its
        entry."""
        by_node = self.receivers(bucket.engine_tp_ranks)
        nodes = list(by_node)
        # A node that the source runs on comes first: its copy costs no link between nodes.
        own = int(self.node_of_rank[bucket.source])
        start = nodes.index(own) if own in by_node else bucket.turn % len(nodes)
        chain = []
        for node in nodes[start:] + nodes[:start]:
            members = by_node[node]
            shift = bucket.turn % len(members)
            chain.append(members[shift:] + members[:shift])
        return chain

    def hops(self, bucket: PlanBucket) -> Iterator[Hop]:
        """Messages of a bucket; a rank that forwards sends to the next node first."""
        chain = self.chain(bucket)
        previous = bucket.source
        for members in chain:
            yield Hop(previous, members[0], bool(self.node_of_rank[previous] != self.node_of_rank[members[0]]))
            previous = members[0]
        for members in chain:
            for sender, receiver in pairwise(members):
                yield Hop(sender, receiver, False)


def build_plan(
    mapping: Mapping,
    *,
    dp: int,
    engine: EngineLayout,
    bytes_per_element: int = 2,
    bucket_bytes: int = 256 << 20,
    gpus_per_node: int = 8,
) -> ReshardPlan:
    """Plans the transfer of one model.

    Args:
        mapping: the model in the trainer's layout.
        dp: data-parallel size of the trainer.
        bytes_per_element: of the type that is sent.
        bucket_bytes: upper bound of one bucket; larger slices are cut along their first axis.
        gpus_per_node: ranks of one node.

    Raises:
        ValueError: where a layout does not fit the model.
    """
    trainer = TrainerLayout(layout=mapping.layout, dp=dp)
    trainer.check()
    engine.check(mapping.shape)
    if bucket_bytes < 1 << 10 or gpus_per_node < 1:
        raise ValueError(
            f"bucket_bytes must be at least 1024 and gpus_per_node at least 1, got {bucket_bytes}, {gpus_per_node}"
        )
    builder = _PlanBuilder(mapping, trainer, engine, bytes_per_element, bucket_bytes)
    num_elements = 0
    for pp_rank, vpp_rank in mapping.chunks():
        for ep_rank in range(mapping.layout.ep):
            for param in mapping.params(pp_rank, vpp_rank, ep_rank):
                if (param.expert or ep_rank == 0) and not param.duplicate:
                    num_elements += builder.add(param, pp_rank, ep_rank)
    return ReshardPlan(
        trainer=trainer,
        engine=engine,
        node_of_rank=place_on_nodes(trainer.num_ranks, engine.num_ranks, gpus_per_node),
        buckets=builder.finish(),
        bytes_per_element=bytes_per_element,
        num_elements=num_elements,
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """A slice of one parameter, before it has a name: the same for all parameters of the same pattern."""

    part: int
    shard: int | None
    """Tensor-parallel shard that holds it; None where all do."""
    box: Box
    engine_tp_ranks: tuple[int, ...]
    num_bytes: int


class _PlanBuilder:
    """Packs slices of the same way into buckets and gives each to the least loaded holder."""

    def __init__(
        self,
        mapping: Mapping,
        trainer: TrainerLayout,
        engine: EngineLayout,
        bytes_per_element: int,
        bucket_bytes: int,
    ) -> None:
        self.mapping = mapping
        self.trainer = trainer
        self.engine = engine
        self.bytes_per_element = bytes_per_element
        self.bucket_bytes = bucket_bytes
        self._cuts: dict[tuple, list[_Cut]] = {}
        self._holders: dict[tuple, tuple[int, ...]] = {}
        self._open: dict[tuple, list[PlannedSlice]] = defaultdict(list)
        self._open_bytes: dict[tuple, int] = defaultdict(int)
        self._sent: dict[int, int] = defaultdict(int)
        self._turns: dict[tuple[int, ...], int] = defaultdict(int)
        self._buckets: list[PlanBucket] = []

    def add(self, param: ParamMap, pp_rank: int, ep_rank: int) -> int:
        """Plans one parameter (all its shards); returns its Hugging Face elements."""
        for cut in self._cuts_of(param, ep_rank):
            way = (pp_rank, ep_rank if param.expert else None, cut.shard, cut.engine_tp_ranks)
            if self._open_bytes[way] + cut.num_bytes > self.bucket_bytes:
                self._close(way)
            self._open[way].append(PlannedSlice(param.hf[cut.part][0], cut.box))
            self._open_bytes[way] += cut.num_bytes
        return sum(int(np.prod(shape)) for _, shape in param.hf)

    def finish(self) -> list[PlanBucket]:
        """All buckets; those of different sources alternate, so that all links work from the start."""
        for way in list(self._open):
            self._close(way)
        number: dict[int, int] = defaultdict(int)
        order = []
        for bucket in self._buckets:
            order.append((number[bucket.source], bucket.source, bucket))
            number[bucket.source] += 1
        return [bucket for _, _, bucket in sorted(order, key=lambda entry: entry[:2])]

    def _close(self, way: tuple) -> None:
        slices = self._open.pop(way, [])
        num_bytes = self._open_bytes.pop(way, 0)
        if not slices:
            return
        source = min(self._holders_of(way), key=lambda rank: (self._sent[rank], rank))
        self._sent[source] += num_bytes
        need = way[3]
        self._buckets.append(
            PlanBucket(
                source=source,
                engine_tp_ranks=need,
                slices=tuple(slices),
                num_bytes=num_bytes,
                turn=self._turns[need],
            )
        )
        self._turns[need] += 1

    def _holders_of(self, way: tuple) -> tuple[int, ...]:
        pp_rank, ep_rank, shard, _ = way
        key = (pp_rank, ep_rank, shard)
        if key not in self._holders:
            if ep_rank is not None:
                self._holders[key] = self.trainer.expert_holders(pp_rank, ep_rank, shard)
            elif shard is None:
                self._holders[key] = self.trainer.stage_ranks(pp_rank)
            else:
                self._holders[key] = self.trainer.dense_holders(pp_rank, shard)
        return self._holders[key]

    def _cuts_of(self, param: ParamMap, ep_rank: int) -> list[_Cut]:
        shapes = tuple(shape for _, shape in param.hf)
        expert = param.expert_index
        engine_part = None if expert is None else expert // (self.mapping.shape.num_experts // self.engine.ep)
        key = (param.kind, shapes, param.num_shards, engine_part)
        if key not in self._cuts:
            self._cuts[key] = [
                piece
                for part, shape in enumerate(shapes)
                for cut in self._cuts_of_part(param, part, shape, expert)
                for piece in self._bounded(cut)
            ]
        return self._cuts[key]

    def _cuts_of_part(self, param: ParamMap, part: int, shape: tuple[int, ...], expert: int | None) -> list[_Cut]:
        if expert is None:
            wanted = engine_boxes(param.kind, part, shape, self.engine.tp, param.groups)
        else:
            wanted = expert_box(param.kind, part, shape, expert, self.mapping.shape.num_experts, self.engine)
        name = param.hf[part][0]
        cuts = []
        for rank in range(1 if param.replicated else param.num_shards):
            for piece in param.shard(rank).slices:
                if piece.hf_name != name:
                    continue
                receivers: dict[Box, list[int]] = defaultdict(list)
                for tp_rank, box in enumerate(wanted):
                    common = None if box is None else intersect(piece.hf_box, box)
                    if common is not None:
                        receivers[common].append(tp_rank)
                # A single dense shard is on every rank of the stage; a single expert shard is not.
                shard = None if param.num_shards == 1 and expert is None else rank
                for box, ranks in receivers.items():
                    cuts.append(_Cut(part, shard, box, tuple(ranks), box_elements(box) * self.bytes_per_element))
        return cuts

    def _bounded(self, cut: _Cut) -> Iterator[_Cut]:
        if cut.num_bytes <= self.bucket_bytes:
            yield cut
            return
        shape = box_shape(cut.box)
        rows = max(1, shape[0] * self.bucket_bytes // cut.num_bytes)
        first = cut.box[0][0]
        for start in range(0, shape[0], rows):
            length = min(rows, shape[0] - start)
            piece = axis_box(shape, 0, start, length)
            box = ((first + start, first + start + length), *cut.box[1:])
            yield _Cut(cut.part, cut.shard, box, cut.engine_tp_ranks, box_elements(piece) * self.bytes_per_element)
