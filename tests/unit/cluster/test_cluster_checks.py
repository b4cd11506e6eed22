"""What no job could be made of is refused by name, before Slurm is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlvr.cluster.checks import check_cluster, time_limit_s, world_size
from megatron_rlvr.config.compose import config_dir, load_cluster, load_config


def check(*overrides: str) -> list[str]:
    of_cluster = [each for each in overrides if each.lstrip("+").startswith("cluster")]
    of_run = [each for each in overrides if each not in of_cluster]
    return check_cluster(load_cluster(of_cluster), load_config(["experiment=quickstart", *of_run]))


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_dir() / "cluster").glob("*.yaml")))
def test_clusters_that_ship_compose(name: str) -> None:
    cluster = load_cluster([f"cluster={name}"])
    run = load_config(["experiment=qwen3_8b_base_qae", "checkpoint.every=10"])
    assert check_cluster(cluster, run) == []
    assert world_size(cluster) == {"cpu": 2, "h100": 16, "h200": 4}[name]


def test_a_cluster_of_ones_own_is_a_file(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("defaults: [cpu]\npartition: night\ntrainer_nodes: 4\n")
    cluster = load_cluster([f"cluster={own}", "cluster.trainer_nodes=3", "+cluster.environment.A=1"])
    assert (cluster.partition, cluster.trainer_nodes, cluster.ranks_per_node) == ("night", 3, 2)
    assert cluster.environment == {"A": "1"}
    own.write_text("partition: [")
    with pytest.raises(ValueError, match=r"cluster must be a name or a YAML file, got .*mine.yaml"):
        load_cluster([f"cluster={own}"])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 120), ("1:00:01", 3660), ("2-12", 216000), ("1-00:30", 88200), ("0-0:0:30", 60)],
)
def test_time_limits_round_up_to_a_minute(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], r"cluster.time_limit .*cluster=NAME"),
        (["cluster=nowhere"], r"cluster/nowhere"),
        (["cluster=cpu", "cluster.nodes=2"], r"cluster.nodes"),
        (["cluster=cpu", "cluster.trainer_nodes=two"], r"two"),
        (["cluster=cpu", "cluster.trainer_nodes=0"], r"cluster.trainer_nodes must be at least 1, got 0"),
        (["cluster=cpu", "cluster.time_limit=soon"], r"cluster.time_limit must be minutes, .* got 'soon'"),
        (["cluster=cpu", "cluster.time_limit=0"], r"cluster.time_limit must be .* got '0'"),
        (["cluster=cpu", "cluster.time_limit=1"], r"cluster.stop_before_limit_s must be less than .*60 s.* got 60"),
        (["cluster=cpu", "cluster.max_requeues=-1"], r"cluster.max_requeues must be at least 0, got -1"),
        (["cluster=cpu", "cluster.server_nodes=0"], r"cluster.server_nodes must be at least 1, or .* got none"),
        (["cluster=cpu", "cluster.colocated=true"], r"cluster.server_nodes must be 0 with cluster.colocated.* got 1"),
        (["cluster=cpu", "rollout.urls=[http://a:1]"], r"cluster.server_nodes must be 0 .* rollout.urls .* got 1"),
        (["cluster=cpu", "cluster.gres=h100"], r"cluster.gres has no effect without GPUs .* got 'h100'"),
        (["cluster=cpu", "cluster.container_mounts=['/a:/b']"], r"container_mounts has no effect without .*/a:/b"),
        (["cluster=h100", "cluster.container_mounts=[/a]"], r"cluster.container_mounts must be from:to.*'/a'"),
        (["cluster=h100", "cluster.modules=[gcc]"], r"cluster.modules must be empty in a container.*gcc"),
        (["cluster=h100", "cluster.ranks_per_node=4"], r"ranks_per_node must be one for each GPU .*=8.* got 4"),
        (["cluster=h200", "cluster.server_memory=8G"], r"cluster.server_memory has no effect .* got '8G'"),
        (
            ["cluster=h200", "rollout.server.num_servers=3", "rollout.server.tp=2"],
            r"at most the 4 GPUs .* got 3 \* 1 \* 2",
        ),
        (["cluster=cpu", "sync.transport=colocated"], r"cluster.colocated must be true .* got false and None"),
        (["cluster=h200", "sync.transport=colocated"], r"server_gpus_per_node null with .* got true and 4"),
        (["cluster=cpu", "cluster.partition='two words'"], r"cluster.partition must be a word .* got 'two words'"),
        (["cluster=cpu", "cluster.sbatch_options=['-N3']"], r"sbatch_options must not hold -N: .*trainer_nodes"),
        (["cluster=cpu", "cluster.sbatch_options=['--time=9']"], r"sbatch_options must not hold --time"),
        (["cluster=cpu", "cluster.sbatch_options=[nvlink]"], r"sbatch_options must be options such as .*'nvlink'"),
        (["cluster=cpu", "+cluster.environment={A-B: x}"], r"cluster.environment must map names .* got 'A-B'"),
        (["cluster=cpu", "rollout.discovery=/x"], r"rollout.discovery must be null: .* got '/x'"),
        (["cluster=cpu", "checkpoint.resume=never"], r"checkpoint.resume must be auto .* got never"),
    ],
)
def test_what_no_job_could_be_made_of_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(*overrides)


def test_no_checkpoints_are_worth_a_warning() -> None:
    assert check("cluster=cpu", "checkpoint.every=5") == []
    [warning] = check("cluster=cpu")
    assert warning.startswith("checkpoint.every is 0")
    assert check("cluster=cpu", "cluster.max_requeues=0") == []
