"""What an engine holds is compared with what the trainer exports, parameter by parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.sync.gpu_checksum import tile_checksum
from megatron_rlvr.sync.parameter_sums import WeightMismatchError, checksum
from megatron_rlvr.sync.verification import SAMPLE_EVERY, Expected, WeightVerifier
from megatron_rlvr.weights.engine_params import engine_places
from megatron_rlvr.weights.engine_slices import EngineLayout
from megatron_rlvr.weights.hf_config import ModelShape
from tests.fakes.engines import DictSource, MemoryEngine, OneRank


def sha(tensor: torch.Tensor) -> str:
    return f"{int.from_bytes(hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()[:8], 'big'):016x}"


def engine_rank(weights: Mapping[str, torch.Tensor], layers: int, tp: int, rank: int) -> dict[str, torch.Tensor]:
    """One rank's parameters of a Qwen3, joined as SGLang's layers join them."""

    def rows(name: str) -> torch.Tensor:
        return weights[name].chunk(tp)[rank]

    held = {"model.norm.weight": weights["model.norm.weight"]}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        vocab = weights[name]
        padded = torch.zeros(-(-len(vocab) // 64) * 64, vocab.shape[1], dtype=vocab.dtype)
        padded[: len(vocab)] = vocab
        held[name] = padded.chunk(tp)[rank]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            held[f"{at}{name}.weight"] = weights[f"{at}{name}.weight"]
        held[f"{at}self_attn.qkv_proj.weight"] = torch.cat([rows(f"{at}self_attn.{p}_proj.weight") for p in "qkv"])
        held[f"{at}mlp.gate_up_proj.weight"] = torch.cat([rows(f"{at}mlp.{p}_proj.weight") for p in ("gate", "up")])
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            held[f"{at}{name}.weight"] = weights[f"{at}{name}.weight"].chunk(tp, dim=1)[rank].contiguous()
    return held


class RankedEngine(MemoryEngine):
    """An engine of several ranks that hold real parameters."""

    def __init__(self, weights: Mapping[str, torch.Tensor], *, layers: int, tp: int) -> None:
        super().__init__("http://ranked")
        self.num_ranks = tp
        self.ranks = [engine_rank(weights, layers, tp, rank) for rank in range(tp)]

    def weights_checksums(self, *, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        return [{name: sha(tensor) for name, tensor in held.items() if name not in skip} for held in self.ranks]


class FixedProbe:
    input_ids = (5, 6, 7)
    tolerance = 1e-3

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def logprobs(self) -> list[float]:
        return [-6.0, -7.0 + self.offset]


@pytest.fixture(scope="module")
def weights(tiny_qwen3: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_qwen3 / "model.safetensors")


def expect(verifier: WeightVerifier, weights: Mapping[str, torch.Tensor], *tp_sizes: int) -> Expected:
    verifier.choose(tp_sizes)
    return verifier.expect(DictSource(weights))


def check(verifier: WeightVerifier, engine: MemoryEngine, expected: Expected) -> None:
    verifier.check_weights(engine, engine.weights_checksums(), expected)


def verifier_of(model: Path, *, sample: bool = False, probe: FixedProbe | None = None) -> WeightVerifier:
    shape = ModelShape.from_hf(model)

    def places(tp: int) -> list:
        return [engine_places(shape, EngineLayout(tp=tp), rank) for rank in range(tp)]

    return WeightVerifier(places=places, dtype=torch.float32, sample=sample, gate=OneRank(), probe=probe)


@pytest.mark.parametrize("tp", [1, 2])
def test_same_weights_agree_and_a_flipped_byte_is_named(
    tiny_qwen3: Path, weights: dict[str, torch.Tensor], tp: int
) -> None:
    verifier = verifier_of(tiny_qwen3)
    engine = RankedEngine(weights, layers=2, tp=tp)
    assert verifier.choose([tp]) == []
    expected = verifier.expect(DictSource(weights))
    assert expected.checksums[tp].keys() == engine.ranks[0].keys(), "every parameter is compared"
    assert expected.num_checked == len(engine.ranks[0])
    check(verifier, engine, expected)
    for name in engine.ranks[-1]:
        flat = engine.ranks[-1][name].clone().view(torch.uint8)
        flat.view(-1)[-1] ^= 1
        whole, engine.ranks[-1][name] = engine.ranks[-1][name], flat.view(torch.float32)
        with pytest.raises(WeightMismatchError, match=f"http://ranked holds other weights .*: {name} .*instead of"):
            check(verifier, engine, expected)
        engine.ranks[-1][name] = whole
    del engine.ranks[0]["model.norm.weight"]
    with pytest.raises(WeightMismatchError, match=r"model.norm.weight .*not there"):
        check(verifier, engine, expected)


def test_engines_in_another_precision_and_of_several_sizes(tiny_qwen3: Path, weights: dict[str, torch.Tensor]) -> None:
    verifier = verifier_of(tiny_qwen3)
    expected = expect(verifier, weights, 2, 1, 2)
    assert sorted(expected.checksums) == [1, 2]
    for tp in (1, 2):
        check(verifier, RankedEngine(weights, layers=2, tp=tp), expected)
    verifier._dtype = torch.bfloat16
    half = expect(verifier, weights, 1)
    norm = weights["model.norm.weight"].to(torch.bfloat16)
    assert half.checksums[1]["model.norm.weight"] == [sha(norm.view(torch.int16))]


def test_samples_cover_everything_in_turn(tiny_qwen3: Path, weights: dict[str, torch.Tensor]) -> None:
    verifier = verifier_of(tiny_qwen3, sample=True)
    engine = RankedEngine(weights, layers=2, tp=1)
    seen: list[str] = []
    for _ in range(SAMPLE_EVERY):
        unchecked = verifier.choose([1])
        expected = verifier.expect(DictSource(weights))
        verifier.check_weights(engine, engine.weights_checksums(skip=unchecked), expected)
        assert not set(unchecked) & expected.checksums[1].keys()
        seen += expected.checksums[1]
    assert sorted(seen) == sorted(engine.ranks[0])


def test_logprobs_that_differ_are_refused(tiny_qwen3: Path, weights: dict[str, torch.Tensor]) -> None:
    engine = RankedEngine(weights, layers=2, tp=1)
    verifier = verifier_of(tiny_qwen3, probe=FixedProbe(5e-4))
    assert verifier.check_logprobs(engine, expect(verifier, weights, 1)) == pytest.approx(5e-4)
    for offset in (0.01, float("nan")):
        verifier = verifier_of(tiny_qwen3, probe=FixedProbe(offset))
        expected = expect(verifier, weights, 1)
        with pytest.raises(WeightMismatchError, match=r"log-probs that are off by .* nats \(at most 0.001"):
            verifier.check_logprobs(engine, expected)


def test_checksum_sees_every_byte_and_its_place() -> None:
    tensor = torch.arange(20000, dtype=torch.float32)
    swapped = tensor[[1, 0, *range(2, 20000)]]
    for of in (checksum, tile_checksum):
        assert of(tensor) != of(swapped)
        assert of(tensor) != of(torch.cat([tensor, torch.zeros(1)]))
        assert of(tensor) == of(tensor.view(100, 200))
    assert checksum(tensor) == sha(tensor)
    assert tile_checksum(torch.empty(0)) == 0
