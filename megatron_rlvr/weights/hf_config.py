"""Reads a Hugging Face config.json into the shape of a model, and refuses what is not implemented."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.weights.families import FAMILIES
from megatron_rlvr.weights.family import Family
from megatron_rlvr.weights.hf_metadata import METADATA_FIELDS

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
)
_REQUIRED_MOE = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
    "decoder_sparse_step",
    "mlp_only_layers",
)

# Defaults of PreTrainedConfig and of all five config classes.
_COMMON_OPTIONAL: dict[str, Any] = {"tie_word_embeddings": False}

_COMMON_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "is_encoder_decoder": (False, None),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama-3 frequency scaling, as ``rope_type: llama3`` in Hugging Face configs."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    """Tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Everything about a decoder that decides its parameters and its function.

    Example:
        >>> shape = ModelShape.from_hf("configs/models/qwen3-8b.json")
        >>> shape.num_layers, shape.hidden_size, shape.tie_embeddings
        (36, 4096, False)
    """

    family: str
    """Hugging Face ``model_type``: qwen2, qwen3, qwen3_moe, llama or mistral."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the dense MLP."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads, Megatron's query groups."""
    head_dim: int
    vocab_size: int
    """Rows of the Hugging Face embedding, without Megatron's padding."""
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int = 0
    """Routed experts of a MoE layer, 0 for a dense model."""
    num_experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    """Width of one expert."""
    norm_topk_prob: bool = False
    """Router probabilities of the chosen experts are scaled to sum to 1."""
    router_aux_loss_coef: float = 0.0
    dense_layers: tuple[int, ...] = ()
    """Layers of a MoE model that have an ordinary MLP."""

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelShape:
        """Reads a model folder, a config.json or its parsed content; both transformers 4 and 5 spellings.

        Raises:
            ValueError: for a missing or broken file, an unsupported family, a field that is missing, unknown or
                of the wrong type, and a value that is not implemented; the message names the field.
        """
        raw = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        family = _family(raw)
        return _shape(family, _normalise(family, raw))

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer (counted over the whole model) has experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def size(self, symbol: str) -> int:
        """Length that a symbol of `weights.rules` stands for."""
        match symbol:
            case "hidden":
                return self.hidden_size
            case "ffn":
                return self.ffn_hidden_size
            case "q":
                return self.num_heads * self.head_dim
            case "kv":
                return self.num_kv_heads * self.head_dim
            case "head":
                return self.head_dim
            case "vocab":
                return self.vocab_size
            case "experts":
                return self.num_experts
            case "moe_ffn":
                return self.moe_ffn_hidden_size
        raise AssertionError(f"no symbol {symbol!r}")


def _read_json(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        kind = "a model folder with config.json" if path.name == "config.json" else "a model folder or a config.json"
        raise ValueError(f"model.path must be {kind}, but {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _family(raw: Mapping[str, Any]) -> Family:
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    family = FAMILIES[model_type]
    architectures = raw.get("architectures")
    if architectures not in (None, [], [family.architecture]):
        raise ValueError(
            f"config.json: architectures must be [{family.architecture!r}] for model_type {model_type!r}, "
            f"got {architectures!r}"
        )
    return family


def _normalise(family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Checks every field and returns the ones that matter, in transformers 4 spelling."""
    fields = dict(raw)
    if fields.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config must be absent: only unquantised weights are supported")
    fields.pop("quantization_config", None)
    _merge_rope(fields)
    if family.moe and "num_local_experts" in fields:
        _rename(fields, "num_local_experts", "num_experts")
    layer_types = fields.pop("layer_types", None)
    if layer_types is not None and any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"config.json: layer_types must all be 'full_attention', got {sorted(set(layer_types))}")

    fixed = {**_COMMON_FIXED, **family.fixed}
    optional = {**_COMMON_OPTIONAL, **family.optional}
    required = _REQUIRED + (_REQUIRED_MOE if family.moe else ())
    for name, default in optional.items():
        fields.setdefault(name, default)
    for name, allowed in fixed.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"config.json: {name} must be {' or '.join(map(repr, allowed))} for {family.model_type} "
                f"(nothing else is implemented), got {fields[name]!r}"
            )
    for name in required:
        if name not in fields:
            raise ValueError(f"config.json: {name} must be given for model_type {family.model_type!r}")
    unknown = sorted(set(fields) - set(required) - set(fixed) - family.ignored - METADATA_FIELDS)
    if unknown:
        raise ValueError(
            f"config.json: field {', '.join(map(repr, unknown))} is not known for model_type "
            f"{family.model_type!r}; a field that may change the model is never ignored"
        )
    return {name: fields[name] for name in required}


def _rename(fields: dict[str, Any], new: str, old: str) -> None:
    """Folds a second spelling into the first."""
    value = fields.pop(new)
    if old in fields and fields[old] != value:
        raise ValueError(f"config.json: {new} ({value!r}) and {old} ({fields[old]!r}) must agree")
    fields[old] = value


def _merge_rope(fields: dict[str, Any]) -> None:
    """transformers 5 keeps theta and scaling in `rope_parameters`; moves them to `rope_theta`, `rope_scaling`."""
    parameters = fields.pop("rope_parameters", None)
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json: rope_parameters must be an object, got {parameters!r}")
    scaling = dict(parameters)
    if "rope_theta" in scaling:
        theta = scaling.pop("rope_theta")
        if "rope_theta" in fields and fields["rope_theta"] != theta:
            raise ValueError(
                f"config.json: rope_parameters.rope_theta ({theta!r}) and rope_theta ({fields['rope_theta']!r}) "
                "must agree"
            )
        fields["rope_theta"] = theta
    if fields.get("rope_scaling") is None:
        fields["rope_scaling"] = scaling
    elif _rope_scaling(fields["rope_scaling"]) != _rope_scaling(scaling):
        raise ValueError("config.json: rope_parameters and rope_scaling must agree")


def _rope_scaling(value: Any) -> RopeScaling | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json: rope_scaling must be an object or null, got {value!r}")
    fields = dict(value)
    kinds = {fields.pop(key) for key in ("rope_type", "type") if key in fields}
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: rope_scaling.partial_rotary_factor must be 1.0")
    if kinds <= {"default"} and not fields:
        return None
    if kinds != {"llama3"}:
        shown = "/".join(sorted(map(str, kinds))) or "missing"
        raise ValueError(f"config.json: rope_scaling.rope_type must be 'default' or 'llama3', got {shown!r}")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if set(fields) != set(names):
        raise ValueError(f"config.json: rope_scaling of type llama3 must have {', '.join(names)}, got {sorted(fields)}")
    scaling = RopeScaling(
        factor=_positive_float(fields, "factor"),
        low_freq_factor=_positive_float(fields, "low_freq_factor"),
        high_freq_factor=_positive_float(fields, "high_freq_factor"),
        original_max_position_embeddings=_positive_int(fields, "original_max_position_embeddings"),
    )
    if scaling.factor < 1 or scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            "config.json: rope_scaling must have factor >= 1 and high_freq_factor > low_freq_factor, "
            f"got {scaling.factor}, {scaling.high_freq_factor}, {scaling.low_freq_factor}"
        )
    return scaling


def _shape(family: Family, fields: dict[str, Any]) -> ModelShape:
    hidden = _positive_int(fields, "hidden_size")
    heads = _positive_int(fields, "num_attention_heads")
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    kv_heads = _positive_int(fields, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}"
        )
    if fields["head_dim"] is None:
        if hidden % heads:
            raise ValueError(
                "config.json: hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
                f"got {hidden} and {heads}"
            )
        fields["head_dim"] = hidden // heads
    head_dim = _positive_int(fields, "head_dim")
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim must be even (rotary embedding), got {head_dim}")
    layers = _positive_int(fields, "num_hidden_layers")
    return ModelShape(
        family=family.model_type,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=_positive_int(fields, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_positive_int(fields, "vocab_size"),
        rms_eps=_positive_float(fields, "rms_norm_eps"),
        rope_theta=_positive_float(fields, "rope_theta"),
        rope_scaling=_rope_scaling(fields["rope_scaling"]),
        max_position_embeddings=_positive_int(fields, "max_position_embeddings"),
        tie_embeddings=_bool(fields, "tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        **(_moe_fields(fields, layers) if family.moe else {}),
    )


def _moe_fields(fields: dict[str, Any], layers: int) -> dict[str, Any]:
    experts = _positive_int(fields, "num_experts")
    per_token = _positive_int(fields, "num_experts_per_tok")
    if per_token > experts:
        raise ValueError(f"config.json: num_experts_per_tok must be at most num_experts ({experts}), got {per_token}")
    step = _positive_int(fields, "decoder_sparse_step")
    only = fields["mlp_only_layers"] or []
    if not isinstance(only, list) or any(type(i) is not int or not 0 <= i < layers for i in only):
        raise ValueError(f"config.json: mlp_only_layers must be a list of layers below {layers}, got {only!r}")
    coef = fields["router_aux_loss_coef"]
    if isinstance(coef, bool) or not isinstance(coef, int | float) or not 0 <= coef < math.inf:
        raise ValueError(f"config.json: router_aux_loss_coef must be a number >= 0, got {coef!r}")
    return {
        "num_experts": experts,
        "num_experts_per_token": per_token,
        "moe_ffn_hidden_size": _positive_int(fields, "moe_intermediate_size"),
        "norm_topk_prob": _bool(fields, "norm_topk_prob"),
        "router_aux_loss_coef": float(coef),
        # Qwen3MoeDecoderLayer: experts where (layer + 1) is a multiple of decoder_sparse_step.
        "dense_layers": tuple(i for i in range(layers) if i in only or (i + 1) % step),
    }


def _positive_int(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if type(value) is not int or value <= 0:
        raise ValueError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _positive_float(fields: Mapping[str, Any], name: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def _bool(fields: Mapping[str, Any], name: str) -> bool:
    value = fields[name]
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {name} must be true or false, got {value!r}")
    return value
