"""Slurm's commands: submitting a script, the state of a job, following it to its end."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND_TIMEOUT_S = 60.0
POLL_S = 1.0
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
)
SETTLED_POLLS = 3
"""A job that is about to be requeued shows an end for a moment."""


class SlurmError(RuntimeError):
    """A command of Slurm is missing, failed or took too long; the message has its own words."""


class UnknownJobError(SlurmError):
    """Slurm does not know the job, or has forgotten it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """What Slurm says about a job, for a heterogeneous one about its first component."""

    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
    reason: str
    nodes: str
    """Node list in Slurm's short form; empty while it waits."""
    restarts: int
    exit_code: int
    """As a shell would give it: 128 + signal for a death by signal."""


def submit(script: Path) -> int:
    """Hands a script to sbatch; the job's number.

    Raises:
        SlurmError: sbatch refused.
    """
    answer = _command(["sbatch", "--parsable", str(script)])
    return int(answer.strip().partition(";")[0])


def answers() -> bool:
    """Whether there is a Slurm here that can be asked."""
    try:
        return "is UP" in _command(["scontrol", "ping"])
    except SlurmError:
        return False


def check_script(script: Path) -> None:
    """Asks Slurm whether it would take the script: partition, account, limits, node counts. Submits nothing.

    Raises:
        SlurmError: it would not.
    """
    _command(["sbatch", "--test-only", str(script)])


def job_state(job_id: int) -> JobState:
    """What Slurm says about a job now.

    Raises:
        UnknownJobError: it knows no such job.
        SlurmError: it does not answer.
    """
    lines = _command(["scontrol", "show", "job", str(job_id), "--oneliner"]).splitlines()
    fields = dict(re.findall(r"(\w+)=(\S*)", lines[0]))
    code, _, signal = fields["ExitCode"].partition(":")
    return JobState(
        state=fields["JobState"],
        reason="" if fields["Reason"] == "None" else fields["Reason"],
        nodes=" + ".join(nodes for line in lines if (nodes := _node_list(line))),
        restarts=int(fields["Restarts"]),
        exit_code=int(code) or (128 + int(signal) if int(signal) else 0),
    )


def follow(job_id: int, *, log: Path, exit_code_file: Path, say: Callable[[str], None]) -> int:
    """Passes on a job's changes of state and the lines of its log until it has ended for good.

    Args:
        job_id: the job.
        log: its output, appended to by every attempt.
        exit_code_file: where the script leaves the result; read when Slurm has forgotten the job.
        say: called with every line.

    Returns:
        The job's exit code: 0 when the training is done.

    Raises:
        SlurmError: Slurm does not answer any more.
    """
    tail, shown, settled = LogTail(log), "", 0
    while True:
        try:
            job = job_state(job_id)
        except UnknownJobError:
            tail.pass_on(say)
            return _left_code(exit_code_file, job_id)
        line = f"job {job_id}: {job.state}"
        line += f" on {job.nodes}" if job.state == "RUNNING" else f" ({job.reason})" if job.reason else ""
        line += f", requeued {job.restarts} times" if job.restarts else ""
        tail.pass_on(say)
        if line != shown:
            shown = line
            say(line)
        settled = settled + 1 if job.state in ENDED else 0
        if settled >= SETTLED_POLLS:
            tail.pass_on(say)
            return job.exit_code or (0 if job.state == "COMPLETED" else 1)
        time.sleep(POLL_S)


class LogTail:
    """Whole lines that a growing file gained since the last look.

    Args:
        path: the file, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def pass_on(self, say: Callable[[str], None]) -> None:
        """Calls `say` with every new line."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            say(line.decode(errors="replace"))


def _node_list(line: str) -> str:
    match = re.search(r" NodeList=(\S+)", line)
    return match[1] if match is not None and match[1] != "(null)" else ""


def _left_code(path: Path, job_id: int) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        raise UnknownJobError(f"Slurm knows job {job_id} no more, and it left no result in {path}") from None


def _command(argv: Sequence[str]) -> str:
    if shutil.which(argv[0]) is None:
        raise SlurmError(f"{argv[0]} is not on the path: submit from a node of the cluster, or see the script with "
                         f"--dry-run")  # fmt: skip
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{argv[0]} did not answer within {COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode:
        text = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        kind = UnknownJobError if "Invalid job id" in text else SlurmError
        raise kind(f"{argv[0]}: {text}")
    return done.stdout
