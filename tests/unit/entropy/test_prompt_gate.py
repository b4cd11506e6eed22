"""Gates with memory: without it QAE's own, with it fewer flips at the same success rate (spec G4)."""

from fractions import Fraction

import numpy as np
import pytest

from megatron_rlvr.entropy.prompt_gate import PromptGate, Verdicts
from megatron_rlvr.ops.exact import quantile_rank

LEVELS = [Fraction(1, 5), Fraction(2, 5), Fraction(1, 2), Fraction(7, 25), Fraction(9, 10)]


@pytest.mark.parametrize("memory", ["0", "0.5"])
def test_a_first_visit_is_gated_as_qae_gates(memory):
    gate = PromptGate(memory)
    for level in LEVELS:
        for total in range(1, 33):
            for wrong in range(total + 1):
                assert gate.is_hard("a", wrong=wrong, total=total, level=level) == (
                    wrong >= quantile_rank(level, total)
                )


def test_without_memory_nothing_is_carried_over():
    gate = PromptGate("0")
    gate.learn([Verdicts(uid="a", wrong=8, total=8)])
    assert not gate.is_hard("a", wrong=1, total=8, level=Fraction(2, 5))


def test_counts_are_forgotten_by_the_visit():
    gate = PromptGate("0.5")
    gate.learn([Verdicts(uid="a", wrong=4, total=4)])
    gate.learn([Verdicts(uid="a", wrong=0, total=4)])
    # 2 + 0 of 2 + 4 wrong, halved again: 1 of 3, and this visit's 1 of 4.
    assert gate.is_hard("a", wrong=1, total=4, level=Fraction(2, 7))
    assert not gate.is_hard("a", wrong=1, total=4, level=Fraction(2, 7) + Fraction(1, 10**6))
    assert not gate.is_hard("b", wrong=1, total=4, level=Fraction(2, 7)), "another prompt's counts"


def flips(memory, *, rate, group_size, level, visits=400, seed=0):
    """Share of visits at which the gate of a prompt of constant success rate is not that of the visit before."""
    rng, gate = np.random.default_rng(seed), PromptGate(memory)
    gates = []
    for _ in range(visits):
        wrong = int(rng.binomial(group_size, 1 - rate))
        gates.append(gate.is_hard("a", wrong=wrong, total=group_size, level=level))
        gate.learn([Verdicts(uid="a", wrong=wrong, total=group_size)])
    return float(np.mean(np.diff(gates) != 0)), float(np.mean(gates))


def test_memory_flips_less():
    """Without memory the gate is an independent draw with P(n0 >= m), and so flips with 2 P (1 - P)."""
    level, size, rate = Fraction(2, 5), 8, 0.55
    rank = quantile_rank(level, size)
    draws = np.random.default_rng(1).binomial(size, 1 - rate, 200_000)
    hard = float(np.mean(draws >= rank))
    flipped, share = flips("0", rate=rate, group_size=size, level=level, visits=4000)
    assert flipped == pytest.approx(2 * hard * (1 - hard), abs=0.03)
    assert share == pytest.approx(hard, abs=0.03)
    smoothed, _ = flips("0.8", rate=rate, group_size=size, level=level, visits=4000)
    assert smoothed < 0.6 * flipped


def test_a_resumed_gate_decides_alike():
    gate, again = PromptGate("0.7"), PromptGate("0.7")
    rng = np.random.default_rng(0)
    visits = [Verdicts(uid=f"p{rng.integers(3)}", wrong=int(rng.integers(5)), total=4) for _ in range(40)]
    gate.learn(visits)
    again.learn(visits[:20])
    resumed = PromptGate("0.7")
    resumed.load_state_dict(again.state_dict())
    resumed.learn(visits[20:])
    assert resumed.state_dict() == gate.state_dict()


@pytest.mark.parametrize("memory", ["1", "-0.1", "much", "1/0"])
def test_bad_memory_is_refused(memory):
    with pytest.raises(ValueError, match="gate_memory must be"):
        PromptGate(memory)
