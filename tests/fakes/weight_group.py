"""The engine side of a weight-update group, as ranks inside a fake server's process."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroupGloo


class WeightGroup:
    """Gloo ranks ``rank_offset .. rank_offset + tp_size - 1`` of a trainer's group.

    Uses process-group objects directly, so that a test may be the trainer's rank 0 in the same process.
    """

    def __init__(self, ranks: list[ProcessGroupGloo]) -> None:
        self._ranks = ranks
        self._threads = ThreadPoolExecutor(len(ranks))

    @classmethod
    def join(cls, body: dict[str, Any], tp_size: int, *, timeout_s: float = 30.0) -> WeightGroup:
        """Joins the group an init_weights_update_group request describes.

        Raises:
            RuntimeError: the backend is not gloo, or the others did not come in time.
        """
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

        if body["backend"] != "gloo":
            raise RuntimeError(f"a fake server joins gloo groups only, got {body['backend']!r}")
        timeout = timedelta(seconds=timeout_s)
        name = body["group_name"]

        def rank(tp_rank: int) -> ProcessGroupGloo:
            store = TCPStore(body["master_address"], body["master_port"], is_master=False, timeout=timeout)
            # the prefixes that torch's group helper would add on the trainer's side
            prefixed = PrefixStore("cpu/", PrefixStore(f"{name}/", PrefixStore(name, store)))
            return ProcessGroupGloo(prefixed, body["rank_offset"] + tp_rank, body["world_size"], timeout)

        with ThreadPoolExecutor(tp_size) as threads:
            return cls(list(threads.map(rank, range(tp_size))))

    def receive(self, body: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Tensors by name, of one update_weights_from_distributed request, as TP rank 0 got them."""
        return next(iter(list(self._threads.map(lambda group: _receive(group, body), self._ranks))))

    def close(self) -> None:
        self._threads.shutdown()
        self._ranks.clear()


def _receive(group: ProcessGroupGloo, body: dict[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    dtypes = [getattr(torch, name) for name in body["dtypes"]]
    sizes = [math.prod(s) * d.itemsize for s, d in zip(body["shapes"], dtypes, strict=True)]
    if body.get("load_format") == "flattened_bucket":
        bucket = torch.empty(sum(sizes), dtype=torch.uint8)
        group.broadcast(bucket, 0).wait()
        pieces = [piece.clone() for piece in bucket.split(sizes)]
        tensors = [p.view(d).reshape(s) for p, d, s in zip(pieces, dtypes, body["shapes"], strict=True)]
    else:
        tensors = [torch.empty(s, dtype=d) for s, d in zip(body["shapes"], dtypes, strict=True)]
        for tensor in tensors:
            group.broadcast(tensor, 0).wait()
    return dict(zip(body["names"], tensors, strict=True))
