"""The words in which a family says how Megatron's tensors are made of Hugging Face tensors.

Megatron's tensor-parallel shards of one parameter, laid end to end along one axis, form its *joined* tensor.
A rule names the Hugging Face tensors that fill the joined tensor, in which order and in which pieces; a
rank's shard is an equal range of it. Everything else (which rank holds which rectangle of which tensor) follows
from that by arithmetic, in `weights.mapping`.

Shapes are written with the symbols of `ModelShape.size`: hidden, ffn, q, kv, head, vocab, experts, moe_ffn.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Place(Enum):
    """Which model chunks hold a parameter."""

    embedding = "embedding"
    """The first chunk."""
    layer = "layer"
    """Every transformer layer."""
    dense_layer = "dense_layer"
    """Layers with one MLP."""
    moe_layer = "moe_layer"
    """Layers with experts."""
    expert = "expert"
    """Each expert of a MoE layer; split over EP by expert and over ETP by rows or columns."""
    final = "final"
    """The last chunk."""
    untied_head = "untied_head"
    """The last chunk, when the output layer has weights of its own."""
    tied_head = "tied_head"
    """The last chunk, when embeddings are tied and the first chunk is another one: a copy, never exported."""


class Kind(Enum):
    """How the joined tensor is put together."""

    whole = "whole"
    """Every tensor-parallel rank holds the whole tensor."""
    rows = "rows"
    """Axis 0 is split evenly (column-parallel in Megatron's words)."""
    columns = "columns"
    """Axis 1 is split evenly (row-parallel)."""
    gated = "gated"
    """Each rank holds its range of the first tensor above its range of the second (gate over up)."""
    qkv = "qkv"
    """Query heads of a group, its key head, its value head; group after group; axis 0 is split evenly."""
    vocab = "vocab"
    """As rows, with padding rows after the last that belong to no Hugging Face tensor."""


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A Hugging Face tensor: name template (``{layer}``, ``{expert}``) and shape in symbols."""

    name: str
    symbols: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How one Megatron parameter is made.

    Example:
        >>> Rule(place=Place.layer, kind=Kind.columns, local="self_attention.linear_proj.weight",
        ...      hf=(HfTensor("model.layers.{layer}.self_attn.o_proj.weight", ("hidden", "q")),))
    """

    place: Place
    kind: Kind
    local: str
    """Parameter name under the local layer spec; inside a layer without the ``decoder.layers.N.`` prefix, inside
    an expert without ``decoder.layers.N.mlp.experts.``."""
    te: str | None = None
    """Name under the transformer-engine layer spec where it differs."""
    hf: tuple[HfTensor, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of the joined tensor along the split axis.

    ``part`` indexes ``Rule.hf`` and ``start`` is the offset inside that tensor; part None is padding.
    """

    part: int | None
    start: int
    length: int


def joined_segments(kind: Kind, sizes: tuple[int, ...], *, shards: int, groups: int, padding: int) -> list[Segment]:
    """Segments of the joined tensor, in order.

    Args:
        kind: any kind but `Kind.whole`.
        sizes: length of each Hugging Face tensor along the split axis.
        shards: tensor-parallel size (for experts, expert tensor-parallel size).
        groups: query groups of the model (`Kind.qkv` only).
        padding: rows of padding (`Kind.vocab` only).
    """
    match kind:
        case Kind.rows | Kind.columns:
            return [Segment(0, 0, sizes[0])]
        case Kind.vocab:
            return [Segment(0, 0, sizes[0])] + ([Segment(None, 0, padding)] if padding else [])
        case Kind.gated:
            # MLP.forward chunks each rank's output in two, so gate and up alternate rank by rank.
            step = sizes[0] // shards
            return [Segment(part, rank * step, step) for rank in range(shards) for part in (0, 1)]
        case Kind.qkv:
            # SelfAttention.get_query_key_value_tensors views [groups, (queries per group + 2) * head_dim].
            steps = [size // groups for size in sizes]
            return [Segment(part, group * step, step) for group in range(groups) for part, step in enumerate(steps)]
    raise AssertionError(f"{kind} has no segments")


def split_axis(kind: Kind) -> int:
    """Axis of the joined tensor that tensor parallelism splits."""
    return 1 if kind is Kind.columns else 0


# --- rule builders shared by families -------------------------------------------------------------------------

_LAYER = "model.layers.{layer}."


def _layer(name: str, *symbols: str) -> HfTensor:
    return HfTensor(_LAYER + name, symbols)


_EMBEDDING = HfTensor("model.embed_tokens.weight", ("vocab", "hidden"))

EMBEDDING_AND_HEAD: tuple[Rule, ...] = (
    Rule(place=Place.embedding, kind=Kind.vocab, local="embedding.word_embeddings.weight", hf=(_EMBEDDING,)),
    Rule(
        place=Place.final,
        kind=Kind.whole,
        local="decoder.final_layernorm.weight",
        hf=(HfTensor("model.norm.weight", ("hidden",)),),
    ),
    Rule(
        place=Place.untied_head,
        kind=Kind.vocab,
        local="output_layer.weight",
        hf=(HfTensor("lm_head.weight", ("vocab", "hidden")),),
    ),
    Rule(place=Place.tied_head, kind=Kind.vocab, local="output_layer.weight", hf=(_EMBEDDING,)),
)

ATTENTION: tuple[Rule, ...] = (
    Rule(
        place=Place.layer,
        kind=Kind.whole,
        local="input_layernorm.weight",
        te="self_attention.linear_qkv.layer_norm_weight",
        hf=(_layer("input_layernorm.weight", "hidden"),),
    ),
    Rule(
        place=Place.layer,
        kind=Kind.qkv,
        local="self_attention.linear_qkv.weight",
        hf=(
            _layer("self_attn.q_proj.weight", "q", "hidden"),
            _layer("self_attn.k_proj.weight", "kv", "hidden"),
            _layer("self_attn.v_proj.weight", "kv", "hidden"),
        ),
    ),
    Rule(
        place=Place.layer,
        kind=Kind.columns,
        local="self_attention.linear_proj.weight",
        hf=(_layer("self_attn.o_proj.weight", "hidden", "q"),),
    ),
)

QKV_BIAS: tuple[Rule, ...] = (
    Rule(
        place=Place.layer,
        kind=Kind.qkv,
        local="self_attention.linear_qkv.bias",
        hf=(
            _layer("self_attn.q_proj.bias", "q"),
            _layer("self_attn.k_proj.bias", "kv"),
            _layer("self_attn.v_proj.bias", "kv"),
        ),
    ),
)

QK_NORM: tuple[Rule, ...] = (
    Rule(
        place=Place.layer,
        kind=Kind.whole,
        local="self_attention.q_layernorm.weight",
        hf=(_layer("self_attn.q_norm.weight", "head"),),
    ),
    Rule(
        place=Place.layer,
        kind=Kind.whole,
        local="self_attention.k_layernorm.weight",
        hf=(_layer("self_attn.k_norm.weight", "head"),),
    ),
)

DENSE_MLP: tuple[Rule, ...] = (
    Rule(
        place=Place.dense_layer,
        kind=Kind.whole,
        local="pre_mlp_layernorm.weight",
        te="mlp.linear_fc1.layer_norm_weight",
        hf=(_layer("post_attention_layernorm.weight", "hidden"),),
    ),
    Rule(
        place=Place.dense_layer,
        kind=Kind.gated,
        local="mlp.linear_fc1.weight",
        hf=(_layer("mlp.gate_proj.weight", "ffn", "hidden"), _layer("mlp.up_proj.weight", "ffn", "hidden")),
    ),
    Rule(
        place=Place.dense_layer,
        kind=Kind.columns,
        local="mlp.linear_fc2.weight",
        hf=(_layer("mlp.down_proj.weight", "hidden", "ffn"),),
    ),
)

MOE_MLP: tuple[Rule, ...] = (
    # The norm before experts stays a module of its own in both specs (fuse_pre_mlp_layernorm=False).
    Rule(
        place=Place.moe_layer,
        kind=Kind.whole,
        local="pre_mlp_layernorm.weight",
        hf=(_layer("post_attention_layernorm.weight", "hidden"),),
    ),
    Rule(
        place=Place.moe_layer,
        kind=Kind.whole,
        local="mlp.router.weight",
        hf=(_layer("mlp.gate.weight", "experts", "hidden"),),
    ),
    Rule(
        place=Place.expert,
        kind=Kind.gated,
        local="linear_fc1.weight",
        hf=(
            _layer("mlp.experts.{expert}.gate_proj.weight", "moe_ffn", "hidden"),
            _layer("mlp.experts.{expert}.up_proj.weight", "moe_ffn", "hidden"),
        ),
    ),
    Rule(
        place=Place.expert,
        kind=Kind.columns,
        local="linear_fc2.weight",
        hf=(_layer("mlp.experts.{expert}.down_proj.weight", "hidden", "moe_ffn"),),
    ),
)
