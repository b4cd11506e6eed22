"""Transformer parts given to Megatron through its layer spec, where transformer-engine is not installed.

T packed tokens, S sequences, H heads, C head dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

HAVE_TRANSFORMER_ENGINE = False
try:
    import transformer_engine  # noqa: F401

    HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    pass


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in fp32 with a weight in the model's dtype, safe under sequence parallelism.

    Megatron's wrapper of torch's norm refuses sequence parallelism; here the weight is marked instead, so that
    Megatron sums its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden.float(), (hidden.shape[-1],), self.weight.float(), self.eps).to(hidden.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBlock:
    """Segments of similar lengths, attended together. B segments, Q own tokens of the longest, K with its prefix."""

    query: torch.Tensor
    """int64 [B * Q] packed token of every query slot; pad slots repeat the segment's first."""
    key: torch.Tensor
    """int64 [B * K] packed token of every key slot; the same tensor as `query` where no segment has a prefix."""
    shape: tuple[int, int, int]
    """(B, Q, K)."""
    visible: torch.Tensor | None
    """bool [B, 1, Q, K], the keys that a query sees; None where plain causal attention is the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """How packed tokens are laid out as a few right-padded blocks of segments of similar lengths."""

    blocks: list[AttentionBlock]
    destination_T: torch.Tensor
    """int64 [T] slot of every token in the concatenation of the blocks' queries."""

    @classmethod
    def build(cls, cu_seqlens: torch.Tensor, prefixes: Sequence[int], max_waste: float = 0.25) -> AttentionPlan:
        """Groups segments by their lengths so that at most about `max_waste` of the slots are padding.

        Args:
            cu_seqlens: int32 [S+1] borders.
            prefixes: [S] segment that each one continues, -1: none.
        """
        borders = cu_seqlens.tolist()
        starts, own = borders[:-1], [b - a for a, b in itertools.pairwise(borders)]
        before = [own[prefix] if prefix >= 0 else 0 for prefix in prefixes]
        whole = [a + b for a, b in zip(before, own, strict=True)]
        # Plain segments apart from those with a prefix, whose attention needs a mask.
        order = sorted((s for s in range(len(own)) if own[s]), key=lambda s: (before[s] > 0, -own[s], -whole[s], s))
        blocks = []
        destination = torch.empty(borders[-1], dtype=torch.int64)
        offset = 0
        for group in _alike(order, own, whole, [count > 0 for count in before], max_waste):
            longest, most = max(own[s] for s in group), max(whole[s] for s in group)
            start_B1, own_B1, before_B1 = (
                torch.tensor([values[s] for s in group])[:, None] for values in (starts, own, before)
            )
            slot_Q, slot_K = torch.arange(longest), torch.arange(most)
            real_BQ = slot_Q < own_B1
            query_BQ = torch.where(real_BQ, start_B1 + slot_Q, start_B1)
            key_BK, visible = query_BQ, None
            if any(before[s] for s in group):
                prefix_B1 = torch.tensor([starts[prefixes[s]] for s in group])[:, None]
                key_BK = torch.where(slot_K < before_B1, prefix_B1 + slot_K, start_B1 + slot_K - before_B1)
                key_BK = torch.where(slot_K < before_B1 + own_B1, key_BK, start_B1)
                # What a real query does not see is its own future; padding lies behind it.
                visible = (slot_K <= before_B1[:, :, None] + slot_Q[:, None])[:, None].to(cu_seqlens.device)
            destination[query_BQ[real_BQ]] = (offset + torch.arange(len(group) * longest)).view_as(query_BQ)[real_BQ]
            query = query_BQ.flatten().to(cu_seqlens.device)
            key = query if visible is None else key_BK.flatten().to(cu_seqlens.device)
            blocks.append(AttentionBlock(query=query, key=key, shape=(len(group), longest, most), visible=visible))
            offset += len(group) * longest
        return cls(blocks=blocks, destination_T=destination.to(cu_seqlens.device))


def _alike(
    order: Sequence[int], own: Sequence[int], whole: Sequence[int], masked: Sequence[bool], max_waste: float
) -> list[list[int]]:
    """Runs of `order` (longest own part first) that are padded to common lengths with little waste.

    Args:
        own, whole: tokens of every segment without and with its prefix.
        masked: whether it has one; those with and without do not share a block.
    """
    groups: list[list[int]] = []
    used = [0, 0]
    most = 0
    for s in order:
        if groups and masked[groups[-1][0]] == masked[s]:
            count, most_then = len(groups[-1]) + 1, max(most, whole[s])
            slots = (own[groups[-1][0]] * count, most_then * count)
            if all(
                room - (taken + more) <= max_waste * room
                for room, taken, more in zip(slots, used, (own[s], whole[s]), strict=True)
            ):
                groups[-1].append(s)
                used, most = [used[0] + own[s], used[1] + whole[s]], most_then
                continue
        groups.append([s])
        used, most = [own[s], whole[s]], whole[s]
    return groups


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packing parameters with the attention plan that all layers share.

    With a plan, `cu_seqlens_q` names the packed tokens as one run: positions come with the rotary embedding, which
    `model.PolicyModel` lays out token by token.
    """

    plan: AttentionPlan | None = None


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence through `scaled_dot_product_attention`.

    Segments of similar lengths are attended together, right-padded: with a causal mask, padding at the end of a
    segment is never seen by its real tokens. The keys of a shared prompt are gathered for every response.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError(
                f"parallel.cp must be 1 without transformer-engine, got {config.context_parallel_size}: "
                "context parallel attention is transformer-engine's"
            )
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_THC: torch.Tensor,
        key_THC: torch.Tensor,
        value_THC: torch.Tensor,
        attention_mask: object = None,
        attn_mask_type: object = None,
        attention_bias: object = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """Attention output [T, heads * head_dim] of packed query [T, H, C], key and value [T, groups, C]."""
        if packed_seq_params is None or packed_seq_params.plan is None:
            raise ValueError("packed_seq_params must carry an attention plan: this attention serves packed sequences")
        outputs = []
        for block in packed_seq_params.plan.blocks:
            num_segments, num_queries, num_keys = block.shape
            query, key, value = (
                x_THC.index_select(0, slots).view(num_segments, length, *x_THC.shape[1:]).transpose(1, 2)
                for x_THC, slots, length in (
                    (query_THC, block.query, num_queries),
                    (key_THC, block.key, num_keys),
                    (value_THC, block.key, num_keys),
                )
            )
            out = attend(query, key, value, block.visible, scale=self.softmax_scale, expand=query.is_cuda)
            outputs.append(out.transpose(1, 2).reshape(num_segments * num_queries, -1))
        return torch.cat(outputs).index_select(0, packed_seq_params.plan.destination_T)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    scale: float | None,
    expand: bool,
) -> torch.Tensor:
    """Attention output [B, H, Q, C], causal, or of the visible keys.

    Args:
        query: [B, H, Q, C]; key and value: [B, groups, K, C].
        visible: bool [B, 1, Q, K]; None: causal.
        expand: under a mask, repeat the keys of a group for each of its heads: CUDA's fast kernels take grouped heads
            or a mask, and without one of them all scores would be kept.
    """
    heads_per_group = query.shape[1] // key.shape[1]
    if expand and visible is not None and heads_per_group > 1:
        key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def uses_transformer_engine() -> bool:
    """Whether layers are transformer-engine's: it is installed and there is a GPU."""
    return HAVE_TRANSFORMER_ENGINE and torch.cuda.is_available()


def block_spec(config: TransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder's layers on this pipeline stage and chunk, and its final norm.

    transformer-engine's where it is in use, else Megatron's local layer with the parts of this file.
    """
    if uses_transformer_engine():
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
