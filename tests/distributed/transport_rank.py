"""One trainer rank that sends numbered weights to engines whose ranks run the real loader; rank 0 checks and writes.

Run by test_weight_transports.py with one JSON argument: a list of jobs and a file for what was counted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_rlvr.sync import colocated
from megatron_rlvr.sync.colocated import ColocatedTransport
from megatron_rlvr.sync.interfaces import EngineError, TensorMeta, WeightTransport
from megatron_rlvr.sync.shards import ShardTransport
from megatron_rlvr.sync.sliced import TrainerEnd
from megatron_rlvr.weights.engine_params import engine_places
from megatron_rlvr.weights.engine_slices import EngineLayout
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping, ParamMap
from megatron_rlvr.weights.slices import Box, SliceMap, box_index, box_shape, intersect, load_shard, shift_box
from tests.fakes.slice_engine import EngineRank, SliceEngine, hf_tensor


class Gate:
    """Agreement over the default group."""

    def barrier(self) -> None:
        dist.barrier()

    def gather_objects(self, value: object) -> list:
        values: list = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def gather_to_main(self, value: object) -> list | None:
        values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(value, values)
        return values


class Shards:
    """A `WeightSource` with this rank's shards of numbered weights and no model around them."""

    device = torch.device("cpu")
    takes_part = False

    def __init__(self, mapping: Mapping, dtype: torch.dtype, rank: int, tp_dp: int) -> None:
        layout = mapping.layout
        pp_rank, in_stage = divmod(rank, tp_dp)
        self.tp_rank, self.ep_rank = in_stage % layout.tp, in_stage % layout.ep
        self.dtype = dtype
        self.params: list[ParamMap] = [
            param
            for vpp_rank in range(layout.vpp)
            for param in mapping.params(pp_rank, vpp_rank, self.ep_rank)
            if not param.duplicate
        ]
        self.shards: list[torch.Tensor] = []
        self.held: dict[str, list[tuple[int, SliceMap]]] = {}

    def set_version(self, version: int) -> None:
        shapes = {name: shape for param in self.params for name, shape in param.hf}

        class Reader:
            def read(self, name: str, box: Box) -> torch.Tensor:
                return hf_tensor(name, shapes[name], torch.float32, version)[box_index(box)]

        self.shards, self.held = [], {}
        for index, param in enumerate(self.params):
            spec = param.shard(0 if param.expert or param.replicated else self.tp_rank)
            self.shards.append(load_shard(spec, Reader(), dtype=self.dtype))
            for piece in spec.slices:
                self.held.setdefault(piece.hf_name, []).append((index, piece))

    def units(self) -> list[list[TensorMeta]]:
        return []

    def gather(self, unit: int, *, into: Callable[..., torch.Tensor]) -> None:
        raise AssertionError("slices are not gathered")

    def rectangle(self, hf_name: str, box: Box) -> torch.Tensor:
        for index, piece in self.held[hf_name]:
            if intersect(piece.hf_box, box) == box:
                return self.shards[index][box_index(shift_box(box, piece.hf_box, piece.shard_box))]
        raise KeyError(hf_name)


def run(job: dict[str, Any], engines: list[SliceEngine]) -> dict[str, Any]:
    """Two transfers of different weights; what they counted, on rank 0."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = Layout(**job["layout"])
    shape = ModelShape.from_hf(job["model"])
    mapping = Mapping(shape, layout=layout, naming="local")
    sent, held = job["dtype"], job.get("engine_dtype", job["dtype"])
    source = Shards(mapping, getattr(torch, sent), rank, world // layout.pp)
    engine = EngineLayout(tp=job["engine_tp"], ep=job.get("engine_ep", 1), replicas=job["replicas"])
    places = [engine_places(shape, engine, tp_rank) for tp_rank in range(engine.tp)]
    if rank == 0:
        shapes = [{place.param: place.param_shape for place in of_rank.values()} for of_rank in places]
        if "spoil" in job:
            shapes[0][job["spoil"]] = (3, 3)
        for server in engines:
            server.ask([{"do": "build", "shapes": of_rank, "dtype": held} for of_rank in shapes])
    trainer = TrainerEnd(
        mapping=mapping,
        dtype=getattr(torch, sent),
        dp=world // layout.tp // layout.pp,
        rank=rank,
        gate=Gate(),
        host="127.0.0.1",
    )
    if job["transport"] == "shards":
        transport: ShardTransport | ColocatedTransport = ShardTransport(
            engines,
            trainer=trainer,
            ep=engine.ep,
            bucket_bytes=job["bucket_bytes"],
            backend="gloo",
            timeout_s=60.0,
        )
    else:
        transport = ColocatedTransport(
            engines, trainer=trainer, ep=engine.ep, first_device=0, bucket_bytes=job["bucket_bytes"], timeout_s=60.0
        )
    hf_shapes = mapping.hf_tensors()

    def differing(version: int, among: list[SliceEngine]) -> list[list[Any]]:
        """By engine and rank, the tensors that are not those of the version; on rank 0."""
        questions = [
            {
                "do": "compare",
                "version": version,
                "sent": sent,
                "places": {
                    name: (place.param, hf_shapes[name], box_index(place.hf_box), box_index(place.box))
                    for name, place in of_rank.items()
                },
            }
            for of_rank in places
        ]
        return [server.ask(questions) for server in among] if rank == 0 else []

    result: dict[str, Any] = {"received": [], "sent": [], "differing": []}
    for version in range(2):
        source.set_version(version)
        try:
            num_bytes, received = transfer(transport, source)
        except EngineError as error:
            transport.close()
            return {"error": str(error)}
        result["sent"].append(Gate().gather_objects(num_bytes))
        result["received"].append([received[server.url] for server in engines])
        result["differing"].append(differing(version, engines))
    if "flip" in job:
        result["faults"] = faults(job, transport, source, engines, differing)
    width = getattr(torch, sent).itemsize
    result["held"] = [
        sum(torch.Size(box_shape(place.hf_box)).numel() for place in of_rank.values()) * width for of_rank in places
    ]
    result["turns"] = transport.num_turns
    transport.close()
    return result


def transfer(transport: WeightTransport, source: Shards) -> tuple[int, dict[str, list[int]]]:
    """One transfer; bytes that this rank sent, and, on rank 0, by engine what its ranks counted."""
    transport.prepare(source)
    num_bytes, received = 0, {server.url: [0] * server.num_ranks for server in transport.engines}
    turn = 0
    while turn < transport.num_turns:
        stats = transport.send(turn)
        num_bytes += stats.num_bytes
        for url, counts in (stats.received_bytes or {}).items():
            received[url] = [a + b for a, b in zip(received[url], counts, strict=True)]
        turn += 1
    return num_bytes, received


def faults(
    job: dict[str, Any],
    transport: WeightTransport,
    source: Shards,
    engines: list[SliceEngine],
    differing: Callable[[int, list[SliceEngine]], list[list[Any]]],
) -> dict[str, Any]:
    """A byte turns in what rank `flip` hands on, then (colocated) the last engine is lost; a transfer after each."""
    found: dict[str, Any] = {"errors": [], "differing": []}

    def fails(version: int) -> None:
        source.set_version(version)
        try:
            transfer(transport, source)
        except EngineError as error:
            found["errors"].append((str(error), error.url))

    def works(version: int, among: list[SliceEngine]) -> None:
        transport.use_engines(among)
        source.set_version(version)
        transfer(transport, source)
        found["differing"].append(differing(version, among))

    with turning_a_byte(job["transport"]) if dist.get_rank() == job["flip"] else nullcontext():
        fails(2)
    works(2, engines)
    if job["transport"] == "colocated":
        engines[-1].lost = True
        fails(3)
        works(3, engines[:-1])
    return found


@contextmanager
def turning_a_byte(transport: str) -> Iterator[None]:
    """Of the first bucket that this rank sends, or of what it hands to the engine rank beside it."""
    send, pack = dist.isend, colocated.pack_payload
    flips = iter([True])

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() and next(flips, False):
            tensor = tensor.clone()
            tensor[tensor.numel() // 2] ^= 1
        return tensor

    if transport == "shards":
        replaced = mock.patch.object(dist, "isend", lambda tensor, **kwargs: send(turned(tensor), **kwargs))
    else:
        replaced = mock.patch.object(colocated, "pack_payload", lambda text, flat: pack(text, turned(flat)))
    with replaced:
        yield


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    num_processes = max(job["replicas"] * job["engine_tp"] for job in task["jobs"])
    processes = [EngineRank() for _ in range(num_processes)] if os.environ["RANK"] == "0" else []
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        results = []
        for job in task["jobs"]:
            tp = job["engine_tp"]
            engines = [
                SliceEngine(f"http://server{i}", tp, processes[i * tp : (i + 1) * tp]) for i in range(job["replicas"])
            ]
            results.append(run(job, engines))
    finally:
        for process in processes:
            process.end()
    if rank == 0:
        Path(task["out"]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
