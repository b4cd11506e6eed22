"""Times weight transfer from Megatron ranks into a real SGLang server, way against way, in one run.

    python tools/bench/sync.py [--repeats 5] [--dtype fp32] [--json FILE]

Two rounds: a model of 135M parameters from a trainer in TP2 x PP2 into a server of two ranks by broadcast, one bucket
after the other, pipelined, and pipelined with a checksum of every bucket asked of the server, and shard to shard (which
carries checksums of its own); then SmolLM2-135M's own shape (whose nine heads no two ranks share)
from one trainer rank into one server rank. Weights are random, their values cost the same. Every way takes turns with
the others, so that a busy machine is as bad for all; a sync is pause, transfer, version and resume. Bytes are counted
by the senders (a broadcast arrives at every server rank) and by the loaders inside the servers. What pipelining can
save is at most the time that buckets take to gather: it is measured, as is the time in which they are under way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
BUCKET_MB = 32
SMOLLM2 = ROOT / "configs" / "models" / "smollm2-135m.json"
TWO_RANK_SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="syncs of every way")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        trainer_rank(json.loads(arguments.rank_of))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ways = ["broadcast, one after the other", "broadcast, pipelined", "broadcast, pipelined, checked", "shards"]
        rows += measure(Path(folder) / "two", TWO_RANK_SHAPE, arguments, trainer={"tp": 2, "pp": 2}, tp=2, ways=ways)
        smollm2 = json.loads(SMOLLM2.read_text())
        ways = ["broadcast, pipelined", "shards"]
        rows += measure(Path(folder) / "one", smollm2, arguments, trainer={}, tp=1, ways=ways)
    copy_gb_per_s = copy_bandwidth()
    for row in rows:
        # The least that memory must do: read every byte of the model once and write it once.
        row["share_of_memory_bandwidth"] = 2 * row["model_bytes"] / row["seconds"] / 1e9 / copy_gb_per_s
    report = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()}-core CPU",
        "load_average": os.getloadavg(),
        "dtype": arguments.dtype,
        "bucket_mb": BUCKET_MB,
        "copy_gb_per_s": copy_gb_per_s,
        "rows": rows,
    }
    show(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(
    folder: Path,
    shape: dict[str, Any],
    arguments: argparse.Namespace,
    *,
    trainer: dict[str, int],
    tp: int,
    ways: list[str],
) -> list[dict[str, Any]]:
    """Rows of one model and layout."""
    from megatron_rlvr.config.schema import DType, RolloutConfig, ServerConfig
    from megatron_rlvr.rollout.server import LocalServers

    model = write_model(folder / "model", shape)
    num_ranks = trainer.get("tp", 1) * trainer.get("pp", 1)
    settings = ServerConfig(tp=tp, max_total_tokens=2048, max_running_requests=4, mem_fraction=0.3)
    servers = LocalServers(
        RolloutConfig(server=settings), model_path=model, dtype=DType[arguments.dtype], run_dir=folder / "servers"
    )
    try:
        [info] = servers.wait_ready(lambda line: print(line, file=sys.stderr))
        out = folder / "out.json"
        job = {"model": str(model), "url": info.url, "parallel": trainer, "ways": ways, "out": str(out)}
        job |= {"repeats": arguments.repeats, "dtype": arguments.dtype}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        subprocess.run(
            [*torchrun, __file__, "--rank-of", json.dumps(job)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=1500,
        )
    finally:
        servers.stop()
    layout = " x ".join(f"{name.upper()}{size}" for name, size in trainer.items()) or "one rank"
    return [{"trainer": layout, "server_tp": tp, **row} for row in json.loads(out.read_text())]


def trainer_rank(job: dict[str, Any]) -> None:
    """One rank of the trainer: all ways in turn, as often as wanted."""
    from megatron_rlvr.config.schema import DType, ModelConfig, OptimConfig, ParallelConfig
    from megatron_rlvr.policy.parallel import ParallelContext
    from megatron_rlvr.policy.policy import Policy
    from megatron_rlvr.rollout.engine import HttpEngine, probe
    from megatron_rlvr.weights.hf_config import ModelShape

    with ParallelContext(ParallelConfig(**job["parallel"]), seed=0, timeout_s=600) as parallel:
        dtype = DType[job["dtype"]]
        policy = Policy(
            job["model"],
            ModelShape.from_hf(job["model"]),
            model_config=ModelConfig(path=job["model"], dtype=dtype),
            parallel=parallel,
            optim=OptimConfig(),
            trainable=False,
        )
        info = probe(job["url"], timeout_s=60.0)
        leads = parallel.ranks.is_main
        engine = HttpEngine(info.url, num_ranks=info.num_ranks, timeout_s=300.0)
        if leads:
            engine.freeze_gc()  # as every run does once; else a CPU server collects garbage for a second twice a sync
        transports = {way: transport_of(way, engine, info, policy, parallel) for way in job["ways"]}
        seconds: dict[str, list[float]] = {way: [] for way in job["ways"]}
        sent: dict[str, int] = {}
        received: dict[str, list[int]] = {}
        shares: dict[str, list[tuple[float, float]]] = {way: [] for way in job["ways"]}
        for repeat in range(job["repeats"] + 1):
            for way, transport in transports.items():
                parallel.barrier()
                started = time.perf_counter()
                done = one_sync(transport, policy, parallel, engine if leads else None, repeat)
                if repeat:  # the first one makes groups, plans and touches memory
                    seconds[way].append(time.perf_counter() - started)
                    shares[way].append((done.fill_s, done.under_way_s))
                sent[way], received[way] = done.num_bytes, (done.received_bytes or {}).get(info.url, [])
        model_bytes = policy.num_parameters() * (2 if job["dtype"] == "bf16" else 4)
        rows = []
        for way, transport in transports.items():
            all_sent = sum(parallel.gather_objects(sent[way]))
            by_rank = received[way] or [all_sent] * info.num_ranks
            # Stages take turns, so their sources' times add up; other ranks gather for them and send nothing.
            sources = [each for each in parallel.gather_objects(shares[way]) if each and each[0][1]]
            fill, under_way = ([sum(pair[i] for pair in sync) for sync in zip(*sources, strict=True)] for i in (0, 1))
            rows.append(
                {
                    "way": way,
                    "seconds": statistics.median(seconds[way]),
                    "fastest": min(seconds[way]),
                    "all_seconds": seconds[way],
                    "gather_seconds": statistics.median(fill) if fill else None,
                    "under_way_seconds": statistics.median(under_way) if under_way else None,
                    "model_bytes": model_bytes,
                    "received_bytes": sum(by_rank),
                    "received_by_rank": by_rank,
                }
            )
            transport.close()
        if leads:
            Path(job["out"]).write_text(json.dumps(rows))


def transport_of(way: str, engine: Any, info: Any, policy: Any, parallel: Any) -> Any:
    """This rank's end of a way."""
    from megatron_rlvr.config.schema import RunConfig, Transport, Verify
    from megatron_rlvr.sync.broadcast import BroadcastTransport
    from megatron_rlvr.trainer.servers.transports import make_transport

    config = RunConfig(experiment_name="bench")
    config.sync.transport = Transport[way.partition(",")[0]]
    config.sync.bucket_mb = BUCKET_MB
    config.sync.verify = Verify.full if "checked" in way else Verify.off
    transport = make_transport(config, [engine], [info], weights=policy.weights, parallel=parallel)
    if isinstance(transport, BroadcastTransport) and "one after" in way:
        transport.num_buffers = 1
    return transport


def one_sync(transport: Any, policy: Any, parallel: Any, engine: Any, version: int) -> Any:
    """One sync without the last verification; what this rank sent and the server counted, all turns together."""
    from megatron_rlvr.sync.interfaces import TransferStats

    transport.prepare(policy.weights)
    if engine is not None:
        engine.pause("retract")
        engine.begin_update()
    parallel.barrier()
    total = TransferStats()
    turn = 0
    while turn < transport.num_turns:
        stats = transport.send(turn)
        parallel.barrier()
        total.num_bytes += stats.num_bytes
        total.fill_s += stats.fill_s
        total.under_way_s += stats.under_way_s
        if stats.received_bytes is not None:
            total.received_bytes = stats.received_bytes
        turn += 1
    if engine is not None:
        engine.end_update()
        engine.set_weight_version(version)
        engine.flush_cache()
        engine.resume()
    parallel.barrier()
    return total


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model of a given shape with random weights and a tokenizer of bytes."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from megatron_rlvr.weights.hf_config import ModelShape
    from megatron_rlvr.weights.layout import Layout
    from megatron_rlvr.weights.mapping import Mapping

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = Mapping(ModelShape.from_hf(config), layout=Layout(), naming="local").hf_tensors()
    tensors = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def copy_bandwidth() -> float:
    """GB/s that a large copy reads and writes, on all cores, the best of several."""
    torch.set_num_threads(os.cpu_count() or 1)
    source = torch.ones(256 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best / 1e9


def show(report: dict[str, Any]) -> None:
    console = Console(width=180)
    table = Table(
        "trainer", "server", "way", "s (median)", "s (fastest)", "gather s", "under way s", "MB received",
        "of bandwidth", "against pipelined",
        title=f"weight sync, {report['dtype']}, {report['machine']}, load {report['load_average'][0]:.1f}",
    )  # fmt: skip
    for row in report["rows"]:
        base = next(r for r in report["rows"] if r["trainer"] == row["trainer"] and r["way"] == "broadcast, pipelined")
        table.add_row(
            row["trainer"],
            f"TP{row['server_tp']}",
            row["way"],
            f"{row['seconds']:.3f}",
            f"{row['fastest']:.3f}",
            *("" if row[name] is None else f"{row[name]:.3f}" for name in ("gather_seconds", "under_way_seconds")),
            f"{row['received_bytes'] / 1e6:.0f}",
            f"{row['share_of_memory_bandwidth']:.1%}",
            f"{row['seconds'] / base['seconds']:.2f}x time, "
            f"{row['received_bytes'] / base['received_bytes']:.2f}x bytes",
        )
    console.print(table)
    console.print(f"memory copy: {report['copy_gb_per_s']:.1f} GB/s read and written", highlight=False)


if __name__ == "__main__":
    main()
