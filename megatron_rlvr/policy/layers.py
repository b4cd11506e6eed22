"""Transformer parts given to Megatron through its layer spec, where transformer-engine is not installed.

T packed tokens, S sequences, H heads, C head dimension.
"""

from __future__ import annotations

import itertools
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
class AttentionPlan:
    """How packed tokens are laid out as a few padded blocks of sequences of similar length."""

    blocks: list[tuple[torch.Tensor, int, int]]
    """(int64 [S_b * L_b] source token of every slot, S_b, L_b); pad slots repeat token 0 of their sequence's block."""
    destination_T: torch.Tensor
    """int64 [T] slot of every token in the concatenation of the blocks."""

    @classmethod
    def build(cls, cu_seqlens: torch.Tensor, max_waste: float = 0.25) -> AttentionPlan:
        """Groups sequences by length so that at most about `max_waste` of the slots are padding.

        Args:
            cu_seqlens: int32 [S+1] borders.
        """
        borders = cu_seqlens.tolist()
        starts, lengths = borders[:-1], [b - a for a, b in itertools.pairwise(borders)]
        order = sorted((s for s in range(len(lengths)) if lengths[s]), key=lambda s: (-lengths[s], s))
        groups: list[list[int]] = []
        used = 0
        for s in order:
            if groups:
                longest = lengths[groups[-1][0]]
                slots = longest * (len(groups[-1]) + 1)
                if slots - (used + lengths[s]) <= max_waste * slots:
                    groups[-1].append(s)
                    used += lengths[s]
                    continue
            groups.append([s])
            used = lengths[s]
        blocks = []
        destination = torch.empty(borders[-1], dtype=torch.int64)
        offset = 0
        for group in groups:
            longest = lengths[group[0]]
            start_S = torch.tensor([starts[s] for s in group])
            length_S = torch.tensor([lengths[s] for s in group])
            position_L = torch.arange(longest)
            real_SL = position_L < length_S[:, None]
            source_SL = torch.where(real_SL, start_S[:, None] + position_L, start_S[:, None])
            slots_SL = offset + torch.arange(len(group) * longest).view(len(group), longest)
            destination[source_SL[real_SL]] = slots_SL[real_SL]
            blocks.append((source_SL.flatten().to(cu_seqlens.device), len(group), longest))
            offset += len(group) * longest
        return cls(blocks=blocks, destination_T=destination.to(cu_seqlens.device))


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packing parameters with the attention plan that all layers share."""

    plan: AttentionPlan | None = None


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence through `scaled_dot_product_attention`.

    Sequences of similar length are attended together, right-padded: with a causal mask, padding at the end of a
    sequence is never seen by its real tokens.
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
        for source, num_sequences, length in packed_seq_params.plan.blocks:
            shape = (num_sequences, length)
            query, key, value = (
                x.index_select(0, source).view(*shape, *x.shape[1:]).transpose(1, 2)
                for x in (query_THC, key_THC, value_THC)
            )
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
            )
            outputs.append(out.transpose(1, 2).reshape(num_sequences * length, -1))
        return torch.cat(outputs).index_select(0, packed_seq_params.plan.destination_T)


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
