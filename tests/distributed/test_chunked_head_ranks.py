"""The chunked head over vocabulary shards: whole outputs, own weight gradient, summed hidden gradient.

Run as a script, this file is one rank; the test starts the ranks and compares what they wrote.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rlvr.ops import chunked_logprob_entropy, set_backend
from megatron_rlvr.ops.backend import BACKENDS
from tests.distributed.ranks import run_ranks

TOKENS, HIDDEN = 7, 5
WIDTHS = {"equal": [12, 12], "odd": [17, 7]}


def batch():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(24, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 11, 12, 23, 16, 17, 5])
    return hidden, weight, targets, torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    hidden, weight, targets, upstream = batch()
    results = {}
    try:
        for backend in BACKENDS:
            set_backend(backend)
            for name, widths in WIDTHS.items():
                shard = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
                leaves = hidden.clone().requires_grad_(), weight[shard].clone().requires_grad_()
                outputs = chunked_logprob_entropy(
                    *leaves, targets, temperature=0.9, group=dist.group.WORLD, chunk_bytes=2 * 8 * widths[rank]
                )
                torch.autograd.backward(list(outputs), list(upstream))
                values = [output.detach() for output in outputs]
                results[f"{backend}/{name}"] = [*values, leaves[0].grad, leaves[1].grad]
    finally:
        dist.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results[rank][case]: log-probs, entropies, gradients of hidden states and of the shard's weight."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(Path(__file__), [str(folder)], world_size=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_equal_the_whole(results, backend, widths):
    hidden, weight, targets, upstream = batch()
    hidden.requires_grad_()
    weight.requires_grad_()
    log_p = torch.log_softmax(hidden @ weight.t() / 0.9, dim=1)
    logprobs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)
    torch.autograd.backward([logprobs, entropy], list(upstream))
    ranks = [result[f"{backend}/{widths}"] for result in results]
    for got in ranks:
        torch.testing.assert_close(got[0], logprobs.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1], entropy.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[2], hidden.grad, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][:3], ranks[1][:3], strict=True))
    torch.testing.assert_close(torch.cat([got[3] for got in ranks]), weight.grad, rtol=1e-11, atol=1e-12)


if __name__ == "__main__":
    main()
