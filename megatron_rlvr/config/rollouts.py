"""Servers, generation and weight transfer."""

from dataclasses import dataclass, field
from enum import Enum

from megatron_rlvr.config.policy import DType


class PauseMode(Enum):
    """What becomes of requests that run when a sync begins."""

    finish = "finish"
    """They end by themselves, at most `sync.timeout_s`; what has begun meanwhile is sent back to the queue."""
    in_place = "in_place"
    """They are held and go on afterwards, with the KV cache of the weights before."""
    retract = "retract"
    """They go back to the queue and are prefilled anew under the new weights."""
    abort = "abort"
    """They end where they are; the client asks again."""


class Transport(Enum):
    """How weights come to the servers."""

    broadcast = "broadcast"
    """Whole tensors, gathered by each pipeline stage, to all ranks of any SGLang server."""
    shards = "shards"
    """To each server rank the slices that it holds, point to point, through a loader in the server."""
    colocated = "colocated"
    """The same slices through the memory of the device that trainer and server rank share."""
    disk = "disk"
    """A Hugging Face folder that the servers can read."""


class GroupFilter(Enum):
    """Dynamic sampling: which groups enter the batch."""

    none = "none"
    mixed = "mixed"


class RolloutSource(Enum):
    """Where rollouts come from: servers, or files that an earlier run has recorded."""

    live = "live"
    replay = "replay"


class Verify(Enum):
    """What every sync compares before servers serve the new weights."""

    off = "off"
    """Nothing: only what goes by `shards` or `colocated` carries checksums of its own. What a broadcast or a folder
    brings is served unseen."""
    sample = "sample"
    """What every bucket of a broadcast brought and all that servers read from a folder; then, against what the trainer
    exports anew, an eighth of the parameters, another one each time, and one server's log-probs of a probe prompt."""
    full = "full"
    """The same with all parameters, and all servers' log-probs."""


@dataclass(kw_only=True, slots=True)
class ServerConfig:
    """Local SGLang servers, started when `rollout.urls` is empty."""

    num_servers: int = 1
    tp: int = 1
    dp: int = 1
    """Data-parallel replicas of each server. Each is an SGLang process with a URL of its own: SGLang refuses weight
    updates over a process group when its own dp_size is above 1."""
    dtype: DType | None = None
    """Defaults to model.dtype."""
    host: str = "127.0.0.1"
    """Where servers listen. On an address that other machines reach they want a key (`rollout.api_key_file`)."""
    mem_fraction: float = 0.8
    max_total_tokens: int | None = None
    """KV cache slots. Null: what fits on a GPU, 16384 on a CPU."""
    max_running_requests: int | None = None
    """Null: SGLang's choice on a GPU, 64 on a CPU."""
    base_gpu_id: int = 0
    """First GPU of the local servers; engine i takes `tp` GPUs from base_gpu_id + i * tp."""
    startup_timeout_s: float = 600.0
    max_restarts: int = 3
    deterministic: bool = False
    """Sampling by each request's seed and kernels that do not depend on the batch, at some cost in speed: the same seed
    gives the same rollouts on GPUs too. On a CPU rollouts follow their seeds anyway."""
    router: bool = False
    """Put sglang-router before the servers."""
    extra_args: list[str] = field(default_factory=list)
    """Passed to sglang.launch_server as they are."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    source: RolloutSource = RolloutSource.live
    record: bool = False
    """Write every batch and evaluation to ``rollouts`` in the run's folder."""
    replay_from: str | None = None
    """The folder ``rollouts`` of a run that recorded, for source replay."""
    urls: list[str] = field(default_factory=list)
    """Running servers; empty: the trainer starts `server.num_servers` of its own."""
    router_url: str | None = None
    """Router before `urls`; generation goes through it, control calls go to the servers."""
    discovery: str | None = None
    """Folder in which `megatron_rlvr.serve` registers its servers and in which a trainer finds them; it must be shared
    by all nodes. A trainer that is given one starts no servers of its own."""
    min_servers: int = 1
    """With `discovery`: registered servers to wait for at the start, at most `server.startup_timeout_s`."""
    api_key_file: str | None = None
    """File with the key (one line, readable by its owner alone) that servers want and the run's processes send. Needed
    where `server.host` is not loopback; with `urls`, the key of those servers."""
    server: ServerConfig = field(default_factory=ServerConfig)
    prompts_per_step: int = 16
    group_size: int = 16
    """G, responses per prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_response_tokens: int = 1024
    stop: list[str] = field(default_factory=list)
    group_filter: GroupFilter = GroupFilter.none
    max_gen_batches: int = 10
    """Bound on refills of dynamic sampling."""
    concurrency: int = 256
    """Requests in flight over all servers."""
    request_timeout_s: float = 600.0
    """Of one attempt at a response, from sending to the last byte."""
    silence_timeout_s: float = 120.0
    """A server that has requests and says nothing for so long, not even that it is healthy, loses them to others."""
    recovery_timeout_s: float = 600.0
    """For how long rollouts wait, while no server is healthy, for one to come back; then the run stops."""
    max_retries: int = 3
    """Further attempts at a response after a failed one, and after an aborted one."""


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    transport: Transport = Transport.broadcast
    release_memory: bool = False
    """Colocated servers give the memory of weights and cache back while the policy trains."""
    bucket_mb: int = 256
    pause_mode: PauseMode = PauseMode.retract
    verify: Verify = Verify.full
    timeout_s: float = 300.0
    """Bound of every rendezvous and of every bucket's way; a server that is later is out of routing."""
    control_timeout_s: float = 60.0
    """The same for calls that move no weights (pause, resume, version, flush)."""
    host: str | None = None
    """Address under which servers reach the trainer; null: the address of this machine that faces them."""
