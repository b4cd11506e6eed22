"""A real Slurm of three nodes on this machine's loopback, for as long as a test session: nothing of it survives.

Debian's packages allow several slurmd on one machine, one for each node name. Node names are loopback addresses, so
that nothing has to resolve them. Two partitions share the nodes; jobs of ``high`` preempt those of ``main``.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from megatron_rlvr.rollout.ports import free_port

T = TypeVar("T")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("127.0.1.1", "127.0.1.2", "127.0.1.3")
CPUS, MEMORY_MB, FAKE_GPUS = 8, 32000, 4
LOOPBACK = "127.0.0.1"
PATIENCE_S = 300.0
"""For anything to happen on a machine that other work keeps busy; a failing test waits so long, a passing one never."""
CONFIGURATION = """\
ClusterName=throwaway
SlurmctldHost={host}({loopback})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
# a requeued job must wait until its old credentials are void: 5 s instead of 120
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
"""


def missing_program() -> str | None:
    """One of Slurm's programs that is not installed, or None."""
    return next((name for name in PROGRAMS if _program(name) is None), None)


class ThrowawaySlurm:
    """The cluster; a context manager.

    Args:
        folder: for everything it writes; the path must be short (a socket lies in it).

    Attributes:
        environment: for commands that talk to it.
        num_gpus: pretended GPUs of each node.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> ThrowawaySlurm:
        self._configure()
        key, wire = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/munge.seed"]
        files += [f"--log-file={self.folder}/munged.log", f"--key-file={key}", f"--socket={wire}"]
        try:
            self._start("munged", ["--foreground", "--force", *files])
            wait_for(wire.exists, "munge's socket")
            self._start("slurmctld", ["-D"])
            for node in NODES:
                self.power_on(node)
            wait_for(lambda: set(self.node_states().values()) == {"IDLE"}, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if "slurmctld" in self._daemons:
            self.run(["scancel", "--user", getpass.getuser()], check=False)
            try:
                wait_for(lambda: not self.processes(), "end of all jobs", patience_s=60.0)
            except TimeoutError:
                pass  # killed below
        for daemon in reversed(list(self._daemons)):
            self._stop(daemon)
        for process in self.processes():
            process.kill()

    def run(self, argv: Sequence[str], *, check: bool = True) -> str:
        """Output of a command that talks to the cluster."""
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """State of every node in Slurm's words, without its flags."""
        lines = self.run(["sinfo", "-hN", "-p", "main", "-o", "%N %T"], check=False).splitlines()
        return {name: state.rstrip("*~#$@+-").upper() for name, state in (line.split() for line in lines)}

    def power_on(self, node: str) -> None:
        """Boots a node."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        self._start("slurmd", ["-D", "-N", node], name=node)

    def power_off(self, node: str) -> None:
        """Takes a node away as a power failure does: at once, with all that runs on it."""
        log = str(self.folder / f"slurmd.{node}.log")
        doomed: set[psutil.Process] = set()
        # all of them stand still before the first is gone: none sees another die
        while new := _family(_holding(log)) - doomed:
            doomed |= new
            _signal(new, signal.SIGSTOP)
        _signal(doomed, signal.SIGKILL)
        self._daemons.pop(node).wait()
        psutil.wait_procs(doomed, timeout=30)

    def processes(self) -> list[psutil.Process]:
        """Everything alive that a job of this cluster started, also what Slurm itself has lost sight of."""
        return [process for process in psutil.process_iter() if self._is_of_job(process)]

    def queue(self) -> list[str]:
        """Jobs that wait or run."""
        return self.run(["squeue", "-h", "-o", "%i %T %r"]).splitlines()

    def assert_nothing_left(self) -> None:
        """The queue is empty, and no process of a job is alive."""
        wait_for(lambda: not self.queue(), "empty queue")
        try:
            wait_for(lambda: not self.processes(), "end of all processes of jobs", patience_s=60.0)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {[process.cmdline() for process in self.processes()]}") from error

    def _is_of_job(self, process: psutil.Process) -> bool:
        try:
            environment = process.environ()
            return (
                environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                and "SLURM_JOB_ID" in environment
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        ports = [free_port(LOOPBACK) for _ in range(len(NODES) + 1)]
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            loopback=LOOPBACK,
            port=ports[0],
            user=getpass.getuser(),
            folder=self.folder,
        )
        self.num_gpus = FAKE_GPUS if Path(f"/dev/tty{FAKE_GPUS}").exists() else 0
        for node, port in zip(NODES, ports[1:], strict=True):
            text += f"NodeName={node} Port={port} CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{self.num_gpus}\n"
        text += "PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefMemPerCPU=1000 PriorityTier=1\n"
        text += "PartitionName=high Nodes=ALL MaxTime=60 DefMemPerCPU=1000 PriorityTier=10 PreemptMode=OFF\n"
        (self.folder / "slurm.conf").write_text(text)
        # device files that every machine has stand for GPUs: Slurm hands them out and numbers them
        gres = "".join(f"NodeName={node} Name=gpu File=/dev/tty[1-{FAKE_GPUS}]\n" for node in NODES)
        (self.folder / "gres.conf").write_text(gres if self.num_gpus else "")

    def _start(self, program: str, argv: Sequence[str], *, name: str | None = None) -> None:
        path = _program(program)
        assert path is not None
        with (self.folder / f"{name or program}.out").open("ab") as out:
            self._daemons[name or program] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", path, *argv],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def wait_for(condition: Callable[[], T], what: str, *, patience_s: float = PATIENCE_S) -> T:
    """The first true value of a condition."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {patience_s:g} s")
        time.sleep(0.1)
    return value


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _family(leaders: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Processes with all their descendants."""
    members: set[psutil.Process] = set()
    for leader in leaders:
        members.add(leader)
        with contextlib.suppress(psutil.NoSuchProcess):
            members |= set(leader.children(recursive=True))
    return members


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _holding(path: str) -> Iterator[psutil.Process]:
    """Processes that have a file open: a node's daemon and the step daemons that it has let go hold its log."""
    for process in psutil.process_iter():
        try:
            if any(os.readlink(f"/proc/{process.pid}/fd/{fd}") == path for fd in os.listdir(f"/proc/{process.pid}/fd")):
                yield process
        except (OSError, psutil.NoSuchProcess):
            continue
