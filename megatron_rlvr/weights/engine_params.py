"""Where a Hugging Face tensor lies in the parameters of an SGLang rank, which joins some of them.

q, k and v are rows of one ``qkv_proj``, gate and up of one ``gate_up_proj``; the experts of a layer are one
``w13_weight`` [experts, gate over up, hidden] and one ``w2_weight`` [experts, hidden, ffn]. The names are those of
``model.named_parameters()`` in SGLang's Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE models (0.5.17 to 0.5.23).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_rlvr.weights.engine_slices import EngineLayout, engine_boxes, expert_box, padded_vocab
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping, ParamMap
from megatron_rlvr.weights.rules import Kind
from megatron_rlvr.weights.slices import Box, box_shape

_JOINED = (
    (re.compile(r"self_attn\.[qkv]_proj\."), "self_attn.qkv_proj."),
    (re.compile(r"mlp\.experts\.\d+\.(gate|up)_proj\.weight"), "mlp.experts.w13_weight"),
    (re.compile(r"mlp\.experts\.\d+\.down_proj\.weight"), "mlp.experts.w2_weight"),
    (re.compile(r"mlp\.(gate|up)_proj\."), "mlp.gate_up_proj."),
)


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """The part of one Hugging Face tensor that one engine rank holds."""

    param: str
    """Name of the engine's parameter."""
    param_shape: tuple[int, ...]
    hf_box: Box
    box: Box
    """The same elements in the parameter; for experts with a first axis of length one before those of `hf_box`."""


def engine_places(shape: ModelShape, engine: EngineLayout, tp_rank: int) -> dict[str, EnginePlace]:
    """Everything that one rank holds, by Hugging Face name.

    Experts of other ranks are left out; of a vocabulary that ends before the rank's rows it holds an empty rectangle.
    """
    places: dict[str, EnginePlace] = {}
    for param in Mapping(shape, layout=Layout(), naming="local").params():
        boxes = [_held(param, part, shape, engine) for part in range(len(param.hf))]
        mine = [of_ranks[tp_rank] for of_ranks in boxes]
        if param.kind is Kind.vocab and mine[0] is None:
            rows, columns = param.hf[0][1]
            mine = [((rows, rows), (0, columns))]
        total = sum(box[0][1] - box[0][0] for box in mine if box is not None)
        first = 0
        for (name, hf_shape), box in zip(param.hf, mine, strict=True):
            if box is None:
                continue
            rows = box[0][1] - box[0][0]
            place: Box = ((first, first + rows), *((0, size) for size in box_shape(box)[1:]))
            held: tuple[int, ...] = (total, *box_shape(box)[1:])
            if param.kind is Kind.vocab:
                held = (padded_vocab(hf_shape[0], engine.tp) // engine.tp, *held[1:])
            if param.expert_index is not None:
                per_rank = shape.num_experts // engine.ep
                index = param.expert_index % per_rank
                place, held = ((index, index + 1), *place), (per_rank, *held)
            places[name] = EnginePlace(_engine_name(name), held, box, place)
            first += rows
    return places


def _held(param: ParamMap, part: int, shape: ModelShape, engine: EngineLayout) -> tuple[Box | None, ...]:
    hf_shape = param.hf[part][1]
    if param.expert_index is None:
        return engine_boxes(param.kind, part, hf_shape, engine.tp, param.groups)
    return expert_box(param.kind, part, hf_shape, param.expert_index, shape.num_experts, engine)


def _engine_name(hf_name: str) -> str:
    for pattern, replacement in _JOINED:
        name, count = pattern.subn(replacement, hf_name)
        if count:
            return name
    return hf_name
