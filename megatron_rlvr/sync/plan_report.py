"""What a resharding plan costs: bytes per rank and link, lower bounds, seconds for given link rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rlvr.sync.plan import ReshardPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRates:
    """Rates of one GPU's links, each direction on its own.

    The defaults are round figures of a node with 8 GPUs, NVLink and one 400 Gbit/s adapter a GPU.
    """

    intra_gb_per_s: float = 300.0
    """GB/s (1e9 bytes) to the other GPUs of the node."""
    inter_gb_per_s: float = 40.0
    """GB/s to other nodes."""
    latency_s: float = 30e-6
    """Seconds that a message takes besides its bytes."""

    def check(self) -> None:
        """Raises:
        ValueError: for a rate that is not positive.
        """
        for name in ("intra_gb_per_s", "inter_gb_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.latency_s < 0:
            raise ValueError(f"latency_s must be at least 0, got {self.latency_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCost:
    """Counted, not estimated, except for the fields in seconds."""

    sent_intra: np.ndarray
    """int64 [ranks] bytes that each global rank sends inside its node."""
    sent_inter: np.ndarray
    """int64 [ranks] bytes that it sends to other nodes."""
    received_intra: np.ndarray
    received_inter: np.ndarray
    messages: np.ndarray
    """int64 [ranks] messages sent or received."""
    needed: np.ndarray
    """int64 [ranks] bytes of the slices that each engine rank holds: the least that it can receive."""
    model_bytes: int
    longest_chain: tuple[int, int]
    """Messages (between nodes, inside a node) that a bucket passes one after the other, at most."""
    largest_bucket: int

    @property
    def received(self) -> np.ndarray:
        return self.received_intra + self.received_inter

    def received_over_bound(self) -> float:
        """Largest ratio of bytes received to bytes needed over the engine ranks (1.0 is the least)."""
        engines = self.needed > 0
        return float(np.max(self.received[engines] / self.needed[engines]))

    def predicted_seconds(self, rates: LinkRates) -> float:
        """Time of the busiest link with all buckets pipelined, the way of the last bucket down its chain, and latency.

        Links are taken as full duplex and independent of each other; receiving ranks as never late.
        """
        inter = np.maximum(self.sent_inter, self.received_inter) / (rates.inter_gb_per_s * 1e9)
        intra = np.maximum(self.sent_intra, self.received_intra) / (rates.intra_gb_per_s * 1e9)
        inter_hops, intra_hops = self.longest_chain
        fill = self.largest_bucket * max(0, inter_hops - 1) / (rates.inter_gb_per_s * 1e9)
        fill += self.largest_bucket * max(0, intra_hops - (inter_hops == 0)) / (rates.intra_gb_per_s * 1e9)
        latency = rates.latency_s * (int(self.messages.max()) + inter_hops + intra_hops)
        return float(np.max(np.maximum(inter, intra))) + fill + latency


def count_cost(plan: ReshardPlan) -> PlanCost:
    """Walks every message of the plan."""
    ranks = plan.num_ranks
    sent = np.zeros((2, ranks), dtype=np.int64)
    received = np.zeros((2, ranks), dtype=np.int64)
    messages = np.zeros(ranks, dtype=np.int64)
    needed_by_tp_rank = np.zeros(plan.engine.tp, dtype=np.int64)
    routes: dict[tuple[object, ...], _Route] = {}
    longest = (0, 0)
    for bucket in plan.buckets:
        # The chain after its first hop depends only on who needs the bucket, the turn and the source's node.
        source_node = int(plan.node_of_rank[bucket.source])
        by_node = plan.receivers(bucket.engine_tp_ranks)
        period = math.lcm(len(by_node), *map(len, by_node.values()))
        key = (bucket.engine_tp_ranks, bucket.turn % period, source_node)
        if key not in routes:
            routes[key] = _Route.of([(hop.sender, hop.receiver, hop.inter_node) for hop in plan.hops(bucket)])
        route = routes[key]
        first = int(route.first_inter)
        sent[first, bucket.source] += bucket.num_bytes
        messages[bucket.source] += 1
        for inter in (0, 1):
            # Within one bucket a rank sends at most once on each kind of link, so plain indexing adds correctly.
            sent[inter, route.senders[inter]] += bucket.num_bytes
            received[inter, route.receivers[inter]] += bucket.num_bytes
            messages[route.senders[inter]] += 1
            messages[route.receivers[inter]] += 1
        needed_by_tp_rank[list(bucket.engine_tp_ranks)] += bucket.num_bytes
        longest = max(longest, route.length)
    needed = np.concatenate(
        [np.zeros(plan.trainer.num_ranks, dtype=np.int64), np.tile(needed_by_tp_rank, plan.engine.replicas)]
    )
    return PlanCost(
        sent_intra=sent[0],
        sent_inter=sent[1],
        received_intra=received[0],
        received_inter=received[1],
        messages=messages,
        needed=needed,
        model_bytes=plan.num_elements * plan.bytes_per_element,
        longest_chain=longest,
        largest_bucket=max((bucket.num_bytes for bucket in plan.buckets), default=0),
    )


@dataclass(frozen=True, slots=True)
class _Route:
    """Messages of a chain as index arrays, by kind of link (0 inside a node, 1 between nodes)."""

    first_inter: bool
    senders: tuple[np.ndarray, np.ndarray]
    """Forwarding ranks; the source is left out."""
    receivers: tuple[np.ndarray, np.ndarray]
    length: tuple[int, int]

    @classmethod
    def of(cls, hops: list[tuple[int, int, bool]]) -> _Route:
        senders: tuple[list[int], list[int]] = ([], [])
        receivers: tuple[list[int], list[int]] = ([], [])
        depth: dict[int, tuple[int, int]] = {hops[0][0]: (0, 0)}
        for index, (sender, receiver, inter) in enumerate(hops):
            receivers[inter].append(receiver)
            if index:
                senders[inter].append(sender)
            across, inside = depth[sender]
            depth[receiver] = (across + 1, inside) if inter else (across, inside + 1)
        return cls(
            hops[0][2],
            (np.array(senders[0], dtype=np.int64), np.array(senders[1], dtype=np.int64)),
            (np.array(receivers[0], dtype=np.int64), np.array(receivers[1], dtype=np.int64)),
            max(depth.values()),
        )


def lower_bound_seconds(plan: ReshardPlan, cost: PlanCost, rates: LinkRates) -> float:
    """No plan is faster: every engine rank takes in what it holds, every node takes in each of its bytes once, and
    the trainer's nodes send every byte of the model out once."""
    if int(plan.node_of_rank.max()) == 0:
        return max(
            int(cost.needed.max()) / (rates.intra_gb_per_s * 1e9),
            cost.model_bytes / (plan.trainer.num_ranks * rates.intra_gb_per_s * 1e9),
        )
    trainers = plan.trainer.num_ranks
    engine_nodes = plan.node_of_rank[trainers:]
    tp_rank = np.arange(plan.engine.num_ranks) % plan.engine.tp
    bound = cost.model_bytes / (trainers * rates.inter_gb_per_s * 1e9)
    # A rank may take in bytes by both kinds of link at once.
    bound = max(bound, int(cost.needed.max()) / ((rates.intra_gb_per_s + rates.inter_gb_per_s) * 1e9))
    seen: dict[frozenset[int], int] = {}
    for node in np.unique(engine_nodes):
        members = tp_rank[engine_nodes == node]
        held = frozenset(members.tolist())
        if held not in seen:
            seen[held] = sum(bucket.num_bytes for bucket in plan.buckets if held & set(bucket.engine_tp_ranks))
        bound = max(bound, seen[held] / (len(members) * rates.inter_gb_per_s * 1e9))
    return bound


def describe(plan: ReshardPlan, cost: PlanCost, rates: LinkRates) -> str:
    """The plan's figures as text."""
    trainer, layout, engine = plan.trainer, plan.trainer.layout, plan.engine
    trainers, node_of = trainer.num_ranks, plan.node_of_rank
    engine_ranks = slice(trainers, None)
    sources = cost.sent_intra[:trainers] + cost.sent_inter[:trainers]
    axes = f"tp={layout.tp} pp={layout.pp} vpp={layout.vpp} dp={trainer.dp} ep={layout.ep} etp={layout.etp}"
    predicted, bound = cost.predicted_seconds(rates), lower_bound_seconds(plan, cost, rates)
    rows = [
        ("trainer", f"{axes}: {trainers} ranks on {len(np.unique(node_of[:trainers]))} nodes"),
        (
            "engines",
            f"tp={engine.tp} ep={engine.ep} replicas={engine.replicas}: {engine.num_ranks} ranks "
            f"on {len(np.unique(node_of[trainers:]))} nodes",
        ),
        ("model", f"{plan.num_elements:,} elements, {_size(cost.model_bytes)}"),
        (
            "plan",
            f"{sum(len(bucket.slices) for bucket in plan.buckets):,} slices in {len(plan.buckets):,} buckets "
            f"of at most {_size(cost.largest_bucket)}",
        ),
        ("sent by a trainer rank", f"{_size(sources.min())} to {_size(sources.max())}"),
        (
            "forwarded by an engine",
            f"at most {_size(cost.sent_inter[engine_ranks].max())} between nodes, "
            f"{_size(cost.sent_intra[engine_ranks].max())} inside",
        ),
        (
            "received by an engine",
            f"{_size(cost.received[engine_ranks].min())} to {_size(cost.received[engine_ranks].max())}, "
            f"{cost.received_over_bound():.3f} of what it holds, "
            f"{cost.received[engine_ranks].max() / cost.model_bytes:.1%} of a broadcast",
        ),
        ("links between nodes", f"{_size(cost.sent_inter.sum())} in all"),
        ("links inside nodes", f"{_size(cost.sent_intra.sum())} in all"),
        (
            "predicted",
            f"{predicted:.3g} s at {rates.inter_gb_per_s:g} GB/s between and {rates.intra_gb_per_s:g} GB/s inside "
            f"nodes (lower bound {bound:.3g} s)",
        ),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def as_json(plan: ReshardPlan, cost: PlanCost, rates: LinkRates) -> dict[str, Any]:
    """The whole plan in plain types: layouts, costs per rank, and every bucket with its chain and slices."""
    layout = plan.trainer.layout
    return {
        "trainer": {
            "tp": layout.tp,
            "pp": layout.pp,
            "vpp": layout.vpp,
            "dp": plan.trainer.dp,
            "ep": layout.ep,
            "etp": layout.etp,
        },
        "engine": {"tp": plan.engine.tp, "ep": plan.engine.ep, "replicas": plan.engine.replicas},
        "node_of_rank": plan.node_of_rank.tolist(),
        "bytes_per_element": plan.bytes_per_element,
        "model_bytes": cost.model_bytes,
        "predicted_seconds": cost.predicted_seconds(rates),
        "lower_bound_seconds": lower_bound_seconds(plan, cost, rates),
        "ranks": {
            "sent_intra": cost.sent_intra.tolist(),
            "sent_inter": cost.sent_inter.tolist(),
            "received_intra": cost.received_intra.tolist(),
            "received_inter": cost.received_inter.tolist(),
            "needed": cost.needed.tolist(),
        },
        "buckets": [
            {
                "source": bucket.source,
                "chain": plan.chain(bucket),
                "bytes": bucket.num_bytes,
                "slices": [[piece.hf_name, piece.box] for piece in bucket.slices],
            }
            for bucket in plan.buckets
        ],
    }


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
