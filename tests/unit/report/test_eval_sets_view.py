"""Named sets on the report."""

from megatron_rlvr.report.eval_sets_view import eval_set_charts, eval_sets_section


def test_every_estimate_of_a_set_is_drawn_at_its_steps():
    rows = [
        {"step": 1, "eval/sums/start_pass@1": 0.25, "eval/sums/start_pass@1_low": 0.2, "eval/accuracy": 0.5,
         "eval/sums/start_pass@1_high": 0.4, "eval/sums/num_problems": 8},
        {"step": 2, "reward/mean": 0.1},
        {"step": 3, "eval/sums/pass@1": 0.5, "eval/sums/pass@16": 0.75, "eval/sums/greedy": 0.6,
         "eval/aime/greedy": 0.1,
         "eval/sums/pass@1_low": 0.4, "eval/sums/pass@1_high": 0.6, "eval/sums/length_mean": 3.0},
    ]  # fmt: skip
    aime, sums = eval_set_charts(rows)
    assert (aime.title, sums.title) == ("aime", "sums")
    assert sums.steps == [0, 3]
    assert [(s.label, s.values) for s in sums.series] == [
        ("pass@1", [0.25, 0.5]), ("pass@16", [None, 0.75]), ("greedy", [None, 0.6])]  # fmt: skip
    assert [round(e, 6) for e in sums.series[0].errors] == [0.1, 0.1]
    assert "<h2>Evaluation sets</h2>" in eval_sets_section(rows)
    assert eval_sets_section(rows[1:2]) == ""
