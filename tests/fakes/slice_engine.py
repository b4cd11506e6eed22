"""A server whose ranks run the weight loader for real, on parameters without a model; each rank is a process."""

from __future__ import annotations

import base64
import multiprocessing
import pickle
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatron_rlvr.sync import engine_loader
from megatron_rlvr.types import EngineError


def hf_tensor(name: str, shape: Sequence[int], dtype: torch.dtype, version: int) -> torch.Tensor:
    """What the Hugging Face tensor of a name holds in a version."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {version}".encode()))
    return torch.randn(tuple(shape), generator=generator).to(dtype)


class EngineRank:
    """One process that answers questions; several engines may have it one after the other.

    Forked, so that it has torch at once: start it before this process has threads.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()

    def ask(self, question: Mapping[str, Any]) -> Any:
        """The answer, once the question has been dealt with."""
        self._connection.send(question)
        return self._connection.recv()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


class SliceEngine:
    """The part of `sync.interfaces.Engine` that hands payloads to ranks.

    Args:
        ranks: a process each; none where this process does not control the engine.

    Attributes:
        lost: whether nobody answers any more.
    """

    def __init__(self, url: str, num_ranks: int, ranks: Sequence[EngineRank]) -> None:
        self.url = url
        self.num_ranks = num_ranks
        self.lost = False
        self._ranks = list(ranks)

    def ask(self, questions: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One question a rank, answered at the same time."""
        with ThreadPoolExecutor(self.num_ranks) as threads:
            return list(threads.map(EngineRank.ask, self._ranks, questions))

    def update_from_tensors(self, payloads: Sequence[str], *, load_format: str) -> None:
        if self.lost:
            raise EngineError(f"POST {self.url}/update_weights_from_tensor: Connection refused", url=self.url)
        self.ask([{"do": "load", "payload": payload, "loader": load_format} for payload in payloads])


class _Model:
    """Parameters under their names, which is all that a loader looks at."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters

    def named_modules(self) -> list[tuple[str, torch.nn.Module]]:
        return []

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.parameters.items())


def _serve(connection: Connection) -> None:
    model = _Model({})
    while True:
        question = connection.recv()
        answer: Any = None
        if question["do"] == "build":
            dtype = getattr(torch, question["dtype"])
            shapes = question["shapes"].items()
            model = _Model(
                {n: torch.nn.Parameter(torch.full(s, torch.nan, dtype=dtype), requires_grad=False) for n, s in shapes}
            )
        elif question["do"] == "load":
            assert question["loader"] == engine_loader.LOADER
            engine_loader.load(model, pickle.loads(base64.b64decode(question["payload"])))  # type: ignore[arg-type]
        else:
            answer = _differing(model, question)
        connection.send(answer)


def _differing(model: _Model, question: Mapping[str, Any]) -> list[str]:
    """Names of tensors that are not what they should be."""
    wrong = []
    for name, (param, hf_shape, hf_index, index) in question["places"].items():
        held = model.parameters[param].data[index]
        expected = hf_tensor(name, hf_shape, getattr(torch, question["sent"]), question["version"])[hf_index]
        if not torch.equal(held.reshape(expected.shape), expected.to(held.dtype)):
            wrong.append(name)
    return wrong
