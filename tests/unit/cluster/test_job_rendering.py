"""A job's script: its options, its settings as bash reads them; and what slurm/submit.py makes of a command."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_rlvr.cluster.script import Job, render
from megatron_rlvr.cluster.slurm import JobState, LogTail, UnknownJobError
from megatron_rlvr.config.compose import load_cluster
from megatron_rlvr.trainer.checkpoints.run_state import FREE

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "slurm" / "train.sbatch"


def job(*overrides: str, run_dir: str = "/shared/out/exp/run", **fields: object) -> Job:
    given = {"overrides": ("experiment=quickstart",), "workdir": Path("/home/me"), "source_dir": None, **fields}
    return Job(name="exp", run_dir=Path(run_dir), python="python", cluster=load_cluster(list(overrides)), **given)


def script(*overrides: str, **fields: object) -> str:
    return render(TEMPLATE.read_text(), job(*overrides, **fields))


def components(text: str) -> list[set[str]]:
    """The sbatch options of every component."""
    found: list[set[str]] = [set()]
    for line in text.splitlines():
        if line == "#SBATCH hetjob":
            found.append(set())
        elif line.startswith("#SBATCH "):
            found[-1].add(line.removeprefix("#SBATCH "))
    return found


def settings_in_bash(text: str, *names: str) -> dict[str, list[str]]:
    """What bash makes of the settings block."""
    block = text[text.index("# >>> settings") : text.index("# <<< settings")]
    shown = "".join(f"printf '%s\\0' {name} \"${{{name}[@]}}\" ''; printf '\\n\\0';" for name in names)
    done = subprocess.run(["bash", "-c", f"set -u; SLURM_JOB_ID=1; {block}\n{shown}"], capture_output=True, check=True)
    found = {}
    for part in done.stdout.decode().split("\n\0")[:-1]:
        name, *values = part.split("\0")[:-2]
        found[name] = values
    return found


def test_trainer_and_servers_are_two_components() -> None:
    text = script("cluster=h100", "cluster.trainer_nodes=4", "cluster.server_nodes=2", "cluster.account=us")
    trainer, servers = components(text)
    assert trainer >= {"--nodes=4", "--ntasks-per-node=8", "--cpus-per-task=12", "--gpus-per-node=8", "--mem=0"}
    assert trainer >= {"--signal=B:USR1@900", "--open-mode=append", "--chdir=/home/me", "--job-name=exp"}
    assert "--output=/shared/out/exp/run/job/exp.log" in trainer
    assert servers >= {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=96", "--gpus-per-node=8"}
    for component in (trainer, servers):
        assert component >= {"--partition=batch", "--account=us", "--time=24:00:00", "--exclusive", "--requeue"}
    values = settings_in_bash(text, "SERVERS", "GPUS", "CONTAINER", "INTERFACE", "ENVIRONMENT")
    assert values["SERVERS"] == ["apart"]
    assert values["CONTAINER"] == [
        "--container-image=/shared/images/megatron_rlvr.sqsh",
        "--container-mounts=/home/me:/home/me,/shared/out/exp/run:/shared/out/exp/run,"
        "/shared/models:/shared/models:ro,/shared/data:/shared/data:ro",
        "--container-workdir=/home/me",
    ]
    assert values["ENVIRONMENT"] == ["NCCL_DEBUG=WARN"]


def test_colocated_servers_share_the_trainers_nodes() -> None:
    text = script("cluster=h200", "cluster.trainer_nodes=2")
    [only] = components(text)
    assert only >= {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=96", "--gpus-per-node=h200:8"}
    values = settings_in_bash(text, "SERVERS", "GPUS", "SERVER_GPUS", "MODULES", "SETUP", "RANKS_PER_NODE")
    assert values["SERVERS"] == ["trainer"]
    assert values["GPUS"] == values["SERVER_GPUS"] == ["h200:4"]
    assert values["RANKS_PER_NODE"] == ["4"]
    assert values["MODULES"] == ["gcc/13", "cuda/12.8"]
    assert values["SETUP"] == ["ulimit -l unlimited"]


def test_nothing_is_lost_on_the_way_through_bash() -> None:
    nasty = ("data.prompt_template='it''s {prompt} $HOME `x` \"y\" \\n'", "a=b c", "tail=" + "x" * 200)
    text = script("cluster=cpu", "+cluster.environment={A: 'one two'}", overrides=nasty, run_dir="/a b/c'd/e/f")
    values = settings_in_bash(text, "OVERRIDES", "ENVIRONMENT", "RUN_DIR")
    assert values == {"OVERRIDES": list(nasty), "ENVIRONMENT": ["A=one two"], "RUN_DIR": ["/a b/c'd/e/f"]}
    assert '#SBATCH --output="/a b/c\'d/e/f/job/exp.log"' in text
    with pytest.raises(ValueError, match="must have no quotes or line breaks"):
        script("cluster=cpu", run_dir='/a"b/c/d')


def test_rest_of_the_script_is_the_template(tmp_path: Path) -> None:
    """What was submitted reads like the template, explanations included, and is rendered from itself again."""
    template, text = TEMPLATE.read_text(), script("cluster=cpu", "cluster.max_requeues=0")
    assert "--no-requeue" in components(text)[0]
    ending = template[template.index("# <<< settings") :]
    assert text.endswith(ending)
    explained = [line for line in template.splitlines() if line.startswith("# ")]
    heading = [line for line in explained if line not in text.splitlines()]
    assert all("the servers" in line or "the trainer" in line for line in heading), heading
    assert render(text, job("cluster=cpu", "cluster.max_requeues=0")) == text
    with pytest.raises(ValueError, match="must have a block between '# >>> settings'"):
        render(template.replace("# >>> settings", ""), job("cluster=cpu"))
    with pytest.raises(ValueError, match="settings must assign MAX_REQUEUES, got none"):
        render(template.replace("MAX_REQUEUES=3\n", ""), job("cluster=cpu"))


def test_a_resumed_run_may_change_what_every_attempt_sets_anew() -> None:
    body = TEMPLATE.read_text().partition("# <<< settings")[2]
    given = set(re.findall(r"[\"(\s]((?:rollout|checkpoint)\.[a-z_.]+)=", body)) | {"rollout.min_servers"}
    assert given >= {"rollout.discovery", "rollout.api_key_file", "rollout.server.host", "checkpoint.resume"}
    kept = {name for name in given if not any(f"{name}.".startswith(f"{free}.") for free in FREE)}
    assert kept == set()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", "--severity=warning", str(TEMPLATE)], check=True)


def test_both_scripts_parse(tmp_path: Path) -> None:
    (tmp_path / "job.sbatch").write_text(script("cluster=h100"))
    for path in (TEMPLATE, tmp_path / "job.sbatch"):
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.fixture(scope="module")
def submit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm_submit", ROOT / "slurm" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dry_run_prints_the_script_and_makes_nothing(
    submit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["experiment=quickstart", "cluster=cpu", "parallel.tp=2", "run_name=mine", "--dry-run", "train.steps=3"]
    assert submit.main(command) == 0
    out, err = capsys.readouterr()
    values = settings_in_bash(out, "OVERRIDES", "RUN_DIR", "RANKS_PER_NODE", "SOURCE_DIR")
    assert values["OVERRIDES"] == ["experiment=quickstart", "parallel.tp=2", "train.steps=3", "rollout.min_servers=1"]
    assert values["RUN_DIR"] == [str(tmp_path / "outputs" / "quickstart" / "mine")]
    assert values["SOURCE_DIR"] == [str(ROOT)]
    assert "warning: checkpoint.every is 0" in err
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_experiment_that_give_way_are_told(
    submit: ModuleType,
    tiny_qwen3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [f"model.path={tiny_qwen3}", "warm_start.enabled=false"]
    assert submit.main(["experiment=quickstart", "cluster=cpu", *own, "--dry-run"]) == 0
    _, err = capsys.readouterr()
    assert "warning: model.path takes the place of the experiment's model.scratch" in err
    assert "warning: warm_start.check_every has no effect" in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["experiment=quickstart"], "cluster=NAME"),
        (["cluster=cpu"], "experiment=NAME"),
        (["experiment=quickstart", "cluster=cpu", "parallel.tp=4"], "parallel.tp"),
        (["experiment=quickstart", "cluster=cpu", "train.stepss=4"], "train.stepss"),
        (["experiment=smollm2_135m", "cluster=cpu", "model.path=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_told_before_slurm_is_asked(
    submit: ModuleType, command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*command, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize(
    ("known", "state", "left", "code"),
    [
        (False, None, None, None),
        (True, "RUNNING", None, 7),
        (True, "PENDING", None, 7),
        (True, "COMPLETED", None, 0),
        (True, "FAILED", None, None),
        (True, "forgotten", "0", 0),
        (True, "forgotten", "75", None),
        (True, "forgotten", None, None),
    ],
)
def test_a_job_of_the_run_is_taken_up(
    known: bool,
    state: str | None,
    left: str | None,
    code: int | None,
    submit: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One under way is followed to its own end (7 here), one that has done the run is 0; any other has a successor."""

    def job_state(job_id: int) -> JobState:
        assert job_id == 12
        if state == "forgotten":
            raise UnknownJobError("Invalid job id")
        assert state is not None
        return JobState(state=state, reason="", nodes="", restarts=0, exit_code=int(state == "FAILED"))

    monkeypatch.setattr(submit.slurm, "job_state", job_state)
    monkeypatch.setattr(submit.slurm, "follow", lambda job_id, **kwargs: 7)
    folder = tmp_path / "job"
    folder.mkdir()
    if known:
        (folder / "job_id").write_text("12\n")
    if left is not None:
        (folder / "exit_code").write_text(f"{left}\n")
    assert submit.take_up(SimpleNamespace(run_dir=tmp_path, log=folder / "log")) == code


def test_the_log_is_passed_on_line_by_line(tmp_path: Path) -> None:
    log, said = tmp_path / "log", []
    log.write_text("of an earlier job\n")
    tail = LogTail(log)
    for text, lines in (("", []), ("one\ntw", ["one"]), ("o\nthree\n", ["two", "three"])):
        with log.open("a") as file:
            file.write(text)
        said.clear()
        tail.pass_on(said.append)
        assert said == lines
    LogTail(tmp_path / "not yet").pass_on(json.dumps)
