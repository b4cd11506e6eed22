"""Weight buckets: bytes as a concatenation would give them, casts as `Tensor.to`, and back."""

import pytest
import torch

from megatron_rlvr.ops import get_backend, pack_bucket, unpack_bucket

pytestmark = pytest.mark.usefixtures("ops_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def weights():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 5, generator=generator),
        torch.randn(7, generator=generator).bfloat16(),
        torch.randn(4, 6, generator=generator).t(),  # not contiguous
        torch.randn(0, 8, generator=generator),
        torch.tensor(2.5),
        torch.randn(2, 9, generator=generator, requires_grad=True)[:, 1:8],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast_elements_lie_end_to_end(dtype):
    flat = pack_bucket(weights(), dtype)
    expected = torch.cat([tensor.detach().to(dtype).flatten().view(torch.uint8) for tensor in weights()])
    assert torch.equal(flat, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_share_the_bucket(dtype):
    flat = pack_bucket(weights(), dtype)
    pieces = unpack_bucket(flat, [tensor.shape for tensor in weights()], dtype)
    for piece, tensor in zip(pieces, weights(), strict=True):
        assert piece.dtype == dtype
        assert torch.equal(piece.float(), tensor.detach().to(dtype).float())
    flat.zero_()
    assert all((piece.float() == 0).all() for piece in pieces)


def test_written_into_tensors_with_their_own_dtypes():
    flat = pack_bucket(weights(), torch.bfloat16)
    out = [torch.full_like(tensor.detach(), 9.0) for tensor in weights()]
    addresses = [tensor.data_ptr() for tensor in out]
    returned = unpack_bucket(flat, [tensor.shape for tensor in weights()], torch.bfloat16, out=out)
    assert [tensor.data_ptr() for tensor in returned] == addresses
    for got, tensor in zip(out, weights(), strict=True):
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor.detach().bfloat16().to(tensor.dtype))


def test_own_dtypes_are_kept():
    tensors = [torch.arange(4.0), torch.arange(3.0).bfloat16()]
    flat = pack_bucket(tensors)
    assert torch.equal(flat, torch.cat([tensor.view(torch.uint8) for tensor in tensors]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_bucket([]), "tensors must hold at least one tensor, got none"),
        (lambda: pack_bucket([torch.ones(1)], torch.int64), "dtype must be one of .* got torch.int64"),
        (lambda: unpack_bucket(torch.zeros(8), [(2,)], torch.float32), "flat must be a contiguous uint8 .*float32"),
        (
            lambda: unpack_bucket(torch.zeros(9, dtype=torch.uint8), [(2,)], torch.float32),
            "flat must have 8 bytes for these shapes, got 9",
        ),
        (
            lambda: unpack_bucket(torch.zeros(8, dtype=torch.uint8), [(2,)], torch.float32, out=[torch.zeros(1, 2)]),
            r"out must have the shapes \[\(2,\)\], got \[\(1, 2\)\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ops_keep_the_dispatcher_contracts():
    if get_backend() != "native":
        pytest.skip("dispatcher ops belong to the native backend")
    ops = torch.ops.megatron_rlvr
    plain = [tensor.detach() for tensor in weights()]
    torch.library.opcheck(ops.pack_bucket, (plain, torch.bfloat16))
    flat = pack_bucket(plain, torch.bfloat16)
    torch.library.opcheck(ops.unpack_bucket_, (flat, [torch.empty_like(t) for t in plain], torch.bfloat16))
