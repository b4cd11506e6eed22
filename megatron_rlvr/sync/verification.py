"""Whether an engine holds what the trainer has exported, bit for bit, and computes with it what the trainer computes.

Servers tell a checksum of each of their parameters on each tensor-parallel rank. The trainer gathers the same
parameters once more, apart from what was sent, lays them out as an engine does (`weights.engine_params`), and takes the
same checksum. A byte that turned anywhere between the two shows, with the name of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_rlvr.sync.interfaces import Engine, StageGate, WeightSource
from megatron_rlvr.sync.parameter_sums import ParameterSums, WeightMismatchError, compare_checksums
from megatron_rlvr.weights.engine_params import EnginePlace

SAMPLE_EVERY = 8
"""With `sample`, every sync checks another eighth of the parameters."""


class Probe(Protocol):
    """Log-probs of a fixed prompt, from the trainer."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def tolerance(self) -> float:
        """Nats that kernels and precision may account for."""
        ...

    def logprobs(self) -> Sequence[float]:
        """Of all tokens but the first; collective over the trainer's ranks, the same on all of them."""
        ...


@dataclass(kw_only=True, slots=True)
class Expected:
    """What engines must hold after one sync."""

    checksums: dict[int, dict[str, list[str | None]]]
    """By tensor-parallel size, then parameter: the checksum on every rank; None where it holds nothing of it."""
    logprobs: Sequence[float] | None

    @property
    def num_checked(self) -> int:
        """Parameters of an engine that are compared."""
        return max((len(sums) for sums in self.checksums.values()), default=0)


class WeightVerifier:
    """Compares engines with the trainer's weights; every trainer rank has one.

    Args:
        places: where Hugging Face tensors lie on each rank of an engine of a given tensor-parallel size.
        dtype: of the engines' parameters.
        sample: whether each sync checks an eighth of the parameters and one engine's log-probs, instead of all.
        every_parameter: whether all parameters are checked all the same, for a way of the weights that checks nothing.
        gate: agreement of the trainer's ranks.
        probe: gives log-probs; None leaves them out.
    """

    def __init__(
        self,
        *,
        places: Callable[[int], Sequence[Mapping[str, EnginePlace]]],
        dtype: torch.dtype,
        sample: bool,
        gate: StageGate,
        probe: Probe | None,
        every_parameter: bool = False,
    ) -> None:
        self._places = places
        self._dtype = dtype
        self._sample = sample
        self._every = SAMPLE_EVERY if sample and not every_parameter else 1
        self._gate = gate
        self._probe = probe
        self._turn = 0
        self._layouts: dict[int, Sequence[Mapping[str, EnginePlace]]] = {}
        self._unchecked: set[str] = set()

    def choose(self, tp_sizes: Iterable[int]) -> list[str]:
        """Begins the check of one sync; the engine's parameters that it leaves out, the same on every rank.

        Args:
            tp_sizes: tensor-parallel sizes of the engines.
        """
        known = self._layouts
        self._layouts = {tp: known[tp] if tp in known else self._places(tp) for tp in sorted(set(tp_sizes))}
        names = sorted({place.param for ranks in self._layouts.values() for rank in ranks for place in rank.values()})
        self._unchecked = {name for index, name in enumerate(names) if (index + self._turn) % self._every}
        self._turn += 1
        return sorted(self._unchecked)

    def expect(self, source: WeightSource) -> Expected:
        """Gathers and sums what was chosen; collective over the trainer's ranks."""
        sums = {tp: ParameterSums(ranks, self._dtype, self._unchecked) for tp, ranks in self._layouts.items()}
        if source.takes_part:
            self._gather(source, list(sums.values()))
        merged: dict[int, dict[str, list[str | None]]] = {tp: {} for tp in self._layouts}
        for part in self._gate.gather_objects({tp: each.checksums for tp, each in sums.items()}):
            for tp, checksums in part.items():
                merged[tp].update(checksums)
        logprobs = self._probe.logprobs() if self._probe is not None else None
        return Expected(checksums=merged, logprobs=logprobs)

    def _gather(self, source: WeightSource, sums: Sequence[ParameterSums]) -> None:
        for unit, metas in enumerate(source.units()):
            if not any(each.wants(meta.name) for each in sums for meta in metas):
                continue
            tensors: dict[str, torch.Tensor] = {}

            def place(name: str, shape: tuple[int, ...], dtype: torch.dtype, into=tensors) -> torch.Tensor:
                into[name] = torch.empty(shape, dtype=dtype, device=source.device)
                return into[name]

            source.gather(unit, into=place)
            for each in sums:
                for name, tensor in tensors.items():
                    each.add(name, tensor)

    def asked(self, engines: Sequence[Engine], version: int) -> Sequence[Engine]:
        """The engines whose log-probs are checked after this sync: all, or with `sample` one after the other."""
        return [engines[version % len(engines)]] if self._sample and engines else engines

    @staticmethod
    def check_weights(engine: Engine, held: Sequence[Mapping[str, str]], expected: Expected) -> None:
        """Compares what an engine said of its parameters.

        Args:
            held: `Engine.weights_checksums` without those that `choose` left out.

        Raises:
            WeightMismatchError: naming the parameters that differ.
        """
        compare_checksums(engine, held, expected.checksums[engine.num_ranks])

    def check_logprobs(self, engine: Engine, expected: Expected) -> float:
        """The largest difference of a log-prob, nats; 0 without a probe.

        Raises:
            WeightMismatchError: it is above the probe's tolerance.
        """
        if self._probe is None or expected.logprobs is None:
            return 0.0
        found = engine.prompt_logprobs(self._probe.input_ids)
        largest = float(np.max(np.abs(np.subtract(found, expected.logprobs))))  # NaN stays NaN
        if not largest <= self._probe.tolerance:
            raise WeightMismatchError(
                f"{engine.url} gives the probe prompt log-probs that are off by {largest:.2g} nats "
                f"(at most {self._probe.tolerance:g})",
                url=engine.url,
            )
        return largest
