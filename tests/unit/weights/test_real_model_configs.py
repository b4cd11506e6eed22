"""Completeness of the mapping at real sizes, by slice arithmetic alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.weights import rules
from megatron_rlvr.weights.hf_config import ModelShape, RopeScaling
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.slices import CoverageError, prove_exact_cover

CONFIGS = Path(__file__).parents[3] / "configs" / "models"

# Elements of the published checkpoints (tied output layers counted once).
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-8b-base": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
}

LAYOUTS = {
    "qwen3-0.6b": [Layout(tp=8, pp=4), Layout(tp=16, pp=2, vpp=7)],
    "qwen3-8b": [Layout(tp=2, pp=2), Layout(tp=8, pp=4, vpp=3), Layout(tp=16)],
    "qwen3-8b-base": [Layout(tp=4)],
    "qwen3-14b": [Layout(tp=4, pp=2), Layout(tp=8, pp=5, vpp=4)],
    "qwen3-32b": [Layout(tp=8, pp=4), Layout(tp=4, pp=8, vpp=2), Layout(tp=32)],
    "qwen3-30b-a3b": [Layout(tp=4, ep=8), Layout(tp=2, pp=4, vpp=3, ep=16, etp=2), Layout(pp=16, ep=128)],
    "qwen3-235b-a22b": [Layout(tp=4, pp=2, ep=32), Layout(tp=2, pp=47, ep=8), Layout(tp=8, ep=4, etp=4)],
    "qwen2.5-7b": [Layout(tp=4, pp=2), Layout(tp=2, pp=7, vpp=2)],
    "qwen2.5-32b": [Layout(tp=8, pp=4), Layout(tp=4, pp=8, vpp=4)],
    "llama-3.1-8b": [Layout(tp=8), Layout(tp=2, pp=4, vpp=2)],
    "llama-3.1-70b": [Layout(tp=8, pp=8), Layout(tp=4, pp=10, vpp=4), Layout(tp=32)],
    "llama-3.2-1b": [Layout(tp=8, pp=2, vpp=4)],
    "mistral-7b-v0.3": [Layout(tp=4, pp=4)],
    "smollm2-135m": [Layout(tp=3, pp=2), Layout(tp=3, pp=3, vpp=5)],
}


def test_every_shipped_config_is_covered() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == PARAMETERS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("model", PARAMETERS)
def test_every_element_is_covered_exactly_once(model: str) -> None:
    shape = ModelShape.from_hf(CONFIGS / f"{model}.json")
    for layout in [Layout(), *LAYOUTS[model]]:
        mapping = Mapping(shape, layout=layout, naming="te", grouped_experts=shape.num_experts > 0)
        coverage = mapping.prove_complete()
        assert coverage.num_hf_elements == PARAMETERS[model]
        padding = (mapping.padded_vocab_size - shape.vocab_size) * shape.hidden_size
        assert coverage.num_padding_elements == padding * (1 if shape.tie_embeddings else 2)
        tied_copy = mapping.padded_vocab_size * shape.hidden_size if shape.tie_embeddings and layout.pp > 1 else 0
        assert coverage.num_duplicate_elements == tied_copy


LLAMA_32 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# Published models that do not ship: a shipped one of the same family, sizes, other fields, elements.
OTHERS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], int]] = {
    "Qwen2.5-0.5B": (
        "qwen2.5-7b",
        (896, 4864, 24, 14, 2),
        {"vocab_size": 151936, "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen2.5-72B": ("qwen2.5-7b", (8192, 29568, 80, 64, 8), {}, 72_706_203_648),
    "Qwen2.5-Math-7B": ("qwen2.5-7b", (3584, 18944, 28, 28, 4), {"rope_theta": 1e4}, 7_615_616_512),
    "Qwen3-1.7B": ("qwen3-8b", (2048, 6144, 28, 16, 8), {"tie_word_embeddings": True}, 1_720_574_976),
    "Qwen3-4B": ("qwen3-8b", (2560, 9728, 36, 32, 8), {"tie_word_embeddings": True}, 4_022_468_096),
    "Qwen3-Coder-480B-A35B": (
        "qwen3-30b-a3b",
        (6144, 8192, 62, 96, 8),
        {"num_experts": 160, "moe_intermediate_size": 2560},
        480_154_875_392,
    ),
    "Llama-3.2-3B": (
        "llama-3.1-8b",
        (3072, 8192, 28, 24, 8),
        {
            "tie_word_embeddings": True,
            "head_dim": 128,
            "rope_scaling": LLAMA_32 | {"original_max_position_embeddings": 8192},
        },
        3_212_749_824,
    ),
    "Llama-3.1-405B": ("llama-3.1-8b", (16384, 53248, 126, 128, 8), {}, 405_853_388_800),
    "TinyLlama-1.1B": (
        "llama-3.1-8b",
        (2048, 5632, 22, 32, 4),
        {"vocab_size": 32000, "rope_scaling": None},
        1_100_048_384,
    ),
    "Mistral-Nemo-12B": (
        "mistral-7b-v0.3",
        (5120, 14336, 40, 32, 8),
        {"vocab_size": 131072, "head_dim": 128},
        12_247_782_400,
    ),
    "Mistral-Small-24B": (
        "mistral-7b-v0.3",
        (5120, 32768, 40, 32, 8),
        {"vocab_size": 131072, "head_dim": 128},
        23_572_403_200,
    ),
}


@pytest.mark.parametrize("model", OTHERS)
def test_models_that_do_not_ship_are_covered_too(model: str) -> None:
    like, sizes, fields, elements = OTHERS[model]
    config = json.loads((CONFIGS / f"{like}.json").read_text()) | dict(zip(SIZES, sizes, strict=True)) | fields
    shape = ModelShape.from_hf(config)
    for layout in (Layout(tp=2, pp=2), Layout(ep=8) if shape.num_experts else Layout(pp=2)):
        mapping = Mapping(shape, layout=layout, naming="te", grouped_experts=shape.num_experts > 0)
        assert mapping.prove_complete().num_hf_elements == elements


@pytest.mark.usefixtures("_torchvision_ops")
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "qwen2.5-7b", "llama-3.2-1b"])
def test_names_and_shapes_are_those_of_transformers(model: str) -> None:
    """Against the model that transformers builds from the same config.json on the meta device."""
    import transformers

    config = transformers.AutoConfig.for_model(**json.loads((CONFIGS / f"{model}.json").read_text()))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    ours = Mapping(ModelShape.from_hf(CONFIGS / f"{model}.json"), layout=Layout(), naming="local").hf_tensors()
    if model == "qwen3-30b-a3b":
        # transformers fuses experts in memory and splits them again on saving (test_mapping_roundtrip).
        ours = {name: shape for name, shape in ours.items() if ".experts." not in name}
        expected = {name: shape for name, shape in expected.items() if ".experts." not in name}
    assert ours == expected


def test_rope_of_llama_3() -> None:
    shape = ModelShape.from_hf(CONFIGS / "llama-3.1-8b.json")
    assert shape.rope_theta == 500000.0
    assert shape.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def test_vocabulary_padding_does_not_depend_on_the_layout() -> None:
    """Checkpoints move between layouts without a change of shape, for every tp that divides 128."""
    fields = json.loads((CONFIGS / "qwen3-8b.json").read_text()) | {"vocab_size": 151_669}
    shape = ModelShape.from_hf(fields)
    sizes = {Mapping(shape, layout=Layout(tp=tp), naming="local").padded_vocab_size for tp in (1, 2, 4, 8, 16, 32)}
    assert sizes == {151_680}
    assert Mapping(shape, layout=Layout(tp=2), naming="local", vocab_multiple=5).padded_vocab_size == 151_670


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([((0, 4), (0, 3)), ((3, 6), (0, 3))], "overlap"),
        ([((0, 3), (0, 3)), ((4, 6), (0, 3))], "15 of 18 elements are covered"),
        ([((0, 6), (0, 4))], "lies outside"),
        ([((0, 6), (0, 2)), ((2, 5), (1, 3))], "overlap"),
    ],
)
def test_broken_covers_are_found(boxes: list, message: str) -> None:
    with pytest.raises(CoverageError, match=f"w: .*{message}"):
        prove_exact_cover("w", (6, 3), boxes)


def test_mixed_rectangles_cover() -> None:
    prove_exact_cover("w", (6, 3), [((0, 2), (0, 3)), ((2, 6), (2, 3)), ((2, 4), (0, 2)), ((4, 6), (0, 2))])


def test_a_forgotten_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = Mapping(ModelShape.from_hf(CONFIGS / "qwen3-8b.json"), layout=Layout(tp=2, pp=2), naming="local")
    complete = mapping.hf_tensors()
    mapping._rules = tuple(rule for rule in mapping._rules if rule.local != "self_attention.linear_proj.weight")
    monkeypatch.setattr(Mapping, "hf_tensors", lambda self: complete)
    with pytest.raises(CoverageError, match=r"model.layers.0.self_attn.o_proj.weight: 0 of 16777216 elements"):
        mapping.prove_complete()


def test_a_rule_stated_twice_is_found() -> None:
    mapping = Mapping(ModelShape.from_hf(CONFIGS / "llama-3.1-8b.json"), layout=Layout(tp=2), naming="local")
    mapping._rules += (rules.ATTENTION[2],)
    with pytest.raises(CoverageError, match=r"o_proj.weight: .* overlap"):
        mapping.prove_complete()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=5), r"parallel.tp must divide num_attention_heads \(32\), got 5"),
        (Layout(pp=5), r"parallel.pp must divide num_hidden_layers \(36\), got 5"),
        (Layout(vpp=2), r"parallel.vpp must be 1 where parallel.pp is 1, got 2"),
        (Layout(pp=4, vpp=2), r"parallel.vpp must divide the layers of a pipeline stage \(36 / 4 = 9\), got 2"),
        (Layout(ep=2), r"parallel.ep must be 1 for a dense model, got 2"),
        (Layout(tp=0), r"parallel.tp must be at least 1, got 0"),
    ],
)
def test_impossible_layouts_are_refused(layout: Layout, message: str) -> None:
    shape = ModelShape.from_hf(CONFIGS / "qwen3-8b.json")
    with pytest.raises(ValueError, match=message):
        Mapping(shape, layout=layout, naming="local")


def test_impossible_expert_layouts_are_refused() -> None:
    shape = ModelShape.from_hf(CONFIGS / "qwen3-30b-a3b.json")
    with pytest.raises(ValueError, match=r"parallel.ep must divide num_experts \(128\), got 3"):
        Mapping(shape, layout=Layout(ep=3), naming="local")
    with pytest.raises(ValueError, match=r"parallel.etp must divide moe_intermediate_size \(768\), got 5"):
        Mapping(shape, layout=Layout(etp=5), naming="local")


def test_options_that_contradict_are_refused() -> None:
    shape = ModelShape.from_hf(CONFIGS / "qwen3-30b-a3b.json")
    with pytest.raises(ValueError, match="grouped_experts must be false with naming 'local'"):
        Mapping(shape, layout=Layout(), naming="local", grouped_experts=True)
    with pytest.raises(ValueError, match=r"padded_vocab_size must be a multiple of tp \(4\) and at least 151936"):
        Mapping(shape, layout=Layout(tp=4), naming="local", padded_vocab_size=151937)
