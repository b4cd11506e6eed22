"""The batched attention of the CPU platform gives what SGLang's own request-by-request attention gives."""

from __future__ import annotations

import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_rlvr.rollout import platform

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None or torch.cuda.is_available(), reason="SGLang on a CPU"
)
HEADS, KEY_HEADS, SIZE = 4, 2, 8


@pytest.fixture(scope="module")
def own():
    """SGLang's own methods, as they were before the platform replaced them."""
    platform.install()
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    for name in ("_run_sdpa_forward_decode", "_run_sdpa_forward_extend"):
        assert hasattr(getattr(TorchNativeAttnBackend, name), "__wrapped__"), "the platform reaches the backend"
    return SimpleNamespace(
        decode=TorchNativeAttnBackend._run_sdpa_forward_decode.__wrapped__,
        extend=TorchNativeAttnBackend._run_sdpa_forward_extend.__wrapped__,
        batched=TorchNativeAttnBackend._run_sdpa_forward_extend,
        backend=TorchNativeAttnBackend,
    )


def batch(new: list[int], prefix: list[int]) -> dict[str, torch.Tensor]:
    """Requests whose tokens lie scattered over the cache."""
    generator = torch.Generator().manual_seed(0)
    total = [n + p for n, p in zip(new, prefix, strict=True)]
    slots = torch.randperm(sum(total) + 7, generator=generator)
    req_to_token = torch.full((len(new) + 2, 64), 10**6, dtype=torch.int32)  # unused places hold no valid slot
    pool = torch.randperm(len(new) + 2, generator=generator)[: len(new)]
    for index, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(total, initial=0))):
        req_to_token[pool[index], : end - start] = slots[start:end].int()
    return {
        "query": torch.randn(sum(new), HEADS, SIZE, generator=generator),
        "output": torch.full((sum(new), HEADS, SIZE), torch.nan),
        "k_cache": torch.randn(len(slots), KEY_HEADS, SIZE, generator=generator),
        "v_cache": torch.randn(len(slots), KEY_HEADS, SIZE, generator=generator),
        "req_to_token": req_to_token,
        "req_pool_indices": pool,
        "seq_lens": torch.tensor(total),
        "extend_prefix_lens": torch.tensor(prefix),
        "extend_seq_lens": torch.tensor(new),
    }


@pytest.mark.parametrize("slots_at_a_time", [1, 200, 1 << 22])
@pytest.mark.parametrize(
    ("new", "prefix"), [([1], [0]), ([5, 1, 9], [0, 11, 3]), ([2, 2, 2, 7], [0, 0, 40, 1])], ids=str
)
def test_extend(own, new, prefix, slots_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "SLOTS_AT_A_TIME", slots_at_a_time)
    given = batch(new, prefix)
    want = own.extend(None, **{**given, "output": given["output"].clone()}, scaling=0.3, enable_gqa=True, causal=True)
    got = own.batched(None, **given, scaling=0.3, enable_gqa=True, causal=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("slots_at_a_time", [1, 1 << 22])
def test_decode(own, slots_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "SLOTS_AT_A_TIME", slots_at_a_time)
    given = batch([1] * 6, [0, 3, 17, 1, 40, 8])
    for name in ("extend_prefix_lens", "extend_seq_lens"):
        del given[name]
    want = own.decode(None, **{**given, "output": given["output"].clone()}, scaling=0.3, enable_gqa=True)
    got = platform.batched_decode(**given, scaling=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_other_attention_stays_sglangs(own) -> None:
    given = batch([3, 2], [0, 4])
    options = {"scaling": 0.3, "enable_gqa": True, "causal": True, "sliding_window_size": 2}
    want = own.extend(own.backend, **{**given, "output": given["output"].clone()}, **options)
    got = own.batched(own.backend, **given, **options)
    assert torch.equal(got, want)
