"""What one trainer rank and one server keep in memory, from the model's shape and the layout, without building either.

Weights, gradients and optimizer are counted parameter by parameter. Activations are those tensors that autograd keeps
for a layer, read off the layers in use (`policy.layers`, or transformer-engine's) and checked against a real update by
a test. b is the bytes of one element of the model's dtype, T packed tokens, D hidden, F width of the MLP, Q and KV
widths of queries and of keys (or values), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_rlvr.config.schema import DType, ModelConfig, ParallelConfig, Recompute
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping, ParamMap

BYTES = {DType.fp32: 4, DType.bf16: 2}
FP32 = 4
ATTENTION_SLOTS = 1.15
"""Slots of the padded blocks in which sequences are attended, for each packed token (`AttentionPlan`: at most 4/3).
Where responses share their prompt there are up to twice as many for keys and values, a small part of the whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerMemory:
    """Bytes on one trainer rank at the fullest moment of an update."""

    weights: int
    gradients: int
    """fp32, for the whole of the rank's parameters."""
    optimizer: int
    """Adam's two moments, and fp32 weights beside bf16 ones; the rank's share under the distributed optimizer."""
    activations: int
    """Of all micro-batches that are between forward and backward on this rank at a time."""
    logits: int
    """Zero except on the last pipeline stage."""
    workspace: int
    """What one backward step makes and frees, or what the optimizer's step takes beyond activations and logits."""
    reference: int
    """Weights of the frozen reference model."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerLoad:
    """What a rank is asked to hold."""

    tokens: int
    """T of the largest micro-batch."""
    response_tokens: int
    """Those of them that have logits."""
    num_micro_batches: int
    """Of one optimizer step, on each data-parallel rank."""
    dp_size: int
    reference: bool = False
    """Whether a frozen reference model lies beside the policy."""


def trainer_memory(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, load: TrainerLoad, *, fused: bool
) -> list[TrainerMemory]:
    """Memory of every pipeline stage's rank, stage by stage (tensor-parallel ranks are alike).

    Args:
        fused: whether transformer-engine's layers and a fused Adam are in use (on GPUs), not the local ones.
    """
    layout = Layout(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep)
    mapping = Mapping(shape, layout=layout, naming="local")
    return [_stage_memory(stage, mapping, model, parallel, load, fused=fused) for stage in range(parallel.pp)]


def _stage_memory(
    stage: int, mapping: Mapping, model: ModelConfig, parallel: ParallelConfig, load: TrainerLoad, *, fused: bool
) -> TrainerMemory:
    shape, b = mapping.shape, BYTES[model.dtype]
    chunks = [mapping.params(stage, chunk) for chunk in range(parallel.vpp)]
    params = [param for chunk in chunks for param in chunk]
    dense = sum(_size(param) for param in params if not param.expert)
    expert = sum(_size(param) for param in params if param.expert)
    optimizer_bytes = 2 * FP32 + (FP32 if model.dtype is DType.bf16 else 0)
    shards = load.dp_size if parallel.distributed_optimizer else 1
    # Experts' data-parallel group is smaller by the expert-parallel size (with tensor ranks taking part).
    expert_shards = max(1, load.dp_size * parallel.tp // parallel.ep) if parallel.distributed_optimizer else 1
    layers_per_chunk = shape.num_layers // (parallel.pp * parallel.vpp)
    layer = layer_activations(shape, parallel, dtype=model.dtype, fused=fused) * load.tokens
    kept, recomputed = layer, 0.0
    if model.recompute is Recompute.full:
        kept, recomputed = _shard_of_tokens(parallel) * shape.hidden_size * b * load.tokens, layer
    elif model.recompute is Recompute.selective:
        attention = attention_internals(shape, parallel, dtype=model.dtype) * load.tokens
        kept, recomputed = layer - attention, attention
    first = stage == 0
    last = stage == parallel.pp - 1
    edges = shape.hidden_size * load.tokens * ((b if first else 0) + (2 * FP32 if last else 0))
    chunks_in_flight = _chunks_in_flight(stage, parallel, load.num_micro_batches)
    activations = chunks_in_flight * layers_per_chunk * kept + edges + recomputed
    width = mapping.padded_vocab_size // parallel.tp
    logits = load.response_tokens * width * b if last else 0
    if model.logits_mb is not None:
        logits = min(logits, model.logits_mb << 20)
    static, own = dense + expert, dense // shards + expert // expert_shards
    backward = int(_workspace(params, shape, parallel, load, b=b, last=last, fused=fused))
    # torch's AdamW makes the roots of all second moments at once, when activations are gone.
    step = 0 if fused else own * FP32 - int(activations) - logits
    return TrainerMemory(
        weights=static * b,
        gradients=static * FP32,
        optimizer=own * optimizer_bytes,
        activations=int(activations),
        logits=logits,
        workspace=max(backward, step),
        reference=static * b if load.reference else 0,
    )


def _workspace(
    params: list[ParamMap],
    shape: ModelShape,
    parallel: ParallelConfig,
    load: TrainerLoad,
    *,
    b: int,
    last: bool,
    fused: bool,
) -> float:
    """A layer's output gradients on their way back, or the gradient of the head's weight beside the logits."""
    ffn = _ffn_width(shape, parallel)
    hidden = _shard_of_tokens(parallel) * shape.hidden_size
    largest = max(map(_size, params))
    mlp = load.tokens * b * (2 * hidden + (3 if fused else 5) * ffn) + 2 * ffn * shape.hidden_size * b
    head = largest * b + 2 * load.response_tokens * shape.hidden_size * b if last else 0
    return max(mlp, head)


def layer_activations(shape: ModelShape, parallel: ParallelConfig, *, dtype: DType, fused: bool) -> float:
    """Bytes that one token leaves in one layer for the backward pass, on one rank.

    Local layers: both norms keep their input and its normalised value in fp32 and hand on an output; queries and keys
    likewise where they are normed; attention keeps q, k, v and its output in padded blocks; the projection its input;
    the gated MLP five tensors of width F (both halves of the first projection, the shifted half, the activated one and
    the product). transformer-engine: inputs and outputs of the norms, q, k, v and output, three of width F.
    """
    b = BYTES[dtype]
    sharded = _shard_of_tokens(parallel) * shape.hidden_size
    whole = shape.hidden_size
    q, kv = _attention_widths(shape, parallel)
    ffn = _ffn_width(shape, parallel)
    router = shape.num_experts * FP32 * 3 + shape.num_experts_per_token * 2 * whole * b if shape.num_experts else 0
    if fused:
        attention = 2 * q + 2 * kv + (q + kv if shape.qk_norm else 0)
        return b * (2 * sharded + 2 * whole + attention + 3 * ffn) + router
    norms = 2 * (2 * FP32 * sharded + b * whole)
    qk = 0.0
    if shape.qk_norm:
        # In fp32 the joined projection itself is kept for the keys; in bf16 its fp32 copies are.
        qk = FP32 * (2 * q + kv + (q + 2 * kv if dtype is DType.fp32 else kv))
    rope = 4 * shape.head_dim * b
    return norms + qk + rope + q * b + attention_internals(shape, parallel, dtype=dtype) + 5 * ffn * b + router


def attention_internals(shape: ModelShape, parallel: ParallelConfig, *, dtype: DType) -> float:
    """Bytes of q, k, v and output of the attention proper, for one token of one layer on one rank."""
    q, kv = _attention_widths(shape, parallel)
    return ATTENTION_SLOTS * BYTES[dtype] * (2 * q + 2 * kv)


def _attention_widths(shape: ModelShape, parallel: ParallelConfig) -> tuple[float, float]:
    return (
        shape.num_heads * shape.head_dim / parallel.tp,
        max(shape.num_kv_heads / parallel.tp, 1) * shape.head_dim,
    )


def _ffn_width(shape: ModelShape, parallel: ParallelConfig) -> float:
    """Width of the MLP that a token passes on one rank; with experts, of all that it is sent to."""
    if not shape.num_experts:
        return shape.ffn_hidden_size / parallel.tp
    # Tokens are spread over tensor ranks by sequence parallelism, experts are whole.
    return shape.num_experts_per_token * shape.moe_ffn_hidden_size / parallel.tp


def _shard_of_tokens(parallel: ParallelConfig) -> float:
    return 1 / parallel.tp if parallel.sequence_parallel else 1.0


def _chunks_in_flight(stage: int, parallel: ParallelConfig, num_micro_batches: int) -> int:
    """Chunk activations between forward and backward on a stage: 1F1B, or its interleaved form (Megatron's warm-up)."""
    if parallel.vpp == 1:
        return min(parallel.pp - stage, num_micro_batches)
    warm_up = 2 * (parallel.pp - stage - 1) + (parallel.vpp - 1) * parallel.pp + 1
    return min(warm_up, num_micro_batches * parallel.vpp)


def _size(param: ParamMap) -> int:
    return math.prod(param.shard_shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerMemory:
    """Bytes on one engine rank."""

    weights: int
    kv_per_token: int
    """Keys and values of one token in all layers."""

    def kv_tokens(self, budget: float) -> int:
        """Tokens whose keys and values fit beside the weights into so many bytes."""
        return max(0, int((budget - self.weights) // self.kv_per_token))


def server_memory(shape: ModelShape, *, tp: int, dtype: DType) -> ServerMemory:
    """Weights and cache of one SGLang rank; key heads are repeated where there are fewer of them than ranks."""
    b = BYTES[dtype]
    mapping = Mapping(shape, layout=Layout(tp=math.gcd(tp, shape.num_heads)), naming="local", vocab_multiple=64)
    weights = sum(_elements(param, tp) for param in mapping.params())
    kv_heads = max(1, shape.num_kv_heads // tp)
    return ServerMemory(weights=weights * b, kv_per_token=2 * shape.num_layers * kv_heads * shape.head_dim * b)


def _elements(param: ParamMap, tp: int) -> int:
    # SGLang cuts experts' matrices over its tensor ranks.
    return _size(param) // tp if param.expert else _size(param)


def terms(memory: TrainerMemory) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the parts that are there, largest first."""
    parts = ((field.name, getattr(memory, field.name)) for field in fields(memory))
    return iter(sorted(((name, size) for name, size in parts if size), key=lambda part: -part[1]))
