"""One rank of a Megatron trainer that brings a real server to its weights by every transport in turn.

Run by test_sglang_transports.py with one JSON argument; rank 0 writes what the server held after each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_rlvr.config.schema import DType, ModelConfig, OptimConfig, ParallelConfig, RunConfig, Transport
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.rollout.engine import HttpEngine, probe
from megatron_rlvr.sync.coordinator import WeightSync
from megatron_rlvr.sync.pool import EnginePool
from megatron_rlvr.trainer.servers.transports import make_transport
from megatron_rlvr.trainer.servers.verifying import weight_verifier
from megatron_rlvr.types import EngineAddress
from megatron_rlvr.weights.hf_config import ModelShape
from tests.contract.conftest import PROMPT
from tests.contract.talk import forced_logprobs

BUCKET_BYTES = 1 << 17
"""Small enough for every stage to send several buckets."""


def sync(
    config: RunConfig, policy: Policy, parallel: ParallelContext, url: str, other: str, version: int
) -> dict[str, Any]:
    """The server leaves the other weights for the policy's, twice; what it then holds, on rank 0."""
    info = probe(url, timeout_s=60.0)

    def connect(address: EngineAddress) -> HttpEngine:
        return HttpEngine(address.url, num_ranks=address.num_ranks, timeout_s=60.0)

    engine = connect(info.address)
    transport = make_transport(config, [engine], [info], weights=policy.weights, parallel=parallel)
    assert transport is not None
    transport.bucket_bytes = BUCKET_BYTES  # type: ignore[attr-defined]
    leads = parallel.ranks.is_main
    pushes = WeightSync(
        gate=parallel,
        on_main=lambda call: parallel.broadcast_object(call() if leads else None),
        pool=EnginePool.of([engine]) if leads else None,
        connect=connect,
        transport=transport,
        pause_mode="retract",
        verifier=weight_verifier(config, [info], policy=policy, parallel=parallel),
    )
    result: dict[str, Any] = {"checksums": [], "sent": []}
    for again in range(2):
        if leads:
            engine.update_from_disk(other, weight_version=0)
            if config.sync.transport is Transport.colocated:
                # No memory saver on a CPU: the calls do what they do to a server's state.
                engine.release_memory(["kv_cache", "weights"])
                engine.resume_memory(["weights"])
        parallel.barrier()
        report = pushes.run(policy.weights, version=version + again)
        if leads:
            if config.sync.transport is Transport.colocated:
                engine.resume_memory(["kv_cache"])
            result["checksums"].append(engine.weights_checksum())
            result["verified"] = report.num_verified
            result["logprob_diff"] = report.logprob_diff
            result["logprobs"] = forced_logprobs(url, PROMPT).tolist()
            result["version"] = engine.weight_version()
        result["sent"].append(parallel.gather_objects(report.num_bytes))
    pushes.close()
    return result


def main(job: dict[str, Any]) -> None:
    with ParallelContext(ParallelConfig(**job["parallel"]), seed=0, timeout_s=120) as parallel:
        policy = Policy(
            job["model"],
            ModelShape.from_hf(job["model"]),
            model_config=ModelConfig(path=job["model"], dtype=DType.fp32),
            parallel=parallel,
            optim=OptimConfig(),
            trainable=False,
        )
        results = {}
        for number, name in enumerate(job["transports"]):
            config = RunConfig(experiment_name="transports")
            config.sync.transport = Transport[name]
            config.sync.timeout_s = 60.0
            config.model.dtype = DType.fp32
            results[name] = sync(config, policy, parallel, job["url"], job["other"], version=10 * number + 1)
        if parallel.ranks.is_main:
            Path(job["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
