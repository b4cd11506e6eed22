"""Every byte of every broadcast bucket counts, at every server, as soon as the bucket is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.sync.bucket_check import BucketCheck
from megatron_rlvr.sync.buckets import BucketMemory, fill_bucket, meta_bytes, plan_buckets
from megatron_rlvr.sync.interfaces import WeightBucket
from megatron_rlvr.sync.parameter_sums import WeightMismatchError, checksum
from megatron_rlvr.weights.engine_params import EnginePlace, engine_places
from megatron_rlvr.weights.engine_slices import EngineLayout
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping as WeightMapping
from megatron_rlvr.weights.slices import box_index, box_shape
from tests.fakes.engines import DictSource, MemoryEngine

MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 70,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "rope_theta": 1e4,
}


class LoadingEngine(MemoryEngine):
    """Puts what buckets bring into the parameters of its ranks, and tells their checksums."""

    def __init__(self, name: str, ranks: Sequence[Mapping[str, EnginePlace]], *, can_skip: bool = True) -> None:
        super().__init__(f"http://{name}")
        self.num_ranks = len(ranks)
        self.places = ranks
        self.can_skip = can_skip
        self.asked: list[set[str]] = []
        self.held = [{p.param: torch.zeros(p.param_shape) for p in places.values()} for places in ranks]

    def load(self, bucket: WeightBucket, flat: torch.Tensor) -> None:
        offset = 0
        for meta in bucket.metas:
            end = offset + meta_bytes(meta)
            tensor = flat[offset:end].view(torch.float32).view(meta.shape)
            offset = end
            for places, held in zip(self.places, self.held, strict=True):
                if (place := places.get(meta.name)) is not None:
                    piece = tensor[box_index(place.hf_box)].reshape(box_shape(place.box))
                    held[place.param][box_index(place.box)] = piece

    def weights_checksums(self, *, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        told = [name for name in self.held[0] if not (self.can_skip and name in skip)]
        self.asked.append(set(told))
        return [{name: checksum(held[name]) for name in told} for held in self.held]


def push(
    check: BucketCheck, source: DictSource, engines: Sequence[LoadingEngine], *, flip: tuple[int, int] | None = None
) -> int:
    """Sends all buckets (a byte of one of them turned on its way); how many they were."""
    runs = plan_buckets(source.units(), max_bytes=1 << 13)
    memory = BucketMemory(num_buckets=2, device=torch.device("cpu"))
    check.begin(engine.num_ranks for engine in engines)
    for index, run in enumerate(runs):
        bucket = fill_bucket(source, run, memory)
        skip = check.announce(bucket.metas, last=index == len(runs) - 1)
        arrived = bucket.flat.clone()
        if flip is not None and flip[0] == index:
            arrived[flip[1] % len(arrived)] ^= 16
        for engine in engines:
            engine.load(bucket, arrived)
        check.add(bucket)
        if skip is not None:
            check.compare([(engine, engine.weights_checksums(skip=skip)) for engine in engines])
    return len(runs)


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_a_byte_that_turns_in_any_bucket_is_found(model: str, tiny_qwen3: Path) -> None:
    shape = ModelShape.from_hf(tiny_qwen3 if model == "dense" else MOE)
    tensors = (
        load_file(tiny_qwen3 / "model.safetensors")
        if model == "dense"
        else {
            name: torch.randn(size)
            for name, size in WeightMapping(shape, layout=Layout(), naming="local").hf_tensors().items()
        }
    )
    source = DictSource(tensors)

    def places(tp: int) -> list[dict[str, EnginePlace]]:
        return [engine_places(shape, EngineLayout(tp=tp), rank) for rank in range(tp)]

    check = BucketCheck(places=places, dtype=torch.float32)
    engines = [LoadingEngine("one", places(1)), LoadingEngine("two", places(2))]
    num_buckets = push(check, source, engines)
    asked = [name for names in engines[1].asked for name in names]
    assert sorted(asked) == sorted(engines[1].held[0]), "every parameter once, at every server"
    assert len(engines[1].asked) > num_buckets / 2, "and as soon as it is whole"
    for index in range(num_buckets):
        with pytest.raises(WeightMismatchError, match=r"http://one holds other weights than were sent: \S+ \("):
            push(check, source, engines, flip=(index, 977 * index))
    push(check, source, engines)


def test_servers_that_sum_everything_are_asked_at_the_end(tiny_qwen3: Path) -> None:
    shape = ModelShape.from_hf(tiny_qwen3)
    ranks = [engine_places(shape, EngineLayout(tp=1), 0)]
    check = BucketCheck(places=lambda tp: ranks, dtype=torch.float32)
    engine = LoadingEngine("old", ranks, can_skip=False)
    source = DictSource(load_file(tiny_qwen3 / "model.safetensors"))
    num_buckets = push(check, source, [engine])
    assert len(engine.asked) == 2 < num_buckets, "once to find out"
    push(check, source, [engine])
    assert len(engine.asked) == 3
    with pytest.raises(WeightMismatchError, match=r"http://old holds other weights than were sent"):
        push(check, source, [engine], flip=(2, 5))
