"""Prints the plan of weight transfer from a trainer layout to an engine layout.

    python tools/reshard_plan.py configs/models/qwen3-235b-a22b.json \\
        --trainer tp=4,pp=4,dp=2,ep=8 --engine tp=8,replicas=4 --gpus-per-node 8 --json plan.json

MODEL_CONFIG is a model folder, a config.json, or the name of a file in configs/models.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_rlvr.sync.plan import build_plan
from megatron_rlvr.sync.plan_report import LinkRates, as_json, count_cost, describe
from megatron_rlvr.weights.engine_slices import EngineLayout
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping

SHIPPED = Path(__file__).parents[1] / "configs" / "models"
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_config", metavar="MODEL_CONFIG")
    parser.add_argument("--trainer", required=True, help="tp, pp, vpp, dp, ep, etp: e.g. tp=4,pp=4,dp=2,ep=8")
    parser.add_argument("--engine", required=True, help="tp, ep, replicas: e.g. tp=8,replicas=4")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--dtype", choices=sorted(BYTES), default="bf16")
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--intra-gb-per-s", type=float, default=LinkRates().intra_gb_per_s)
    parser.add_argument("--inter-gb-per-s", type=float, default=LinkRates().inter_gb_per_s)
    parser.add_argument("--latency-us", type=float, default=LinkRates().latency_s * 1e6)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole plan: buckets, chains, slices")
    options = parser.parse_args(arguments)
    try:
        print_plan(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def print_plan(options: argparse.Namespace) -> None:
    """Plans, prints and, where asked, writes the plan."""
    trainer = parse_sizes(options.trainer, "--trainer", ("tp", "pp", "vpp", "dp", "ep", "etp"))
    engine = parse_sizes(options.engine, "--engine", ("tp", "ep", "replicas"))
    rates = LinkRates(
        intra_gb_per_s=options.intra_gb_per_s,
        inter_gb_per_s=options.inter_gb_per_s,
        latency_s=options.latency_us * 1e-6,
    )
    rates.check()
    shipped = SHIPPED / f"{options.model_config}.json"
    shape = ModelShape.from_hf(shipped if shipped.is_file() else options.model_config)
    dp = trainer.pop("dp", 1)
    plan = build_plan(
        Mapping(shape, layout=Layout(**trainer), naming="local"),
        dp=dp,
        engine=EngineLayout(**engine),
        bytes_per_element=BYTES[options.dtype],
        bucket_bytes=options.bucket_mib << 20,
        gpus_per_node=options.gpus_per_node,
    )
    cost = count_cost(plan)
    print(describe(plan, cost, rates))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(plan, cost, rates)), encoding="utf-8")
        print(f"written to {options.json}")


def parse_sizes(text: str, option: str, allowed: tuple[str, ...]) -> dict[str, int]:
    """Reads ``tp=4,pp=2``.

    Raises:
        ValueError: naming the option and the entry at fault.
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, _, value = entry.partition("=")
        if name not in allowed or not value.isdecimal() or name in sizes:
            names = ", ".join(allowed)
            raise ValueError(f"{option} must be like {allowed[0]}=4,{allowed[1]}=2 (of {names}), got {entry!r}")
        sizes[name] = int(value)
    return sizes


if __name__ == "__main__":
    sys.exit(main())
