"""Buckets: bounded, in order, and filled in memory that is used again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megatron_rlvr.sync.buckets import BucketMemory, fill_bucket, plan_buckets
from megatron_rlvr.sync.interfaces import TensorMeta
from megatron_rlvr.weights.mapping import Allocator
from megatron_rlvr.weights.slices import Box


def meta(name: str, *shape: int, dtype: str = "float32") -> TensorMeta:
    return TensorMeta(name=name, dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (1000, [range(5)]),
        (64, [range(2), range(2, 3), range(3, 5)]),
        (63, [range(1), range(1, 2), range(2, 3), range(3, 5)]),
        (1, [range(i, i + 1) for i in range(5)]),
    ],
)
def test_buckets_keep_their_bound_unless_one_parameter_exceeds_it(max_bytes: int, expected: list[range]) -> None:
    units = [[meta("a", 8)], [meta("b", 4), meta("c", 4)], [meta("d", 100)], [meta("e", 3)], [meta("f", 2)]]
    assert plan_buckets(units, max_bytes=max_bytes) == expected


def test_a_wider_type_starts_where_it_can_be_viewed() -> None:
    units = [[meta("a", 3, dtype="bfloat16")], [meta("b", 2)], [meta("c", 1, dtype="bfloat16")], [meta("d", 1)]]
    assert plan_buckets(units, max_bytes=1 << 20) == [range(1), range(1, 3), range(3, 4)]
    assert plan_buckets([], max_bytes=1 << 20) == []


class Numbers:
    """A source whose tensors hold the number of their unit."""

    device = torch.device("cpu")
    takes_part = True

    def units(self) -> Sequence[Sequence[TensorMeta]]:
        return [[meta("a", 2, 3), meta("b", 2, dtype="float32")], [meta("c", 5)]]

    def gather(self, unit: int, *, into: Allocator) -> None:
        for one in self.units()[unit]:
            into(one.name, one.shape, torch.float32).fill_(unit)

    def rectangle(self, hf_name: str, box: Box) -> torch.Tensor:
        raise KeyError(hf_name)


def test_filling_lays_tensors_end_to_end_in_memory_that_takes_turns() -> None:
    memory = BucketMemory(num_buckets=2, device=torch.device("cpu"))
    first = fill_bucket(Numbers(), range(2), memory)
    assert [entry.name for entry in first.metas] == ["a", "b", "c"]
    assert first.flat.view(torch.float32).tolist() == [0.0] * 8 + [1.0] * 5
    second = fill_bucket(Numbers(), range(1), memory)
    assert second.flat.data_ptr() != first.flat.data_ptr()
    third = fill_bucket(Numbers(), range(1, 2), memory)
    assert third.flat.data_ptr() == first.flat.data_ptr()
