"""How a model is laid over ranks, and which layers each chunk holds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rlvr.weights.hf_config import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel axes that cut weights (data and context parallelism do not).

    Example:
        >>> Layout(tp=2, pp=2, vpp=2).chunk_layers(8, pp_rank=1, vpp_rank=0)
        range(2, 4)
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline stage (1: no interleaving)."""
    ep: int = 1
    etp: int = 1
    """Tensor-parallel size inside an expert."""

    def check(self, shape: ModelShape) -> None:
        """Refuses what Megatron refuses.

        Raises:
            ValueError: naming the axis, the number that it does not divide, and both values.
        """
        for axis in fields(self):
            if getattr(self, axis.name) < 1:
                raise ValueError(f"parallel.{axis.name} must be at least 1, got {getattr(self, axis.name)}")
        self._divides("tp", "num_attention_heads", shape.num_heads)
        if shape.num_kv_heads % self.tp and self.tp % shape.num_kv_heads:
            raise ValueError(
                f"parallel.tp must divide num_key_value_heads ({shape.num_kv_heads}) or be a multiple of it, "
                f"got {self.tp}"
            )
        if (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim % self.tp:
            raise ValueError(
                f"parallel.tp must divide the rows of the joined q, k and v projections "
                f"({(shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim}), got {self.tp}"
            )
        if not shape.num_experts or shape.dense_layers:
            self._divides("tp", "intermediate_size", shape.ffn_hidden_size)
        self._divides("pp", "num_hidden_layers", shape.num_layers)
        if self.vpp > 1:
            if self.pp == 1:
                raise ValueError(f"parallel.vpp must be 1 where parallel.pp is 1, got {self.vpp}")
            if (shape.num_layers // self.pp) % self.vpp:
                raise ValueError(
                    f"parallel.vpp must divide the layers of a pipeline stage "
                    f"({shape.num_layers} / {self.pp} = {shape.num_layers // self.pp}), got {self.vpp}"
                )
        if shape.num_experts:
            self._divides("ep", "num_experts", shape.num_experts)
            self._divides("etp", "moe_intermediate_size", shape.moe_ffn_hidden_size)
        elif self.ep > 1 or self.etp > 1:
            name = "ep" if self.ep > 1 else "etp"
            raise ValueError(f"parallel.{name} must be 1 for a dense model, got {getattr(self, name)}")

    def _divides(self, axis: str, name: str, number: int) -> None:
        if number % getattr(self, axis):
            raise ValueError(f"parallel.{axis} must divide {name} ({number}), got {getattr(self, axis)}")

    def chunk_layers(self, num_layers: int, *, pp_rank: int, vpp_rank: int) -> range:
        """Layers of a chunk (`get_transformer_layer_offset`: even split, chunks interleaved over stages)."""
        per_chunk = num_layers // (self.pp * self.vpp)
        first = (vpp_rank * self.pp + pp_rank) * per_chunk
        return range(first, first + per_chunk)

    def is_first_chunk(self, *, pp_rank: int, vpp_rank: int) -> bool:
        return pp_rank == 0 and vpp_rank == 0

    def is_last_chunk(self, *, pp_rank: int, vpp_rank: int) -> bool:
        return pp_rank == self.pp - 1 and vpp_rank == self.vpp - 1
