"""tools/law.py on runs written by the metrics writer."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.entropy.law import fit_law
from megatron_rlvr.report.metrics_writer import MetricsWriter

ROOT = Path(__file__).parents[3]
CONFIG = "advantage: {{estimator: {estimator}}}\nloss: {{name: ppo, entropy_coef: 0.0, kl_coef: 0.0}}\n"
ENTROPIES = np.linspace(1.0, 0.1, 20)


def made_run(folder, *, estimator="grpo", key="entropy/sequence_mean", evaluated=2):
    """Every `evaluated`-th step is evaluated, and the state before the first."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(estimator=estimator))
    rng = np.random.default_rng(0)
    points = []
    with MetricsWriter(folder, tensorboard=False, wandb=False) as writer:
        for step, entropy in enumerate(ENTROPIES, start=1):
            row = {"step": step, key: float(entropy), "eval/num_problems": 128}
            accuracy = 0.56 - 0.17 * math.exp(entropy) + rng.normal(0, 0.003)
            if step == 1:
                row["eval/start_accuracy"] = accuracy
                points.append((entropy, accuracy))
            if step % evaluated == 0:
                row["eval/accuracy"] = accuracy
                points.append((entropy, accuracy))
            writer.write(row)
    return folder, points


def law(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / "tools" / "law.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )


def test_table_and_page_of_two_runs(tmp_path):
    plain, points = made_run(tmp_path / "outputs" / "grpo" / "one")
    acting, _ = made_run(tmp_path / "outputs" / "qae" / "two", estimator="qae", key="entropy/mean")
    done = law(tmp_path, plain, acting / "metrics.jsonl")
    assert done.returncode == 0, done.stderr
    fit = fit_law(*zip(*points, strict=True))
    heading, one, two, drawn = done.stdout.splitlines()
    assert heading.split()[:4] == ["run", "points", "a", "b"]
    assert one.split()[:5] == ["grpo/one", "11", f"{fit.a:.3g}", "±", f"{fit.a_se:.3g}"]
    assert f"{fit.b:.3g} ± {fit.b_se:.3g}" in one
    assert f"{fit.ceiling:.1%} ± {fit.ceiling_se * 100:.1f}" in one
    assert one.rstrip().endswith("holds")
    assert "active: qae" in two
    assert drawn == "drawn in law.html"
    text = (tmp_path / "law.html").read_text()
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    assert len(drawings) == 4
    assert len(drawings[0].findall("circle[@class='mark c1']")) == 11
    for drawing in drawings:
        for circle in drawing.findall("circle"):
            assert 40 <= float(circle.get("cx")) <= 400
            assert 0 <= float(circle.get("cy")) <= 200


def test_run_with_too_few_points_is_told_apart(tmp_path):
    run, _ = made_run(tmp_path / "grpo" / "short", evaluated=20)
    done = law(tmp_path, run, "--html", tmp_path / "page.html")
    assert done.returncode == 1
    assert "the law needs 3 points or more, got 2" in done.stdout
    assert (tmp_path / "page.html").exists()


def test_run_without_its_configuration_is_not_called_plain(tmp_path):
    run, _ = made_run(tmp_path / "grpo" / "bare")
    (run / "config.yaml").unlink()
    assert "config.yaml is missing" in law(tmp_path, run).stdout


@pytest.mark.parametrize(("arguments", "word"), [(["nowhere"], "nowhere"), (["nowhere", "--early", "2"], "--early")])
def test_mistakes_are_named(tmp_path, arguments, word):
    done = law(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert word in done.stderr
