"""The report's views on the entropy: there with data, absent without, and showing the right numbers."""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from megatron_rlvr.entropy.dynamics_monitor import DynamicsMonitor
from megatron_rlvr.entropy.law_tracker import LawTracker
from megatron_rlvr.report import MetricsWriter, write_report
from megatron_rlvr.report.entropy_view import TABLE_1, control_section, covariance_section, entropy_chart
from megatron_rlvr.report.token_map import TokenMap, write_token_maps
from tests.unit.report.test_html_report import Page, row

STEPS = 48


def full_rows(steps: int = STEPS) -> list[dict]:
    """A run with every instrument on: two sources, a controller, evaluations, a look every second step."""
    rng = np.random.default_rng(0)
    dynamics, law = DynamicsMonitor(window=20), LawTracker(total_steps=steps)
    rows = []
    for step in range(1, steps + 1):
        entropy = 0.9 * math.exp(-step / 30) + 0.02 * rng.normal()
        cov = 0.01 * math.exp(-step / 40)
        more = {"entropy/mean": entropy, "entropy/sequence_mean": entropy, "cov/mean": cov, "time/diagnostics_s": 0.4}
        for place, (_, mean, border, _) in enumerate(TABLE_1[1:], start=1):
            more |= {mean: cov * 12 * 3**place, border: cov * 9 * 3**place}
        for source, shift in (("chain_sum", 0.05), ("word_sorting", -0.05)):
            more |= {f"entropy/mean/{source}": entropy + shift, f"advantage/K/{source}": 0.4 + shift}
            more[f"reward/accuracy/{source}"] = 0.3 + step / 200 + shift
        more |= {"entropy/positive_advantage": entropy + 0.1, "entropy/negative_advantage": entropy + 0.2}
        more |= {"advantage/hard_fraction": 0.3, "advantage/easy_fraction": 0.2, "advantage/degenerate_fraction": 0.5}
        more |= {"dynamics/p2": -0.004, "dynamics/p2/accuracy_0_25": -0.002, "dynamics/p2/accuracy_50_75": -0.006}
        more |= {"safety/change": -0.01, "safety/opposite_change": 0.02, "safety/lower": -0.1, "safety/upper": 0.15}
        more |= {"controller/value/entropy_coef": 0.01 * math.sin(step / 5) ** 2, "controller/entropy_ema": entropy}
        more |= {"controller/effect/entropy_coef": 2.0, "controller/error": 0.1, "controller/active": 0.0}
        more |= {"controller/saturated": 0.0}
        if step % 2 == 0:
            p4 = -0.03 * entropy + 0.002 * rng.normal()
            more |= {"dynamics/p4": p4, "dynamics/m1": p4 * (1 + 0.05 * rng.normal()), "dynamics/p3": 0.3 * p4}
            more |= {"dynamics/p3/positive": 0.2 * p4, "dynamics/p3/negative": 0.1 * p4}
            more |= {"dynamics/p3/hard": 0.25 * p4, "dynamics/p3/easy": 0.05 * p4}
        if step % 4 == 0:
            more |= {"eval/accuracy": 0.56 - 0.17 * math.exp(entropy) + 0.01 * rng.normal(), "eval/num_problems": 256}
        each = row(step, **more)
        rows.append(each | dynamics.observe(each) | law.observe(each).metrics)
    return rows


def made_maps() -> list[TokenMap]:
    """A right and a wrong response with selected tokens."""
    pieces = ["The", " sum", " is", " ", "<b>", "17", "\n", "", "€", "."]
    made = []
    for number, right in enumerate((True, False)):
        covariance = [0.9 * math.sin(i + number) for i in range(len(pieces))]
        made.append(
            TokenMap(
                uid="train/17",
                source="chain_sum",
                number=number,
                right=right,
                advantage=1.5 if right else 0.0,
                pieces=pieces,
                logprobs=[-0.1 * i for i in range(len(pieces))],
                entropy=[0.2] * len(pieces) if right else [],
                covariance=covariance,
                selected=[i in (1, 5) and right for i in range(len(pieces))],
            )
        )
    return made


def write_run(folder: Path, rows: list[dict]) -> Path:
    run = folder / "quickstart" / "2026-01-31_14-07-55"
    run.mkdir(parents=True)
    with MetricsWriter(run, tensorboard=False, wandb=False) as writer:
        for each in rows:
            writer.write(each)
    return run


def test_every_view_is_there(tmp_path: Path) -> None:
    run = write_run(tmp_path, full_rows())
    write_token_maps(run, STEPS, made_maps())
    source = write_report(run).read_text(encoding="utf-8")
    page = Page(source)
    assert page.loads == []
    assert re.findall(r"<h2>([^<]+)</h2>", source) == [
        "Entropy dynamics",
        "Covariance",
        "The law R = −a exp(H) + b",
        "Regimes, K and control",
        f"Tokens of step {STEPS}",
    ]
    titles = set(re.findall(r"<h3>([^<]+)</h3>", source))
    assert titles >= {
        "Entropy change of an update",
        "Where the change comes from (P3)",
        "Entropy by sign of the advantage",
        "Entropy by data source",
        "Group covariance by accuracy",
        "Prop 4.2 on the groups",
        "Predicted against measured",
        "Covariance of the top tokens",
        "Covariance by share of tokens",
        "Accuracy against entropy",
        "Accuracy over steps",
        "Ceiling as fitted so far",
        "Measured minus predicted accuracy",
        "Regimes of the groups",
        "K",
        "Training accuracy by data source",
        "Entropy as the controller sees it",
        "Controller&#x27;s error",
        "Actuator entropy_coef",
        "Effect of entropy_coef",
        "Controller&#x27;s hand-over",
    }
    for drawing in re.findall(r"<svg.*?</svg>", source):
        assert ET.fromstring(drawing).get("aria-label")
    assert "P4 → M1" in page.text
    assert "5.65" in page.text, "the paper's Table 1"


def test_a_run_without_instruments_has_no_such_view(tmp_path: Path) -> None:
    run = write_run(tmp_path, [{"step": 1, "reward/mean": 0.5, "entropy/mean": 0.5, "cov/mean": 0.1}])
    source = write_report(run).read_text(encoding="utf-8")
    assert "<h2>" not in source
    assert re.findall(r"<h3>([^<]+)</h3><b>", source) == ["Reward", "Entropy", "Token covariance"]


def test_a_logarithm_without_anything_above_zero_is_left_out() -> None:
    row = {"step": 1, "cov/mean": 0.0, "cov/top50_mean": 0.0}
    assert "<figure" not in covariance_section([row])
    assert "<figure" in covariance_section([row | {"cov/top50_mean": 0.1}])


def test_entropy_is_shown_with_what_was_predicted_a_step_before() -> None:
    rows = [{"step": s, "entropy/mean": 1.0 - s / 10} for s in (1, 2, 3)]
    assert [series.label for series in entropy_chart(rows).series] == ["mean over tokens"]
    rows[1]["dynamics/p4"] = -0.08
    measured, predicted = entropy_chart(rows).series
    assert measured.values == [0.9, 0.8, 0.7]
    assert predicted.values == [None, None, 0.8 - 0.08]
    assert predicted.marks
    for each in rows:
        each["entropy/sequence_mean"] = 0.5
    assert [series.pale for series in entropy_chart(rows).series] == [False, True, False]


def test_tokens_are_coloured_marked_and_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path, [row(1)])
    maps = made_maps()
    assert write_token_maps(run, 3, []) is None
    write_token_maps(run, 3, maps)
    source = write_report(run).read_text(encoding="utf-8")
    section = source[source.index("<h2>Tokens") : source.index("<footer")]
    first, second = section.split('<p class="map">')[1:]
    tokens = re.findall(r'<(span|mark) class="(tok[^"]*)"( style="--v:([\d.]+)")? title="([^"]+)">([^<]*)<', first)
    assert len(tokens) == len(maps[0].pieces)
    assert [text for *_, text in tokens[:6]] == ["The", " sum", " is", " ", "&lt;b&gt;", "17"]
    assert tokens[6][-1] == "⏎\n"
    assert tokens[7][-1] == "·"
    assert [place for place, token in enumerate(tokens) if token[0] == "mark"] == [1, 5]
    assert tokens[5][1] == "tok cold picked"
    assert tokens[1][4] == "log-prob −0.1, covariance 0.757, entropy 0.2"
    shades = [float(shade or 0) for *_, shade, _, _ in tokens]
    assert max(shades) == 0.85
    assert "<mark" not in second
    assert "entropy" not in second


def test_long_responses_are_cut(tmp_path: Path) -> None:
    run = write_run(tmp_path, [row(1)])
    count = 3000
    long = TokenMap(
        uid="train/0",
        source="s",
        number=0,
        right=True,
        advantage=1.0,
        pieces=["x"] * count,
        logprobs=[-0.5] * count,
        entropy=[],
        covariance=[0.1] * count,
        selected=[False] * count,
    )
    path = write_token_maps(run, 1, [long])
    source = write_report(run).read_text(encoding="utf-8")
    assert "3000 tokens, 0 selected, the first 400 are shown" in source
    assert source.count('class="tok"') == 400
    assert path.stat().st_size < 200_000


def test_levels_show_where_they_differ_or_change() -> None:
    rows = [{"step": s, "advantage/K": 0.4} for s in (1, 2)]
    assert "<h3>K</h3>" not in control_section(rows)
    rows[1]["advantage/K"] = 0.5
    assert "<h3>K</h3>" in control_section(rows)
    for each in rows:
        each["advantage/K/words"] = 0.6
    assert "other sources" in control_section(rows)
    assert "words" in control_section(rows)
