"""Engines and a transport inside the test's process: weights are dicts, faults are told in advance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_rlvr.sync.interfaces import BucketCallback, Engine, TransferStats, WeightSource
from megatron_rlvr.types import EngineAddress, EngineError, EngineSilentError, TensorMeta
from megatron_rlvr.weights.mapping import Allocator
from megatron_rlvr.weights.slices import Box, box_index


class MemoryEngine:
    """An engine that keeps what it is given and refuses to serve a mixture.

    Attributes:
        weights: name to tensor.
        calls: control calls, in order.
        faults: by call, the error to raise, taken from the front; a list that ends raises no more.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.num_ranks = 1
        self.weights: dict[str, torch.Tensor] = {}
        self.version = 0
        self.paused = False
        self.dead = False
        self.silent = False
        self.calls: list[str] = []
        self.faults: dict[str, list[EngineError | None]] = {}
        self.checksums: dict[str, str] = {}
        """What it says of its parameters."""
        self.on_end: Callable[[], object] = lambda: None
        """Called when an update ends."""

    def _called(self, name: str, *words: str) -> None:
        self.calls.append(" ".join([name, *words]))
        if self.dead:
            raise EngineError(f"POST {self.url}/{name}: Connection refused", url=self.url)
        if self.silent:
            raise EngineSilentError(f"POST {self.url}/{name}: no answer within 1 s", url=self.url)
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if fault is not None:
            raise fault

    def refuse(self, name: str, message: str = "refused by the test") -> None:
        """Makes the next call of this name fail."""
        self.faults.setdefault(name, []).append(EngineError(f"POST {self.url}/{name}: {message}", url=self.url))

    def serve(self) -> tuple[int, float]:
        """A "response": the version and the only value that all weights share.

        Raises:
            AssertionError: it is paused, or holds a mixture.
        """
        assert not self.paused, f"{self.url} is paused"
        values = {float(tensor.flatten()[0]) for tensor in self.weights.values()}
        assert len(values) == 1, f"{self.url} serves a mixture of {values}"
        return self.version, values.pop()

    def freeze_gc(self) -> None:
        self._called("freeze_gc")

    def settle(self, *, timeout_s: float | None = None) -> None:
        self._called("settle")

    def pause(self, mode: str) -> None:
        self._called("pause")
        self.paused = True

    def resume(self) -> None:
        self._called("resume")
        self.paused = False

    def begin_update(self) -> None:
        self._called("begin_update")

    def end_update(self) -> None:
        self._called("end_update")
        self.on_end()

    def release_memory(self, tags: Sequence[str]) -> None:
        self._called("release_memory", *tags)

    def resume_memory(self, tags: Sequence[str]) -> None:
        self._called("resume_memory", *tags)

    def init_group(
        self, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        self._called("init_group")

    def destroy_group(self, group_name: str) -> None:
        self._called("destroy_group")

    def update_from_distributed(
        self, metas: Sequence[TensorMeta], *, group_name: str, weight_version: int | None
    ) -> None:
        self._called("update_from_distributed")

    def update_from_tensors(self, payloads: Sequence[str], *, load_format: str) -> None:
        self._called("update_from_tensors")

    def update_from_disk(self, path: str, *, weight_version: int) -> None:
        self._called("update_from_disk")
        assert self.paused
        self.weights = {"disk": torch.tensor([float(path.rsplit("-", 1)[-1])])}

    def set_weight_version(self, version: int) -> None:
        self._called("set_weight_version")
        self.version = version

    def weight_version(self) -> str:
        self._called("weight_version")
        return str(self.version)

    def flush_cache(self) -> None:
        self._called("flush_cache")

    def weights_checksums(self, *, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        self._called("weights_checksums")
        return [{name: sums for name, sums in self.checksums.items() if name not in skip}]

    def prompt_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        self._called("prompt_logprobs")
        assert not self.paused
        return [-float(token) for token in input_ids[1:]]


class DictSource:
    """All of the weights, on one rank, each tensor a unit of its own."""

    takes_part = True
    device = torch.device("cpu")

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights = dict(weights)

    def units(self) -> list[list[TensorMeta]]:
        return [
            [TensorMeta(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))]
            for name, tensor in self.weights.items()
        ]

    def gather(self, unit: int, *, into: Allocator) -> None:
        name, tensor = list(self.weights.items())[unit]
        into(name, tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def rectangle(self, hf_name: str, box: Box) -> torch.Tensor:
        return self.weights[hf_name][box_index(box)]


class DirectTransport:
    """Hands each engine one tensor after the other; an engine that fails breaks the transfer for all."""

    num_turns = 1

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.group_changes: list[list[str]] = []
        self.before_tensor: Callable[[int], None] = lambda index: None

    def use_engines(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.group_changes.append([engine.url for engine in engines])

    def connect(self) -> None:
        pass

    def prepare(self, source: WeightSource, *, on_bucket: BucketCallback | None = None) -> None:
        self._source = source

    def send(self, turn: int) -> TransferStats:
        stats = TransferStats()
        assert isinstance(self._source, DictSource)
        for index, (name, tensor) in enumerate(self._source.weights.items()):
            self.before_tensor(index)
            for engine in self.engines:
                assert isinstance(engine, MemoryEngine)
                engine._called("update")
                assert engine.paused
                engine.weights[name] = tensor.clone()
            stats.num_bytes += tensor.nbytes
        return stats

    def close(self) -> None:
        self.engines = []


class OneRank:
    """Agreement of a single trainer rank."""

    def barrier(self) -> None:
        pass

    def gather_objects(self, value: object) -> list:
        return [value]


def address(name: str, *, restarts: int = 0) -> EngineAddress:
    """Of a server called `name`."""
    return EngineAddress(id=name, url=f"http://{name}", num_ranks=1, restarts=restarts)
