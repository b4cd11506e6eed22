"""A resharding plan from the point of view of single ranks: their steps, and where an engine rank puts what it gets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from megatron_rlvr.sync.exchange import Step
from megatron_rlvr.sync.plan import PlanBucket, ReshardPlan
from megatron_rlvr.weights.engine_params import EnginePlace
from megatron_rlvr.weights.slices import Box, box_elements, box_index, box_shape, shift_box


@dataclass(kw_only=True, slots=True)
class Placement:
    """Where the buckets of an engine rank go: plain numbers, as they travel to it.

    Example:
        >>> placement = Placement.from_json(text)
        >>> placement.check(parameters)
        >>> placement.store(bucket_tag, flat, parameters)
    """

    dtype: str
    """Type of all elements on the wire, a torch name without the prefix."""
    params: list[tuple[str, tuple[int, ...]]]
    """Name and shape of every parameter of the rank."""
    buckets: dict[int, list[tuple[int, Box]]]
    """By the bucket's place in the plan: its slices, each an index into `params` and a rectangle."""
    padded: list[str] = field(default_factory=list)
    """Parameters with rows behind the vocabulary that nobody sends."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Placement:
        raw = json.loads(text)
        return cls(
            dtype=raw["dtype"],
            params=[(name, tuple(shape)) for name, shape in raw["params"]],
            buckets={
                int(tag): [(index, tuple((start, stop) for start, stop in box)) for index, box in slices]
                for tag, slices in raw["buckets"].items()
            },
            padded=raw["padded"],
        )

    def check(self, parameters: dict[str, torch.Tensor]) -> None:
        """Refuses an engine whose parameters are not those of the plan, each filled exactly.

        Raises:
            ValueError: naming the parameters and what is odd about them.
        """
        expected = dict(self.params)
        if expected.keys() != parameters.keys():
            missing, extra = sorted(expected.keys() - parameters.keys()), sorted(parameters.keys() - expected.keys())
            raise ValueError(f"the engine's model has no {missing[:4]} and the plan no {extra[:4]}")
        for name, shape in self.params:
            tensor = parameters[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape} for this plan, got {tuple(tensor.shape)}")
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{name} must be a plain float32, bfloat16 or float16 tensor, got {tensor.dtype}")
        covered: dict[str, int] = defaultdict(int)
        for slices in self.buckets.values():
            for index, box in slices:
                covered[self.params[index][0]] += box_elements(box)
        for name, shape in self.params:
            if covered[name] != torch.Size(shape).numel() and name not in self.padded:
                raise ValueError(f"the plan fills {covered[name]} of {torch.Size(shape).numel()} elements of {name}")

    def store(self, tag: int, flat: torch.Tensor, parameters: dict[str, torch.Tensor]) -> None:
        """Copies a bucket into the parameters.

        Args:
            flat: uint8, the slices of the bucket end to end.
        """
        elements = flat.view(getattr(torch, self.dtype))
        first = 0
        for index, box in self.buckets[tag]:
            count = box_elements(box)
            target = parameters[self.params[index][0]][box_index(box)]
            target.copy_(elements[first : first + count].view(box_shape(box)))
            first += count


def place_buckets(plan: ReshardPlan, places: dict[str, EnginePlace], *, tp_rank: int, dtype: str) -> Placement:
    """The placement of one engine rank (the same for all servers).

    Args:
        places: of this rank, from `engine_places`.
        dtype: type on the wire.
    """
    shapes = {place.param: place.param_shape for place in places.values()}
    index_of = {name: index for index, name in enumerate(shapes)}
    filled: dict[str, int] = defaultdict(int)
    for place in places.values():
        filled[place.param] += box_elements(place.hf_box)
    buckets: dict[int, list[tuple[int, Box]]] = {}
    for tag, bucket in enumerate(plan.buckets):
        if tp_rank not in bucket.engine_tp_ranks:
            continue
        slices = []
        for piece in bucket.slices:
            place = places[piece.hf_name]
            lead = len(place.box) - len(place.hf_box)
            inside = shift_box(piece.box, place.hf_box, place.box[lead:])
            slices.append((index_of[place.param], (*place.box[:lead], *inside)))
        buckets[tag] = slices
    return Placement(
        dtype=dtype,
        params=list(shapes.items()),
        buckets=buckets,
        padded=[name for name, shape in shapes.items() if filled[name] != torch.Size(shape).numel()],
    )


def steps_by_rank(plan: ReshardPlan, host: Sequence[int]) -> dict[int, list[Step]]:
    """Every rank's steps, in the plan's order.

    Args:
        host: by the plan's global rank, the rank of the group that stands for it; a trainer rank that stands for an
            engine rank as well sends nothing to itself.
    """
    steps: dict[int, list[Step]] = defaultdict(list)
    for tag, bucket in enumerate(plan.buckets):
        source = host[bucket.source]
        senders: dict[int, int] = {}
        receivers: dict[int, list[int]] = defaultdict(list)
        takers = set()
        for hop in plan.hops(bucket):
            sender, receiver = host[hop.sender], host[hop.receiver]
            takers.add(receiver)
            if receiver not in (source, sender):
                senders[receiver] = sender
                receivers[sender].append(receiver)
        for rank in dict.fromkeys([source, *senders]):
            steps[rank].append(
                Step(
                    tag=tag,
                    sender=senders.get(rank),
                    receivers=tuple(receivers[rank]),
                    num_bytes=bucket.num_bytes,
                    takes=rank in takers,
                )
            )
    return steps


def talking_pairs(steps: dict[int, list[Step]]) -> list[tuple[int, int]]:
    """All pairs of ranks that exchange a message, lower rank first, in rising order."""
    return sorted(
        {(min(rank, to), max(rank, to)) for rank, own in steps.items() for step in own for to in step.receivers}
    )


def pack_bucket(
    bucket: PlanBucket, flat: torch.Tensor, rectangle: Callable[[str, Box], torch.Tensor], dtype: torch.dtype
) -> None:
    """Writes a bucket's slices end to end.

    Args:
        flat: uint8 [num_bytes].
        rectangle: `WeightSource.rectangle`.
        dtype: type on the wire; weights of another are converted.
    """
    elements = flat.view(dtype)
    first = 0
    for piece in bucket.slices:
        count = box_elements(piece.box)
        elements[first : first + count].view(box_shape(piece.box)).copy_(rectangle(piece.hf_name, piece.box))
        first += count
