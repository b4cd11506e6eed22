"""Keys of Megatron's ``torch_dist`` checkpoints: what `GPTModel.sharded_state_dict` calls each parameter.

A checkpoint knows no layout: every key is one global tensor, which is the parameter as a single rank would hold it,
with a leading axis for layers (unless layers differ) and one for experts. Ranks of any layout read their part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping, ParamMap
from megatron_rlvr.weights.rules import Kind
from megatron_rlvr.weights.slices import Box, axis_box, whole_box

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.+)$")

# Layer specs rename norms that transformer-engine fuses into the linear layer behind them.
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""Keys of the model; optimizer states and the rest of a training checkpoint start otherwise."""
EXTRA_STATE = "._extra_state"


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalParam:
    """A parameter's place in a checkpoint.

    Example: layer 2 of 36, ``linear_proj``: key ``decoder.layers.self_attention.linear_proj.weight``,
    lead ``((2, 36),)``, global shape (36, hidden, q).
    """

    param: ParamMap
    """As a single rank holds it."""
    keys: tuple[str, ...]
    """Names under which it is stored; more than one where Megatron's two layer specs disagree."""
    lead: tuple[tuple[int, int], ...]
    """(index, size) along the leading axes: layer, expert."""
    unit: int
    """Parameters of one unit are written together: 0 embedding, 1 + layer, then the head."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        return (*(size for _, size in self.lead), *self.param.shard_shape)

    def global_box(self, box: Box) -> Box:
        """A rectangle of the parameter in coordinates of the global tensor."""
        return (*((index, index + 1) for index, _ in self.lead), *box)

    def extra_state_key(self) -> str | None:
        """Key of the (empty) extra state that Megatron's linear layers store beside their weight."""
        key = self.keys[0]
        if not re.search(r"\.linear_(qkv|proj|fc1|fc2)\.weight$", key):
            return None
        lead = self.lead or ((0, 1),)
        offset, sizes = (".".join(str(pair[i]) for pair in lead) for i in (0, 1))
        return f"{key.removesuffix('.weight')}{EXTRA_STATE}/shard_{offset}_{sizes}"

    def chunks(self, num_shards: int) -> Iterator[Box]:
        """Rectangles of the parameter as a trainer with so many tensor-parallel ranks would store them.

        Gate and up lie one above the other in the global tensor and are cut each on its own.
        """
        shape, axis = self.param.shard_shape, self.param.axis
        if self.param.kind is Kind.whole:
            yield whole_box(shape)
            return
        parts = 2 if self.param.kind is Kind.gated else 1
        length = shape[axis] // (parts * num_shards)
        for index in range(parts * num_shards):
            yield axis_box(shape, axis, index * length, length)


def global_params(shape: ModelShape, *, padded_vocab_size: int, per_layer: bool) -> list[GlobalParam]:
    """All parameters of a model.

    Args:
        padded_vocab_size: rows of the stored embedding.
        per_layer: every layer has keys of its own, as Megatron does where layers differ.
    """
    mapping = Mapping(shape, layout=Layout(), naming="local", padded_vocab_size=padded_vocab_size)
    return [_place(param, shape, per_layer) for param in mapping.params()]


def layers_differ(shape: ModelShape) -> bool:
    """Whether Megatron keeps a key for every layer (`TransformerBlock`'s non-homogeneous layers)."""
    return bool(shape.dense_layers)


def _place(param: ParamMap, shape: ModelShape, per_layer: bool) -> GlobalParam:
    match = _LAYER.match(param.name)
    if match is None:
        unit = 0 if param.name.startswith("embedding.") else 1 + shape.num_layers
        return GlobalParam(param=param, keys=(param.name,), lead=(), unit=unit)
    layer, name = int(match[1]), match[2]
    lead = () if per_layer else ((layer, shape.num_layers),)
    expert = _EXPERT.match(name)
    if expert is not None:
        name = f"mlp.experts.experts.{expert[2]}"
        lead = (*lead, (int(expert[1]), shape.num_experts))
    prefix = f"decoder.layers.{layer}." if per_layer else "decoder.layers."
    names = [_FUSED_NORMS.get(name, name)]
    if name == "pre_mlp_layernorm.weight" and shape.is_moe_layer(layer):
        # Only the local spec renames the norm before experts; transformer-engine's keeps its name.
        names.append(name)
    return GlobalParam(param=param, keys=tuple(prefix + n for n in names), lead=lead, unit=1 + layer)
