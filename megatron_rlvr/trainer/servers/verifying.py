"""What `sync.verify` asks for, of the transfer and of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from megatron_rlvr.config.schema import DType, RunConfig, Transport, Verify
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.rollout.engine import ServerInfo
from megatron_rlvr.sync.bucket_check import BucketCheck
from megatron_rlvr.sync.verification import WeightVerifier
from megatron_rlvr.trainer.servers.probe import FP32_TOLERANCE, HALF_TOLERANCE, PromptProbe
from megatron_rlvr.weights.engine_params import EnginePlace, engine_places
from megatron_rlvr.weights.engine_slices import EngineLayout
from megatron_rlvr.weights.hf_config import ModelShape


def bucket_check(config: RunConfig, servers: Sequence[ServerInfo], shape: ModelShape) -> BucketCheck | None:
    """Checks of broadcast buckets, which stock servers do not check themselves.

    Raises:
        ValueError: as `weight_verifier`.
    """
    if config.sync.verify is Verify.off:
        return None
    return BucketCheck(places=partial(_places, shape, servers[0].ep_size), dtype=_known_dtype(config, servers))


def weight_verifier(
    config: RunConfig, servers: Sequence[ServerInfo], *, policy: Policy, parallel: ParallelContext
) -> WeightVerifier | None:
    """What `sync.verify` asks for; on every rank.

    Raises:
        ValueError: a server lays weights out in a way that is not known here; names it and its settings.
    """
    if config.sync.verify is Verify.off:
        return None
    dtype = _known_dtype(config, servers)
    exact = dtype is torch.float32 and config.model.dtype is DType.fp32
    virtual = config.parallel.vpp > 1
    probe = PromptProbe(
        policy,
        tolerance=FP32_TOLERANCE if exact else HALF_TOLERANCE,
        pad_to_multiple=config.parallel.tp if config.parallel.sequence_parallel else 1,
        multiple=config.parallel.pp if virtual else 1,
    )
    return WeightVerifier(
        places=partial(_places, policy.shape, servers[0].ep_size),
        dtype=dtype,
        sample=config.sync.verify is Verify.sample,
        gate=parallel,
        probe=probe,
        # The other transports check all that they move by themselves.
        every_parameter=config.sync.transport is Transport.disk,
    )


def _known_dtype(config: RunConfig, servers: Sequence[ServerInfo]) -> torch.dtype:
    """Of the servers' parameters, which lie as slices say."""
    for server in servers:
        if server.odd_layout:
            raise ValueError(
                f"sync.verify must be off with {server.url}, which runs with {', '.join(server.odd_layout)}: what its "
                f"parameters must look like is not known; got {config.sync.verify.value}"
            )
    told = {server.dtype for server in servers}
    if len(told) > 1:
        raise ValueError(f"sync.verify must be off with servers in several precisions, got {sorted(map(str, told))}")
    dtype: torch.dtype = getattr(torch, told.pop() or (config.rollout.server.dtype or config.model.dtype).value)
    return dtype


def _places(shape: ModelShape, ep: int, tp: int) -> list[dict[str, EnginePlace]]:
    return [engine_places(shape, EngineLayout(tp=tp, ep=ep), rank) for rank in range(tp)]
