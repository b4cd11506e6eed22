"""A comparison from its matrix to its page; the runs themselves are stood in for by a script that writes metrics."""

import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from megatron_rlvr.comparison import launch
from megatron_rlvr.comparison.cells import finished
from megatron_rlvr.comparison.launch import LocalLauncher
from megatron_rlvr.comparison.matrix import read_matrix
from megatron_rlvr.comparison.page import write_page
from megatron_rlvr.comparison.results import Spread, clear_difference, read_results
from megatron_rlvr.comparison.runner import Runner, check_starts
from megatron_rlvr.comparison.verdicts import caution, table, verdicts

ROOT = Path(__file__).parents[3]

MATRIX = """
name: toy
title: A toy <comparison>
note: |
  Told as what it is.
baseline: grpo
seeds: [0, 1, 2]
base: [experiment=quickstart, warm_start.cache_dir={cache}, train.steps=6, eval.every=3]
methods:
  grpo: [advantage=grpo]
  qae:
    label: QAE | K=0.4
    overrides: [advantage=qae]
"""

# Writes what a run writes; the accuracy of seed s is 0.5 + 0.01 s, QAE's 0.2 higher.
RUN = """
import sys
from pathlib import Path
from megatron_rlvr.report.metrics_writer import MetricsWriter
from megatron_rlvr.report.run_directory import run_directory

given = dict(one.split("=", 1) for one in sys.argv[1:])
estimator, seed, steps = given["advantage"], int(given["train.seed"]), int(given["train.steps"])
run = run_directory(given["output_dir"], given["experiment"])
(run / "config.yaml").write_text(
    f"advantage: {{estimator: {estimator}}}\\nloss: {{name: ppo, entropy_coef: 0.0, kl_coef: 0.0}}\\n"
)
with MetricsWriter(run, tensorboard=False, wandb=False) as writer:
    for step in range(1, steps + 1):
        row = {"step": step, "reward/mean": 0.1 * step, "entropy/mean": 1.0 - 0.1 * step, "time/step_s": 2.0,
               "advantage/zero_fraction": 0.8 if estimator == "qae" else 0.4, "cov/mean": 0.01, "eval/num_problems": 64}
        if step == 1:
            row["eval/start_accuracy"] = 0.25
        if step % 3 == 0:
            row["eval/accuracy"] = 0.3 + 0.2 * (step == steps) + 0.01 * seed + 0.2 * (estimator == "qae")
        writer.write(row)
Path(sys.argv[0]).with_suffix(".ran").open("a").write(f"{estimator}/{seed}\\n")
if FAILS(estimator, seed):
    sys.exit("no room on the device")
"""


class ScriptLauncher:
    """Runs the script instead of the trainer."""

    capacity = 2

    def __init__(self, script: Path) -> None:
        self.script = script

    def command(self, cell, overrides):
        return [sys.executable, str(self.script), *overrides]


@pytest.fixture
def matrix_file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(MATRIX.format(cache=tmp_path / "warm"))
    return path


def run_matrix(matrix, tmp_path, *, fails="lambda estimator, seed: False"):
    script = tmp_path / "run.py"
    script.write_text(RUN.replace("FAILS", f"({fails})"))
    ran = script.with_suffix(".ran")
    ran.unlink(missing_ok=True)
    notes: list[str] = []
    runner = Runner(
        matrix, tmp_path / "out", ScriptLauncher(script), share_server=False, note=notes.append, progress=lambda p: None
    )
    failed = runner.run()
    return failed, ran.read_text().split() if ran.exists() else [], notes


def test_the_shipped_matrix_asks_for_what_it_says():
    matrix = read_matrix(ROOT / "configs/compare/chain_sum.yaml")
    assert len(matrix.seeds) >= 3
    assert len(matrix.methods) == 9
    check_starts(matrix.cells())
    configs = {cell.method.name: cell.config() for cell in matrix.cells() if cell.seed == 1}
    assert [configs[f"qae_{k}"].advantage.K for k in ("0.2", "0.4", "0.6", "0.8")] == ["0.2", "0.4", "0.6", "0.8"]
    assert (configs["grpo"].loss.eps_high, configs["grpo_clip_higher"].loss.eps_high) == (0.2, 0.28)
    assert {name: c.loss.name for name, c in configs.items() if c.loss.name != "ppo"} == {
        "clip_cov": "clip_cov", "kl_cov": "kl_cov", "qae_kl_cov": "kl_cov"}  # fmt: skip
    assert configs["qae_kl_cov"].advantage.estimator == "qae"
    assert all(c.train.updates_per_rollout > 1 and c.train.seed == 1 for c in configs.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("baseline: grpo", "baseline: ppo"), "baseline must be one of the methods, got 'ppo'"),
        (("seeds: [0, 1, 2]", "seeds: [0, 0]"), r"seeds must be distinct integers of at least 0, got \[0, 0\]"),
        (("name: toy", "name: toy\ncolour: red"), r"unknown keys \['colour'\]"),
        (("title: A toy <comparison>", ""), r"needs \['title'\]"),
        (("[advantage=qae]", "[advantage=qea]"), "cell qae/seed-0: configuration"),
        (("[advantage=qae]", "[train.seed=3]"), "methods.qae must leave train.seed to the comparison"),
        (("[advantage=qae]", "advantage=qae"), "methods.qae must be a list of Hydra overrides"),
    ],
)
def test_a_wrong_matrix_is_refused_by_name(matrix_file, change, message):
    matrix_file.write_text(matrix_file.read_text().replace(*change))
    with pytest.raises(ValueError, match=message):
        read_matrix(matrix_file)


def test_methods_of_a_seed_must_share_their_start(matrix_file):
    matrix_file.write_text(matrix_file.read_text().replace("[advantage=qae]", "[advantage=qae, warm_start.lr=1e-4]"))
    with pytest.raises(ValueError, match="qae/seed-0 and grpo/seed-0 differ in model, data or warm start"):
        check_starts(read_matrix(matrix_file).cells())


def test_finished_cells_are_not_run_again_and_failed_ones_are(matrix_file, tmp_path):
    matrix = read_matrix(matrix_file)
    failed, ran, notes = run_matrix(matrix, tmp_path, fails="lambda estimator, seed: (estimator, seed) == ('qae', 1)")
    assert failed == ["qae/seed-1"]
    assert sorted(ran) == sorted(f"{name}/{seed}" for name in ("grpo", "qae") for seed in (0, 1, 2))
    assert any("qae/seed-1: failed with exit status 1" in note and "no room on the device" in note for note in notes)
    assert run_matrix(matrix, tmp_path)[:2] == ([], ["qae/1"])
    assert run_matrix(matrix, tmp_path)[:2] == ([], [])
    # Other overrides are other cells.
    matrix_file.write_text(matrix_file.read_text().replace("[advantage=qae]", "[advantage=qae, optim.lr=1e-3]"))
    changed = read_matrix(matrix_file)
    assert [finished(tmp_path / "out", cell) is None for cell in changed.cells()] == [False, True] * 3
    assert sorted(run_matrix(changed, tmp_path)[1]) == ["qae/0", "qae/1", "qae/2"]


def test_the_page_tells_means_spread_and_what_is_clear(matrix_file, tmp_path):
    matrix = read_matrix(matrix_file)
    run_matrix(matrix, tmp_path)
    results = read_results(matrix, tmp_path / "out")
    grpo, qae = results
    assert grpo.scalars["accuracy_end"].values == pytest.approx((0.5, 0.51, 0.52))
    assert grpo.scalars["accuracy_end"].sd == pytest.approx(statistics.stdev([0.5, 0.51, 0.52]))
    assert grpo.scalars["reward_end"].mean == pytest.approx(statistics.fmean([0.2, 0.3, 0.4, 0.5, 0.6]))
    assert grpo.differences == {}
    assert qae.differences["accuracy_end"].values == pytest.approx((0.2, 0.2, 0.2))
    assert qae.differences["entropy_end"].values == pytest.approx((0.0, 0.0, 0.0))
    by_title = {verdict.key: verdict for verdict in verdicts(results)}
    assert [label for label, _ in by_title["accuracy_end"].clear] == ["QAE | K=0.4"]
    assert by_title["entropy_end"].clear == ()
    assert "none is called clear" not in caution(matrix, results)
    # Points of all seeds: before training with the first step's entropy, and steps 3 and 6.
    assert grpo.law.fit is not None
    assert grpo.law.fit.num_points == 9
    assert "active: qae" in qae.law.verdict

    html_file, markdown_file, json_file = write_page(matrix, results, tmp_path / "out", remark="A shared machine.")
    page = html_file.read_text()
    assert "A toy &lt;comparison&gt;" in page
    assert "A shared machine." in page
    assert not re.search(r"https?://|src=|href=", page), "the page must need nothing else"
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)
    assert page.count('class="seed"') % 6 == 0
    rows = [line for line in markdown_file.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 2
    assert r"QAE \| K=0.4" in rows[-1]
    assert "51.0% ± 1.0" in rows[-2]
    written = json.loads(json_file.read_text())
    ends = [cell["scalars"]["accuracy_end"] for cell in written["methods"][1]["cells"]]
    assert ends == pytest.approx([0.7, 0.71, 0.72])
    assert written["methods"][1]["mean"]["accuracy_end"] == pytest.approx(statistics.fmean(ends))


def test_intervals_are_those_of_students_t():
    spread = Spread(values=(1.0, 2.0, 3.0))
    # t(0.975, 2) = 4.3027
    assert spread.half_width == pytest.approx(4.3027 * 1.0 / math.sqrt(3), rel=1e-4)
    assert not clear_difference(spread)
    assert clear_difference(Spread(values=(4.9, 5.0, 5.1)))
    assert not clear_difference(Spread(values=(5.0, 5.0001))), "two may agree by chance"
    assert not clear_difference(Spread(values=(5.0,)))


def test_an_unfinished_comparison_says_so(matrix_file, tmp_path):
    matrix = read_matrix(matrix_file)
    run_matrix(read_matrix(matrix_file, seeds=(0,)), tmp_path)
    results = read_results(matrix, tmp_path / "out")
    write_page(matrix, results, tmp_path / "out", remark="")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "2 runs (unfinished: 6 were asked for)" in text
    assert "Over fewer than 3 seeds none is called clear" in text
    assert len(table(results)) == 2
    with pytest.raises(ValueError, match="at least one finished cell"):
        write_page(matrix, [], tmp_path / "out", remark="")


def test_a_cell_is_the_training_command():
    cell = read_matrix(ROOT / "configs/compare/chain_sum.yaml").cells()[0]
    overrides = [*cell.overrides, "output_dir=x"]
    assert LocalLauncher(1).command(cell, overrides)[1:] == ["-m", "megatron_rlvr.train", *overrides]
    assert "--nproc-per-node" in LocalLauncher(2).command(cell, overrides)
    with pytest.raises(ValueError, match="--ranks must be at least 1, got 0"):
        LocalLauncher(0)


def test_a_cell_on_a_cluster_is_a_job_that_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "config_dir", lambda: tmp_path / "configs")
    with pytest.raises(ValueError, match="--slurm needs the project's checkout"):
        launch.SlurmLauncher("mine", jobs=2)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "submit.py").write_text("")
    one, other = read_matrix(ROOT / "configs/compare/chain_sum.yaml").cells()[:2]
    launcher = launch.SlurmLauncher("mine", jobs=2)
    command = launcher.command(one, [*one.overrides, "output_dir=x"])
    assert command[1:4] == [str(tmp_path / "slurm" / "submit.py"), "--follow", "cluster=mine"]
    assert command[4] == f"run_name=cell-{one.fingerprint}"
    assert command[5:] == [*one.overrides, "output_dir=x"]
    assert launcher.command(other, [])[4] != command[4]
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        launch.SlurmLauncher("mine", jobs=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "2"], "--jobs has no effect without --slurm"),
        (["--slurm", "mine", "--share-server"], "--share-server has no effect with --slurm"),
        (["--slurm", "mine", "--ranks", "2"], "--ranks has no effect with --slurm"),
        (["--seeds", "0,x"], "--seeds must be integers"),
    ],
)
def test_mistakes_of_the_tool_are_named(matrix_file, tmp_path, monkeypatch, capsys, arguments, message):
    spec = importlib.util.spec_from_file_location("compare", ROOT / "tools" / "compare.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)
    assert tool.main([str(matrix_file), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_tool_stops_on_ctrl_c_with_its_cell(matrix_file, tmp_path):
    """The cell it has begun ends with it, and the next call would begin it again."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/compare.py"), str(matrix_file), "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    log = tmp_path / "out" / "logs" / "grpo" / "seed-0.log"
    try:
        while not log.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert not list((tmp_path / "out").glob("cells/*/*.json"))
