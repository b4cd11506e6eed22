"""The evaluation command against the real server: killed, continued, its numbers computed again from its answers."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.paths import python_path

pytestmark = pytest.mark.server
SAMPLES, PROBLEMS = 4, 10
# A verdict that a random model meets now and then.
VERDICT = "def even(text, prompt):\n    return float(len(text) % 2 == 0)\n"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, real_server):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "verdict.py").write_text(VERDICT)
    rows = [{"prompt": f"{place}+1=", "answer": str(place + 1)} for place in range(PROBLEMS)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(folder, real_server, *overrides):
    sets = (
        f"sets=[{{name: mine, jsonl: [{folder / 'mine.jsonl'}], num_samples: {SAMPLES}, temperature: 1.0, k: [1, 3], "
        "greedy: true}]"
    )
    command = [sys.executable, "-m", "megatron_rlvr.evaluate", "protocol=none", sets, "reward.verifier=verdict:even"]
    command += [f"rollout.urls=[{real_server.url}]", "rollout.max_response_tokens=12", f"output_dir={folder / 'out'}"]
    return subprocess.Popen(
        [*command, "reward.num_workers=1", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": python_path(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output


def test_a_killed_evaluation_continues_and_its_numbers_follow_from_its_answers(workplace, real_server):
    process = start(workplace, real_server, "rollout.concurrency=4")
    try:
        while not (lines := answers(workplace)) and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        finish(process)
    lines = answers(workplace)
    assert 1 <= len(lines) < 2 * PROBLEMS, "killed in the middle"

    code, output = finish(start(workplace, real_server))
    assert code == 0, output
    assert f"{len(lines)} of {PROBLEMS} problems are answered already" in output
    records = [json.loads(line) for line in answers(workplace)]
    assert answers(workplace)[: len(lines)] == lines, "what was finished stays as it is"
    expected = {(f"mine/{place}", mode) for place in range(PROBLEMS) for mode in ("sampled", "greedy")}
    assert sorted((record["uid"], record["mode"]) for record in records) == sorted(expected)

    [folder] = (workplace / "out").iterdir()
    summary = json.loads((folder / "summary.json").read_text())["sets"]["mine"]
    sampled = [record["samples"] for record in records if record["mode"] == "sampled"]
    assert all(len(samples) == SAMPLES for samples in sampled)
    for sample in (sample for samples in sampled for sample in samples):
        assert sample["correct"] == (len(sample["text"]) % 2 == 0)
        assert 1 <= sample["length"] <= 12
        assert sample["finish_reason"] in ("stop", "length")
    for k in (1, 3):
        # pass@k by its meaning: the share of k-subsets that hold a right answer.
        shares = [
            sum(any(s["correct"] for s in subset) for subset in itertools.combinations(samples, k))
            / math.comb(SAMPLES, k)
            for samples in sampled
        ]
        assert summary[f"pass@{k}"]["mean"] == pytest.approx(sum(shares) / PROBLEMS)
        assert f"{summary[f'pass@{k}']['mean']:.1%}" in output
    greedy = [record["samples"][0]["correct"] for record in records if record["mode"] == "greedy"]
    assert summary["greedy"]["mean"] == pytest.approx(sum(greedy) / PROBLEMS)
    assert len({s["text"] for samples in sampled for s in samples}) > PROBLEMS, "answers are samples"

    code, output = finish(start(workplace, real_server))
    assert code == 0, output
    assert "all problems are answered already" in output
    assert [json.loads(line) for line in answers(workplace)] == records, "nothing is asked twice"
    assert json.loads((folder / "summary.json").read_text())["sets"]["mine"] == summary


def answers(workplace):
    found = list((workplace / "out").glob("*/mine.jsonl"))
    return found[0].read_text().splitlines() if found else []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.urls=[http://127.0.0.1:9]"], "rollout.urls must name running SGLang servers"),
        (["rollout.urls=[]", "model.path=/nowhere"], "model.path must be an existing folder, got '/nowhere'"),
        (["sets=[]"], "sets must name at least one set of problems"),
    ],
)
def test_mistakes_end_the_command_at_once(workplace, real_server, overrides, message):
    code, output = finish(start(workplace, real_server, *overrides))
    assert code == 2
    assert output.startswith("error: ")
    assert message in output
