"""What the controller's actuators do to the entropy of a toy that learns: measured here, claimed of nothing else.

A contextual bandit (16 contexts, 16 actions of which up to three are right), a softmax table, Adam, four updates a
rollout: actions are responses of one token, through the same ops as in training. K is not among the assertions: on
policy it has no first-order effect (spec A8), and between 0.2 and 0.6 none was seen here.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rlvr.config.schema import ActuatorConfig, ActuatorName, AdvantageConfig, ControllerConfig, LossConfig
from megatron_rlvr.ops import (
    aggregated_policy_loss,
    group_advantages,
    select_tokens,
    vocab_parallel_logprob_entropy,
)
from megatron_rlvr.trainer.steering.controls import Controls

CONTEXTS, ACTIONS, GROUP_SIZE, UPDATES = 16, 16, 8, 4
LEARNING_RATE = 0.05


class Bandit:
    """A policy in training."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = (0.5 * torch.randn(CONTEXTS, ACTIONS, generator=self.generator)).requires_grad_()
        self.right = torch.randint(0, ACTIONS, (CONTEXTS, 3), generator=self.generator)
        self.optimizer = torch.optim.Adam([self.logits], lr=LEARNING_RATE)
        self.steps = 0

    def step(self, loss: LossConfig) -> float:
        """A rollout and its updates; returns the entropy of the policy that made it, nats."""
        context = torch.arange(CONTEXTS).repeat_interleave(GROUP_SIZE)
        with torch.no_grad():
            logprobs = torch.log_softmax(self.logits[context], -1)
            action = torch.multinomial(logprobs.exp(), 1, generator=self.generator)[:, 0]
            old = logprobs.gather(1, action[:, None])[:, 0]
            entropy = float(-(logprobs.exp() * logprobs).sum(-1).mean())
        rewards = (self.right[context] == action[:, None]).any(1).float()
        count = len(action)
        mask, order = torch.ones(count, dtype=torch.bool), torch.arange(count)
        given = {
            "old_logprobs_T": old,
            "advantages_T": group_advantages(rewards, GROUP_SIZE, estimator="grpo"),
            "mask_T": mask,
            "weights_T": torch.full((count,), 1 / count),
        }
        options = {"eps_high": loss.eps_high} if loss.name == "ppo" else {}
        if loss.name != "ppo":
            ratio = loss.kl_cov.ratio if loss.name == "kl_cov" else loss.clip_cov.ratio
            bounds = {"lower": 0.0, "upper": 9.0} if loss.name == "clip_cov" else {}
            given["selected_T"] = select_tokens(
                old,
                given["advantages_T"],
                mask,
                method=loss.name,
                ratio=ratio,
                trajectory_T=order,
                position_T=torch.zeros_like(order),
                step=self.steps,
                **bounds,
            )
        for _ in range(UPDATES):
            current, entropies = vocab_parallel_logprob_entropy(self.logits[context], action)
            total, _ = aggregated_policy_loss(current, **given, loss=loss.name, **options)
            self.optimizer.zero_grad()
            (total - loss.entropy_coef * entropies.mean()).backward()
            self.optimizer.step()
        self.steps += 1
        return entropy


def entropy_after(loss: LossConfig, seed: int, steps: int = 30) -> float:
    bandit = Bandit(seed)
    return [bandit.step(loss) for _ in range(steps + 1)][-1]


PPO = LossConfig()
KL_COV, CLIP_COV = LossConfig(name="kl_cov"), LossConfig(name="clip_cov")
CASES = {
    "entropy bonus": [replace(PPO, entropy_coef=coef) for coef in (0.0, 0.1, 0.2)],
    "kl_cov": [replace(KL_COV, kl_cov=replace(KL_COV.kl_cov, ratio=ratio)) for ratio in ("0.01", "0.2", "0.4")],
    "clip_cov": [replace(CLIP_COV, clip_cov=replace(CLIP_COV.clip_cov, ratio=ratio)) for ratio in ("0.01", "0.4")],
}


@pytest.mark.parametrize("name", CASES)
def test_more_of_an_actuator_keeps_more_entropy(name):
    for seed in (0, 1):
        entropies = [entropy_after(loss, seed) for loss in CASES[name]]
        assert entropies == sorted(entropies), (name, entropies)
        assert entropies[-1] > 1.15 * entropies[0], (name, entropies)


def test_the_controller_holds_the_entropy_with_the_bonus():
    """And takes it back once the entropy is above the set-point."""
    entry = ActuatorConfig(name=ActuatorName.entropy_coef, low=0.0, high=0.3, gain=0.05, max_step=0.02)
    settings = ControllerConfig(target_entropy=1.0, rho=0.5, deadband=0.02, actuators=[entry])
    controls = Controls(AdvantageConfig(), PPO, settings, seed=0)
    bandit = Bandit(0)
    seen, coefficients = [], []
    for _ in range(150):
        coefficients.append(controls.loss().entropy_coef)
        seen.append(bandit.step(controls.loss()))
        controls.observe(seen[-1])
    free = entropy_after(PPO, 0, steps=150)
    assert seen[0] > 2.0, "the entropy starts above the set-point: the bonus stays off"
    assert coefficients[:5] == [0.0] * 5
    assert free < 0.7
    assert np.mean(seen[-30:]) == pytest.approx(1.0, rel=0.1)
    peak = int(np.argmax(coefficients))
    assert 0.0 < coefficients[peak] < 0.3
    assert min(coefficients[peak:]) < 0.5 * coefficients[peak]
