"""What is left out of an update, what is looked at for it, and what it stands for."""

import numpy as np
import pytest

from megatron_rlvr.config.schema import (
    CovLogp,
    CovScope,
    Elision,
    KlCovConfig,
    LossConfig,
    TrainConfig,
)
from megatron_rlvr.trainer.update.batch import DealOptions, deal
from megatron_rlvr.trainer.update.elision import plan_elision, systematic_sample
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup

SKIPPING = KlCovConfig(skip_zero_advantage=True)


@pytest.mark.parametrize(
    ("loss", "reason", "probed"),
    [
        (LossConfig(), None, 0.1),
        (LossConfig(name="gspo"), None, 0.1),
        (LossConfig(name="cispo"), None, 0.1),
        (LossConfig(name="clip_cov"), None, 1.0),
        (LossConfig(name="kl_cov", kl_cov=SKIPPING), None, 1.0),
        (LossConfig(name="kl_cov"), "KL-Cov's penalty falls on tokens of zero advantage", 1.0),
        (LossConfig(name="clip_cov", cov_scope=CovScope.micro), "loss.cov_scope=micro", 1.0),
        (LossConfig(name="clip_cov", cov_logp=CovLogp.current), "loss.cov_logp=current", 1.0),
        (LossConfig(kl_coef=0.1), "the KL to the reference model", 0.1),
        (LossConfig(entropy_coef=0.1), "the entropy bonus", 0.1),
        (LossConfig(name="a.b:c"), "loss.name=a.b:c is not built in", 0.1),
    ],
)
def test_auto_elides_where_that_is_exact(loss, reason, probed):
    plan = plan_elision(TrainConfig(), loss, has_auxiliary_loss=False)
    assert plan.is_on == (reason is None)
    assert plan.probed_share == probed
    assert (reason or "out of the update") in str(plan)
    with_experts = plan_elision(TrainConfig(), loss, has_auxiliary_loss=True)
    assert not with_experts.is_on


def test_always_and_never():
    always = TrainConfig(elide_zero_advantage=Elision.always)
    assert plan_elision(always, LossConfig(name="clip_cov"), has_auxiliary_loss=False).probed_share == 0.1
    with pytest.raises(ValueError, match="got 'always': the model's auxiliary loss counts the routing of all tokens"):
        plan_elision(always, LossConfig(), has_auxiliary_loss=True)
    never = plan_elision(TrainConfig(elide_zero_advantage=Elision.never), LossConfig(), has_auxiliary_loss=False)
    assert str(never) == "in the update: train.elide_zero_advantage=never"


def test_a_systematic_sample_is_even():
    assert systematic_sample(10, 0.0) == []
    assert systematic_sample(10, 1.0) == list(range(10))
    assert systematic_sample(0, 0.5) == []
    assert systematic_sample(3, 0.01) == [1], "one at least where anything is asked for"
    assert systematic_sample(100, 0.1) == list(range(5, 100, 10))
    for count in range(1, 50):
        chosen = systematic_sample(count, 0.3)
        assert len(set(chosen)) == len(chosen)
        assert max(chosen) < count


def groups(sizes, lengths):
    made = []
    for index, size in enumerate(sizes):
        rollouts = [
            Rollout(
                response_ids=np.zeros(lengths[n % len(lengths)], np.int32),
                rollout_logprobs=np.zeros(lengths[n % len(lengths)], np.float32),
                text="",
                finish_reason=FinishReason.stop,
                weight_versions=[],
            )
            for n in range(size)
        ]
        prompt = Prompt(uid=str(index), text="", input_ids=np.zeros(3, np.int32), answer="", data_source="made")
        made.append(RolloutGroup(prompt=prompt, rollouts=rollouts, index=index))
    return made


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_every_response_is_somewhere_once_and_keeps_its_weight(share, dp_size):
    batch = groups([4] * 6, [2, 5, 3, 4])
    advantages = [np.array([1.0, 0.0, 0.0, -1.0]) if i % 2 else np.zeros(4) for i in range(6)]
    options = {
        "updates_per_rollout": 2,
        "aggregation": "token-mean",
        "max_response_tokens": 8,
        "max_tokens_per_microbatch": 16,
        "dp_size": dp_size,
        "micro_batch_multiple": 1,
    }
    full = deal(batch, advantages, DealOptions(**options, elide_zero_advantage=False))
    less = deal(batch, advantages, DealOptions(**options, elide_zero_advantage=True, probed_share=share))
    for update in range(2):
        weights = {s.trajectory: s.weight for rank in full for m in rank[update].micro_batches for s in m}
        found = {}
        for name in ("micro_batches", "probed", "idle"):
            parts = [getattr(rank[update], name) for rank in less]
            assert len({len(part) for part in parts}) == 1, "the same number of micro-batches on every rank"
            found[name] = [s for part in parts for m in part for s in m]
        everyone = [s for part in found.values() for s in part]
        assert {s.trajectory: s.weight for s in everyone} == weights
        assert len(everyone) == len(weights) == 12
        assert all(s.advantage != 0 for s in found["micro_batches"])
        elided = [*found["probed"], *found["idle"]]
        assert all(s.advantage == 0 for s in elided)
        assert len(found["probed"]) == len(systematic_sample(len(elided), share))
        scale = less[0][update].probe_scale
        if found["probed"]:
            assert scale.responses == len(elided) / len(found["probed"])
            tokens = [sum(len(s.response_ids) for s in part) for part in (elided, found["probed"])]
            assert scale.tokens == tokens[0] / tokens[1]
