"""What weight transfer needs from the two sides, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_rlvr.types import EngineError, TensorMeta

__all__ = ["Engine", "EngineError", "TensorMeta"]


class Engine(Protocol):
    """One inference server that can take new weights. All calls block and carry a deadline.

    Every call raises `EngineError` with the server's own message when it fails.
    """

    url: str
    num_ranks: int
    """Engine ranks that join a weight-update group (TP x DP of the server)."""

    def pause(self, mode: str) -> None: ...

    def resume(self) -> None: ...

    def begin_update(self) -> None:
        """Opens a weight update where the server's version wants that, else does nothing."""
        ...

    def end_update(self) -> None: ...

    def init_group(
        self, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None: ...

    def destroy_group(self, group_name: str) -> None: ...

    def update_from_distributed(
        self, metas: Sequence[TensorMeta], *, group_name: str, weight_version: int | None
    ) -> None:
        """Receives one flattened bucket (uint8 concatenation in the order of ``metas``) from the group's rank 0."""
        ...

    def update_from_disk(self, path: str, *, weight_version: int) -> None: ...

    def set_weight_version(self, version: int) -> None: ...

    def weight_version(self) -> str: ...

    def flush_cache(self) -> None: ...
