"""What the diagnostics look at: spread over the batch, dealt to ranks, named by update and trajectory."""

import numpy as np
import pytest

from megatron_rlvr.config.schema import DiagnosticsConfig
from megatron_rlvr.report.samples import choose_samples
from megatron_rlvr.trainer.diagnostics.look import check_diagnostics, plan_look, response_places
from megatron_rlvr.trainer.diagnostics.measurements import TokenRecord
from megatron_rlvr.trainer.diagnostics.monitors import choose_maps
from megatron_rlvr.trainer.update.batch import DealOptions, deal
from tests.unit.trainer.test_group_dynamics import made_group

OPTIONS = DealOptions(
    updates_per_rollout=2,
    aggregation="token-mean",
    max_response_tokens=8,
    max_tokens_per_microbatch=12,
    dp_size=2,
    micro_batch_multiple=1,
    elide_zero_advantage=False,
)
GROUPS = [made_group(i, "sums" if i % 2 else "words", [1, 0, None, 0], i) for i in range(6)]
ADVANTAGES = [np.array([1.0, 0.0, 0.0, -1.0]) for _ in GROUPS]


def test_probe_is_spread_and_dealt_evenly():
    looks = plan_look(GROUPS, ADVANTAGES, OPTIONS, probe_responses=9, samples=[])
    assert len(looks) == 2
    for shares in zip(*(look.probes for look in looks), strict=True):
        # The same sources everywhere, in the same order, with as many micro-batches: ranks stay in step.
        assert len({share.source for share in shares}) == 1
        assert len({len(share.micro_batches) for share in shares}) == 1
        assert len({share.num_tokens for share in shares}) == 1
        sequences = [s for share in shares for micro in share.micro_batches for s in micro]
        assert sum(len(s.response_ids) for s in sequences) == shares[0].num_tokens
        assert all(s.source == shares[0].source for s in sequences)
    chosen = [s for look in looks for share in look.probes for micro in share.micro_batches for s in micro]
    # 18 usable responses: every second one, first and last included.
    assert sorted(s.trajectory for s in chosen) == [0, 2, 4, 6, 8, 11, 13, 15, 17]


def test_probe_takes_all_of_a_small_batch():
    [look, other] = plan_look(GROUPS, ADVANTAGES, OPTIONS, probe_responses=64, samples=[])
    counted = [s.trajectory for each in (look, other) for p in each.probes for micro in p.micro_batches for s in micro]
    assert sorted(counted) == list(range(18))


def test_watched_responses_are_named_as_they_are_dealt():
    samples = choose_samples(GROUPS, 12)
    [look, other] = plan_look(GROUPS, ADVANTAGES, OPTIONS, probe_responses=0, samples=samples)
    assert look.probes == []
    assert look.watched == other.watched
    shares = deal(GROUPS, ADVANTAGES, OPTIONS)
    dealt = {
        (update, s.trajectory): s
        for rank in shares
        for update, share in enumerate(rank)
        for micro in share.micro_batches
        for s in micro
    }
    assert len(samples) == 12
    for sample, place in zip(samples, look.watched, strict=True):
        rollout = GROUPS[sample.group_index].rollouts[sample.number]
        assert dealt[place].rollout_logprobs is rollout.rollout_logprobs


def test_maps_show_selected_tokens_first_and_then_the_samples():
    places = response_places(GROUPS, 2)

    def record(update, trajectory, num_selected):
        values = [0.0] * 4
        return TokenRecord(update=update, trajectory=trajectory, logprobs=values, covariance=values, entropy=[],
                           selected=[i < num_selected for i in range(4)])  # fmt: skip

    counts = {(0, 0): 0, (0, 1): 1, (1, 1): 3, (4, 3): 2, (5, 0): 0}
    records = {places[response]: record(*places[response], count) for response, count in counts.items()}
    samples = [(0, 0), (0, 1), (2, 0), (5, 0)]
    chosen = choose_maps(places, records, samples, count=4)
    # Two by their number of selected tokens, then samples, of which one was selected and one is not this step's.
    assert chosen == [(1, 1), (4, 3), (0, 0), (0, 1)]
    assert choose_maps(places, records, [], count=4) == [(1, 1), (4, 3), (0, 1)]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"every": -1}, r"diagnostics.every must be at least 0, got -1"),
        ({"token_samples": 2}, r"diagnostics.token_samples has no effect while diagnostics.every is 0, got 2"),
        ({"window": 1}, r"diagnostics.window must be at least 2, got 1"),
        (
            {"law_reference": "nowhere"},
            "must be the folder of a run with a law, got 'nowhere'",
        ),
    ],
)
def test_mistakes_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        check_diagnostics(DiagnosticsConfig(**fields))
