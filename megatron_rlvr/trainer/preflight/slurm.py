"""Whether Slurm would take a job: asks ``scontrol``, submits nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from megatron_rlvr.trainer.preflight.report import Row, Status

SUBJECT = "Slurm limits"
ASK_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmRequest:
    """What a job asks for."""

    nodes: int
    """All components together."""
    time_limit: str
    """As sbatch takes it, e.g. ``30``, ``24:00:00`` or ``2-00:00:00``."""
    partition: str | None = None
    """None: the default one."""
    gpus_per_node: int = 0


def check_slurm(request: SlurmRequest) -> list[Row]:
    """One row for each limit that is not kept, or one that says all are."""
    if shutil.which("scontrol") is None:
        return [_row(Status.skipped, "scontrol is not installed here: limits of the cluster are not known")]
    try:
        answer = subprocess.run(
            ["scontrol", "--oneliner", "show", "partition"],
            capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=True,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError) as error:
        return [_row(Status.error, f"scontrol does not answer: {_complaint(error)}")]
    return check_partition(request, parse_partitions(answer.stdout))


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """``scontrol --oneliner show partition`` as fields by partition."""
    partitions = {}
    for line in text.splitlines():
        fields = dict(re.findall(r"(\S+?)=(\S*)", line))
        if "PartitionName" in fields:
            partitions[fields["PartitionName"]] = fields
    return partitions


def check_partition(request: SlurmRequest, partitions: dict[str, dict[str, str]]) -> list[Row]:
    """The request against the limits of its partition."""
    name = request.partition or next((n for n, f in partitions.items() if f.get("Default") == "YES"), None)
    if name is None or name not in partitions:
        given = f"partition {name!r} does not exist" if name else "the cluster has no default partition"
        return [_row(Status.error, f"{given}; there are {', '.join(partitions) or 'none'}", "cluster.partition")]
    limits = partitions[name]
    wanted_s, longest_s = parse_time(request.time_limit), parse_time(limits["MaxTime"])
    rows = []
    if limits["State"] != "UP":
        rows.append(_row(Status.error, f"partition {name} is {limits['State']}", "cluster.partition"))
    if wanted_s > longest_s:
        finding = f"partition {name} allows {limits['MaxTime']}, {request.time_limit} is asked for"
        rows.append(_row(Status.error, finding, "cluster.time_limit"))
    bounds = {key: int(limits[key]) for key in ("MaxNodes", "TotalNodes") if limits.get(key, "").isdigit()}
    if bounds and request.nodes > min(bounds.values()):
        finding = f"partition {name} gives {min(bounds.values())} nodes to a job, {request.nodes} are asked for"
        rows.append(_row(Status.error, finding, "cluster.trainer_nodes, cluster.server_nodes"))
    gpus = re.search(r"gres/gpu=(\d+)", limits.get("TRES", ""))
    if gpus and request.gpus_per_node * request.nodes > int(gpus[1]):
        finding = f"partition {name} has {gpus[1]} GPUs, {request.nodes} x {request.gpus_per_node} are asked for"
        rows.append(_row(Status.error, finding, "cluster.gpus_per_node"))
    if not rows:
        kept = f"{request.nodes} nodes for {request.time_limit} in partition {name} (at most {limits['MaxTime']})"
        rows.append(_row(Status.ok, kept))
    return rows


def parse_time(text: str) -> float:
    """Seconds of a Slurm time: minutes, [days-]hours:minutes[:seconds], minutes:seconds, or UNLIMITED.

    Raises:
        ValueError: it is none of these.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not (1 <= len(parts) <= 3 and all(part.isdigit() for part in parts) and (not dash or days.isdigit())):
        raise ValueError(f"a time must look like 30, 24:00:00 or 2-00:00:00, got {text!r}")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(numbers) == 1:
        return numbers[0] * 60
    hours, minutes, seconds = [0, *numbers][-3:]
    return hours * 3600 + minutes * 60 + seconds


def _complaint(error: Exception) -> str:
    told = getattr(error, "stderr", None)
    return " ".join(str(told or error).split())


def _row(status: Status, finding: str, advice: str = "") -> Row:
    return Row(subject=SUBJECT, status=status, finding=finding, advice=advice and f"change {advice}")
