"""Slurm's limits, from what ``scontrol --oneliner show partition`` prints (22.05)."""

from __future__ import annotations

import pytest

from megatron_rlvr.trainer.preflight.report import Status
from megatron_rlvr.trainer.preflight.slurm import SlurmRequest, check_partition, parse_partitions, parse_time

PARTITIONS = parse_partitions(
    "PartitionName=main AllowGroups=ALL Default=YES DefaultTime=NONE MaxNodes=UNLIMITED MaxTime=02:00:00 "
    "Nodes=127.0.1.[1-3] State=UP TotalCPUs=12 TotalNodes=3 TRES=cpu=12,mem=3000M,node=3,billing=12,gres/gpu=8\n"
    "PartitionName=long Default=NO MaxNodes=2 MaxTime=UNLIMITED State=UP TotalNodes=3 TRES=cpu=12,node=3\n"
    "PartitionName=old Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DRAIN TotalNodes=3\n"
)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (SlurmRequest(nodes=3, time_limit="120"), []),
        (SlurmRequest(nodes=2, time_limit="9-00:00:00", partition="long"), []),
        (SlurmRequest(nodes=3, time_limit="2:00:01"), ["main allows 02:00:00", "2:00:01"]),
        (SlurmRequest(nodes=4, time_limit="1"), ["3 nodes", "4 are asked"]),
        (SlurmRequest(nodes=3, time_limit="1", partition="long"), ["2 nodes", "3 are asked"]),
        (SlurmRequest(nodes=2, time_limit="1", gpus_per_node=8), ["8 GPUs", "2 x 8"]),
        (SlurmRequest(nodes=1, time_limit="1", partition="old"), ["old is DRAIN"]),
        (SlurmRequest(nodes=1, time_limit="1", partition="gpu"), ["'gpu' does not exist", "main, long, old"]),
    ],
)
def test_a_request_against_its_partition(request_: SlurmRequest, words: list[str]) -> None:
    [found] = check_partition(request_, PARTITIONS)
    assert found.status is (Status.error if words else Status.ok), found
    for word in words:
        assert word in found.finding
    assert bool(found.advice) == bool(words)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("5:30", 330),
        ("2:00:01", 7201),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:10", 172810),
        ("UNLIMITED", float("inf")),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "x-1", "-5"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        parse_time(text)
