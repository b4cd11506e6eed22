"""The trainer's end of a weight-update group, without the trainer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.types import TensorMeta

GROUP = "contract"


class TrainerRank:
    """Rank 0 of a gloo group; the server's ranks are the others."""

    def __init__(self, engine: HttpEngine) -> None:
        timeout = timedelta(seconds=60)
        world_size = 1 + engine.num_ranks
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        with ThreadPoolExecutor(1) as threads:
            joined = threads.submit(
                engine.init_group,
                master_address="127.0.0.1",
                master_port=store.port,
                rank_offset=1,
                world_size=world_size,
                group_name=GROUP,
                backend="gloo",
            )
            # the prefixes that torch's own group helper adds: the given name, the group's name, the device
            prefixed = dist.PrefixStore("cpu/", dist.PrefixStore(f"{GROUP}/", dist.PrefixStore(GROUP, store)))
            self.group = dist.ProcessGroupGloo(prefixed, 0, world_size, timeout)
            joined.result()
        self.engine = engine

    def send(self, tensors: dict[str, torch.Tensor], version: int | None) -> None:
        """One flattened bucket."""
        metas = [
            TensorMeta(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]
        flat = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors.values()])
        with ThreadPoolExecutor(1) as threads:
            reply = threads.submit(self.engine.update_from_distributed, metas, group_name=GROUP, weight_version=version)
            self.group.broadcast(flat, 0).wait()
            reply.result()
