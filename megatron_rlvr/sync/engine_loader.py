"""Runs inside a server's tensor-parallel ranks, as SGLang's ``--custom-weight-loader``: takes the slices of one rank.

SGLang calls `load` in every rank with that rank's entry of an ``update_weights_from_tensor`` request. The entry is a
list of (message, tensor): the message, JSON, says what to do; the tensor carries a bucket where trainer and engine
share a machine, and is empty where buckets come through a process group. What happened goes to a store of the
trainer's under the key that the message names: an exception here would end the server.

Knows neither SGLang nor Megatron; needs nothing but torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlvr.sync.exchange import Exchange, Step, difference
from megatron_rlvr.sync.process_group import join_group, join_store, leave_group
from megatron_rlvr.sync.rank_plan import Placement

LOADER = "megatron_rlvr.sync.engine_loader.load"
"""What servers are started with and updates name."""

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class _Transfer:
    """What this rank keeps of a trainer from one update to the next."""

    placement: Placement
    store: dist.TCPStore
    steps: list[Step] = field(default_factory=list)
    exchange: Exchange | None = None


_transfers: dict[str, _Transfer] = {}
"""By the name that the trainer gave; the newest alone is kept."""


def load(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """What SGLang calls.

    Args:
        model: this rank's model; its parameters are written in place.
        named_tensors: (message, tensor) pairs of this rank.
    """
    for text, tensor in named_tensors:
        message = json.loads(text)
        report: dict[str, Any] = {}
        try:
            report = _ACTIONS[message["action"]](message, tensor, model)
        except Exception as error:  # noqa: BLE001 - the edge of a foreign process, which an exception would end
            _log.exception("weight transfer %s", message["action"])
            report = {"error": f"{type(error).__name__}: {error}"}
        try:
            _store_of(message).set(message["report"], json.dumps(report))
        except (dist.DistError, RuntimeError):
            _log.exception("weight transfer %s: the trainer cannot be told", message["action"])


def _open(message: dict[str, Any], tensor: torch.Tensor, model: torch.nn.Module) -> dict[str, Any]:
    """Checks a placement against the model and keeps it."""
    for name, old in _transfers.items():
        if old.exchange is not None:
            leave_group(old.exchange.group, broken=True)
        _log.info("weight transfer %s is replaced by %s", name, message["name"])
    _transfers.clear()
    placement = Placement.from_json(message["placement"])
    placement.check(_parameters(model))
    for name, module in model.named_modules():
        # Some backends of fused experts want gate and up the other way round, which shapes do not show.
        if getattr(getattr(module, "quant_method", None), "load_up_proj_weight_first", False):
            raise ValueError(f"{name} keeps up above gate in its w13_weight, which no plan writes")
    _transfers[message["name"]] = _Transfer(placement=placement, store=_store_of(message))
    return {}


def _join(message: dict[str, Any], tensor: torch.Tensor, model: torch.nn.Module) -> dict[str, Any]:
    """Joins the group of a transfer that has been opened, and meets the ranks that it will talk to."""
    transfer = _transfers[message["name"]]
    device = next(iter(_parameters(model).values())).device
    group = join_group(
        transfer.store,
        rank=message["rank"],
        world_size=message["world_size"],
        name=message["name"],
        backend=message["backend"],
        timeout_s=message["timeout_s"],
    )
    transfer.steps = [Step(**{**raw, "receivers": tuple(raw["receivers"])}) for raw in message["steps"]]
    transfer.exchange = Exchange(group, device)
    with _leaving_on_failure(transfer):
        transfer.exchange.meet([(low, high) for low, high in message["pairs"]])
    return {}


def _receive(message: dict[str, Any], tensor: torch.Tensor, model: torch.nn.Module) -> dict[str, Any]:
    """Takes one transfer from the group, forwarding what others need."""
    transfer = _transfers[message["name"]]
    assert transfer.exchange is not None, "join comes before receive"
    placement, parameters = transfer.placement, _parameters(model)

    def fill(step: Step, flat: torch.Tensor) -> None:
        raise AssertionError(f"bucket {step.tag} has no sender")

    def take(step: Step, arrived: torch.Tensor) -> None:
        placement.store(step.tag, arrived[: step.num_bytes], parameters)

    with _leaving_on_failure(transfer):
        counted = transfer.exchange.run(transfer.steps, fill=fill, take=take)
    return {"received_bytes": counted.received_bytes}


@contextmanager
def _leaving_on_failure(transfer: _Transfer) -> Iterator[None]:
    """Ranks that wait for this one learn of its failure by its leaving, and not at their time-out."""
    assert transfer.exchange is not None
    try:
        yield
    except (dist.DistError, RuntimeError):
        leave_group(transfer.exchange.group, broken=True)
        transfer.exchange = None
        raise


def _copy(message: dict[str, Any], tensor: torch.Tensor, model: torch.nn.Module) -> dict[str, Any]:
    """Takes buckets out of the tensor that came with the message."""
    placement, parameters = _transfers[message["name"]].placement, _parameters(model)
    differences = []
    for tag, start, num_bytes, message_bytes in message["buckets"]:
        differences.append(difference(tensor[start : start + message_bytes]))
        placement.store(tag, tensor[start : start + num_bytes], parameters)
    if tensor.is_cuda:
        # The trainer writes over this memory once it has the report.
        torch.cuda.current_stream(tensor.device).synchronize()
    changed = [entry[0] for entry, odd in zip(message["buckets"], differences, strict=True) if int(odd)]
    if changed:
        raise ValueError(f"{len(changed)} buckets arrived changed, first bucket {changed[0]}")
    return {"received_bytes": sum(entry[3] for entry in message["buckets"])}


_ACTIONS = {"open": _open, "join": _join, "receive": _receive, "copy": _copy}


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Asked for anew every time: SGLang may have put other tensors in their place."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _store_of(message: dict[str, Any]) -> dist.TCPStore:
    transfer = _transfers.get(message["name"])
    if transfer is not None:
        return transfer.store
    return join_store(message["host"], message["port"], timeout_s=message["timeout_s"])
