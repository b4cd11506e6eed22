"""The chunked head: outputs and gradients of the whole logits, whatever the memory budget."""

import pytest
import torch

from megatron_rlvr.ops import chunked_logprob_entropy

pytestmark = pytest.mark.usefixtures("ops_backend")

TOKENS, HIDDEN, VOCAB = 13, 6, 50


def batch(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, targets, torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)


def exact(hidden, weight, targets, upstream, temperature):
    """Outputs and gradients in float64."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=1)
    logprobs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)
    torch.autograd.backward([logprobs, entropy], list(upstream))
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_whole_logits(dtype, chunk_tokens):
    hidden, weight, targets, upstream = batch(dtype)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    got = chunked_logprob_entropy(
        *leaves, targets, temperature=0.8, chunk_bytes=chunk_tokens * VOCAB * hidden.element_size()
    )
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.autograd.backward(list(got), [g.to(got[0].dtype) for g in upstream])
    expected = exact(hidden, weight, targets, upstream, 0.8)
    # bf16 logits carry 2**-8 of themselves, which are up to 10, and so do their gradients.
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-2}[dtype]
    for ours, theirs in zip((*got, leaves[0].grad, leaves[1].grad), expected, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=tolerance, atol=tolerance)


def test_only_what_is_asked_for_gets_a_gradient():
    hidden, weight, targets, _ = batch(torch.float32)
    weight.requires_grad_()
    logprobs, _ = chunked_logprob_entropy(hidden, weight, targets, chunk_bytes=1000)
    logprobs.sum().backward()
    expected = exact(hidden, weight.detach(), targets, torch.stack([torch.ones(TOKENS), torch.zeros(TOKENS)]), 1.0)
    torch.testing.assert_close(weight.grad.double(), expected[3], rtol=2e-5, atol=2e-5)
    assert hidden.grad is None


@pytest.mark.parametrize("chunk_tokens", [3, 100])
def test_padded_columns_take_no_part(chunk_tokens):
    hidden, weight, targets, upstream = batch(torch.float32)
    real = VOCAB - 7
    targets = targets % real
    leaf = weight.clone().requires_grad_()
    got = chunked_logprob_entropy(hidden, leaf, targets, vocab_size=real, chunk_bytes=chunk_tokens * VOCAB * 4)
    torch.autograd.backward(list(got), [g.float() for g in upstream])
    expected = exact(hidden, weight[:real], targets, upstream, 1.0)
    for ours, theirs in zip((*got, leaf.grad[:real]), (*expected[:2], expected[3]), strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=2e-5, atol=2e-5)
    assert (leaf.grad[real:] == 0).all()


def test_no_tokens():
    weight = torch.zeros(VOCAB, HIDDEN, requires_grad=True)
    logprobs, entropy = chunked_logprob_entropy(torch.zeros(0, HIDDEN), weight, torch.zeros(0, dtype=torch.int64))
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert (weight.grad == 0).all()


def test_gradcheck():
    hidden, weight, targets, _ = batch(torch.float64)
    leaves = hidden[:4].clone().requires_grad_(), weight[:9].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_logprob_entropy(h, w, targets[:4] % 9, temperature=1.4, chunk_bytes=9 * 8 * 3), leaves
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VD": torch.zeros(VOCAB, 3)}, "weight_VD must have 6 columns like hidden_TD, got 3"),
        ({"weight_VD": torch.zeros(VOCAB, HIDDEN).double()}, "weight_VD must have dtype torch.float32, got"),
        ({"targets_T": torch.full((TOKENS,), VOCAB)}, r"targets_T must be in \[0, 50\), got 50"),
        ({"targets_T": torch.zeros(2, dtype=torch.int64)}, "targets_T must have 13 entries"),
        ({"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        ({"vocab_size": 51}, r"vocab_size must be an integer in \(0, 50\], got 51"),
        ({"chunk_bytes": 0}, "chunk_bytes must be a positive integer, got 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, targets, _ = batch(torch.float32)
    arguments = {"hidden_TD": hidden, "weight_VD": weight, "targets_T": targets} | change
    with pytest.raises(ValueError, match=message):
        chunked_logprob_entropy(**arguments)
