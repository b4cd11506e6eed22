"""Which rectangle of which Hugging Face tensor each tensor-parallel rank of an SGLang server holds.

SGLang cuts q, k, v, gate and up each by rows before it joins them, so a rank's share of every Hugging Face tensor
is one rectangle. Sources: QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear,
VocabParallelEmbedding, FusedMoE (SGLang 0.5.17 to 0.5.23); without data-parallel attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.rules import Kind
from megatron_rlvr.weights.slices import Box, axis_box, whole_box

_VOCAB_PADDING = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayout:
    """Parallel sizes of the servers.

    Example:
        >>> EngineLayout(tp=8, replicas=4).num_ranks
        32
    """

    tp: int = 1
    ep: int = 1
    """Expert-parallel size inside the tensor-parallel group; the rest of it cuts each expert."""
    replicas: int = 1
    """Servers with the same weights."""

    @property
    def num_ranks(self) -> int:
        return self.tp * self.replicas

    def check(self, shape: ModelShape) -> None:
        """Refuses what SGLang refuses.

        Raises:
            ValueError: naming the size and what it does not divide.
        """
        for name, size in (("tp", self.tp), ("ep", self.ep), ("replicas", self.replicas)):
            if size < 1:
                raise ValueError(f"engine {name} must be at least 1, got {size}")
        if shape.num_heads % self.tp:
            raise ValueError(f"engine tp must divide num_attention_heads ({shape.num_heads}), got {self.tp}")
        if shape.num_kv_heads % self.tp and self.tp % shape.num_kv_heads:
            raise ValueError(
                f"engine tp must divide num_key_value_heads ({shape.num_kv_heads}) or be a multiple, got {self.tp}"
            )
        if (not shape.num_experts or shape.dense_layers) and shape.ffn_hidden_size % self.tp:
            raise ValueError(f"engine tp must divide intermediate_size ({shape.ffn_hidden_size}), got {self.tp}")
        if self.tp % self.ep:
            raise ValueError(f"engine ep must divide engine tp ({self.tp}), got {self.ep}")
        if shape.num_experts % self.ep:
            raise ValueError(f"engine ep must divide num_experts ({shape.num_experts}), got {self.ep}")
        if not shape.num_experts and self.ep > 1:
            raise ValueError(f"engine ep must be 1 for a dense model, got {self.ep}")
        if shape.num_experts and shape.moe_ffn_hidden_size % (self.tp // self.ep):
            raise ValueError(
                f"engine tp / ep must divide moe_intermediate_size ({shape.moe_ffn_hidden_size}), "
                f"got {self.tp} / {self.ep}"
            )


@lru_cache(maxsize=4096)
def engine_boxes(kind: Kind, part: int, hf_shape: tuple[int, ...], tp: int, groups: int) -> tuple[Box | None, ...]:
    """The rectangle of one Hugging Face tensor on each of ``tp`` ranks; None where a rank holds nothing of it.

    Args:
        kind: of the Megatron parameter that the tensor belongs to.
        part: index of the tensor in that parameter's rule (0 is the query of `Kind.qkv`).
        tp: ranks that share the tensor.
        groups: key and value heads of the model.
    """
    match kind:
        case Kind.whole:
            return (whole_box(hf_shape),) * tp
        case Kind.rows | Kind.gated:
            step = hf_shape[0] // tp
            return tuple(axis_box(hf_shape, 0, rank * step, step) for rank in range(tp))
        case Kind.columns:
            step = hf_shape[1] // tp
            return tuple(axis_box(hf_shape, 1, rank * step, step) for rank in range(tp))
        case Kind.qkv:
            # Fewer key heads than ranks: neighbours hold copies of the same head.
            sharers = 1 if part == 0 else max(1, tp // groups)
            step = hf_shape[0] * sharers // tp
            return tuple(axis_box(hf_shape, 0, rank // sharers * step, step) for rank in range(tp))
        case Kind.vocab:
            step = padded_vocab(hf_shape[0], tp) // tp
            starts = [min(rank * step, hf_shape[0]) for rank in range(tp + 1)]
            return tuple(
                axis_box(hf_shape, 0, start, stop - start) if stop > start else None for start, stop in pairwise(starts)
            )
    raise AssertionError(f"{kind} is unknown")


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Rows that SGLang's VocabParallelEmbedding spreads over ranks."""
    padded = -(-vocab_size // _VOCAB_PADDING) * _VOCAB_PADDING
    multiple = _VOCAB_PADDING if padded % tp == 0 else _VOCAB_PADDING * tp
    return -(-vocab_size // multiple) * multiple


def expert_box(
    kind: Kind, part: int, hf_shape: tuple[int, ...], expert: int, num_experts: int, engine: EngineLayout
) -> tuple[Box | None, ...]:
    """As `engine_boxes`, for a tensor of one expert: only the ranks of its expert-parallel part hold it."""
    moe_tp = engine.tp // engine.ep
    boxes = engine_boxes(kind, part, hf_shape, moe_tp, 0)
    ep_rank = expert // (num_experts // engine.ep)
    return tuple(boxes[rank % moe_tp] if rank // moe_tp == ep_rank else None for rank in range(engine.tp))
