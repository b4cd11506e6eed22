"""In double precision: without the responses of zero advantage every update has the same gradient, to the last digits.

The whole path of an update (dealing, packing, old log-probs, selection, loss) around a policy small enough for fp64:
the next token's logits are a row of a table. `tests/distributed/test_elision.py` has the real policy, in fp32.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_rlvr.advantage import compute_advantages
from megatron_rlvr.config.schema import (
    AdvantageConfig,
    ClipCovConfig,
    KlCovConfig,
    LossConfig,
    MismatchConfig,
    OptimConfig,
    RatioLevel,
)
from megatron_rlvr.loss.aggregation import AGGREGATIONS
from megatron_rlvr.metrics import merge
from megatron_rlvr.policy.optimizer import UpdateResult
from megatron_rlvr.policy.policy import LogprobPass
from megatron_rlvr.trainer.update.batch import DealOptions, deal, pack_share
from megatron_rlvr.trainer.update.steps import Updater
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup

VOCAB, UPDATES = 11, 2
LOSSES = {
    "ppo": LossConfig(dual_clip=3.0, mismatch=MismatchConfig(weight=RatioLevel.token)),
    "gspo": LossConfig(name="gspo"),
    "cispo": LossConfig(name="cispo"),
    "clip_cov": LossConfig(name="clip_cov", clip_cov=ClipCovConfig(ratio="0.1", lower=0.0, upper=9.0)),
    "kl_cov": LossConfig(name="kl_cov", kl_cov=KlCovConfig(ratio="0.1", skip_zero_advantage=True)),
}


class TablePolicy:
    """Logits of the next token by the present one, fp64, trained by plain gradient descent."""

    device = torch.device("cpu")

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.table_VV = torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=generator).requires_grad_()
        self.gradients = []
        self.passes = []
        """Numbers of micro-batches of the passes without gradient."""

    def look(self, micro):
        logp_TV = self.table_VV[micro.tokens_T].log_softmax(dim=-1)
        logprobs_T = logp_TV.gather(1, micro.targets_T[:, None])[:, 0]
        return logprobs_T, -(logp_TV.exp() * logp_TV).sum(dim=-1)

    def logprobs(self, micro_batches, *, temperature):
        self.passes.append(len(micro_batches))
        with torch.no_grad():
            pairs = [self.look(micro) for micro in micro_batches]
        return LogprobPass(logprobs=[pair[0] for pair in pairs], entropy=[pair[1] for pair in pairs])

    def update(self, micro_batches, loss, *, lr, temperature):
        self.table_VV.grad = torch.zeros_like(self.table_VV)
        found = []
        for micro in micro_batches:
            value, metrics = loss(*self.look(micro), micro)
            value.backward()
            found.append(metrics)
        self.gradients.append(self.table_VV.grad.clone())
        with torch.no_grad():
            self.table_VV -= self.table_VV.grad
        return merge(found), UpdateResult(grad_norm=float(self.gradients[-1].norm()), lr=lr, skipped=False)


def make_groups():
    rng = np.random.default_rng(3)
    made = []
    for index in range(8):
        rollouts = []
        for number in range(6):
            ids = rng.integers(0, VOCAB, int(rng.integers(2, 9))).astype(np.int32)
            right = float(number <= index % 4)
            rollouts.append(
                Rollout(
                    response_ids=ids,
                    rollout_logprobs=rng.normal(-2.4, 0.3, len(ids)).astype(np.float32),
                    text="",
                    finish_reason=FinishReason.stop,
                    weight_versions=[(0, 0, len(ids))],
                    correctness=right,
                    reward=right,
                )
            )
        ids = rng.integers(0, VOCAB, 3).astype(np.int32)
        prompt = Prompt(uid=f"made/{index}", text="", input_ids=ids, answer="", data_source="made")
        made.append(RolloutGroup(prompt=prompt, rollouts=rollouts, index=index))
    return made


def updates_of(policy, name, aggregation="token-mean", *, elide):
    """An updater and what it is to run: two updates on eight groups."""
    groups = make_groups()
    advantages, _ = compute_advantages(groups, AdvantageConfig())
    ranks = SimpleNamespace(ranks=SimpleNamespace(is_last_stage=True, dp_size=1))
    updater = Updater(
        policy, ranks, loss=LOSSES[name], optim=OptimConfig(), temperature=1.0, seed=0, total_updates=UPDATES
    )
    options = DealOptions(
        updates_per_rollout=UPDATES,
        aggregation=aggregation,
        max_response_tokens=16,
        max_tokens_per_microbatch=64,
        dp_size=1,
        micro_batch_multiple=1,
        elide_zero_advantage=elide,
        probed_share=1.0,
    )
    [shares] = deal(groups, advantages, options)
    return updater, [pack_share(share, pad_to_multiple=1, device=policy.device) for share in shares]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_whole_batch(name, aggregation):
    gradients, selected = {}, {}
    for elide in (False, True):
        policy = TablePolicy()
        updater, updates = updates_of(policy, name, aggregation, elide=elide)
        updater.run(updates)
        gradients[elide] = policy.gradients
        micros = [micro for update in updates for micro in update.micro_batches]
        selected[elide] = [int(micro.selected_T.sum()) for micro in micros if micro.selected_T is not None]
        zeros = sum(int((micro.advantages_T[micro.loss_mask_T] == 0).sum()) for micro in micros)
        assert (zeros == 0) == elide
    for full, less in zip(gradients[False], gradients[True], strict=True):
        assert full.abs().max() > 1e-3
        torch.testing.assert_close(less, full, rtol=1e-12, atol=1e-15)
    if "cov" in name:
        assert 0 < sum(selected[True]) <= sum(selected[False])


@pytest.mark.parametrize("name", LOSSES)
def test_old_logprobs_are_those_before_the_first_update(name):
    """One pass for them, which spares the first update where its loss pass comes to the same numbers."""
    policy = TablePolicy()
    updater, updates = updates_of(policy, name, elide=False)
    before = TablePolicy()
    updater.run(updates)
    for micro in (micro for update in updates for micro in update.micro_batches):
        torch.testing.assert_close(micro.old_logprobs_T, before.look(micro)[0].detach(), rtol=0, atol=0)
    first, second = (len(update.micro_batches) for update in updates)
    assert policy.passes == [first + second if "cov" in name else second]
