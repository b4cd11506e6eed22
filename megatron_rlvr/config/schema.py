"""The run's configuration as dataclasses; Hydra composes them, `config.validate` checks them together.

Fields are plain types, enums (by member name) or nested classes; ``???`` marks a value that must be given.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MISSING = "???"


class DType(Enum):
    fp32 = "float32"
    bf16 = "bfloat16"


class Recompute(Enum):
    none = "none"
    selective = "selective"
    full = "full"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class PauseMode(Enum):
    in_place = "in_place"
    retract = "retract"
    abort = "abort"


class Transport(Enum):
    broadcast = "broadcast"
    disk = "disk"


class GroupFilter(Enum):
    """Dynamic sampling: which groups enter the batch."""

    none = "none"
    mixed = "mixed"


class Elision(Enum):
    """Responses with zero advantage in the update: left out where that is exact, or never."""

    auto = "auto"
    never = "never"


class Console(Enum):
    auto = "auto"
    rich = "rich"
    plain = "plain"


class Quantile(Enum):
    inf = "inf"
    linear = "linear"


class Std(Enum):
    sample = "sample"
    population = "population"
    none = "none"


class GateOn(Enum):
    correctness = "correctness"
    reward = "reward"


class QaeMask(Enum):
    """Which (regime, sign) pairs keep their advantage (spec A7)."""

    qae = "qae"
    pos_mask = "pos_mask"
    neg_mask = "neg_mask"
    none = "none"


class CovScope(Enum):
    minibatch = "minibatch"
    micro = "micro"


class CovLogp(Enum):
    old = "old"
    current = "current"


class KlKind(Enum):
    abs = "abs"
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class OpsBackend(Enum):
    native = "native"
    reference = "reference"


@dataclass(kw_only=True, slots=True)
class ScratchModelConfig:
    """A small model made in the run: Qwen3-shaped, with a tokenizer trained on the task's text."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    vocab_size: int = 512
    """Upper bound; 256 bytes, two special tokens, and pieces learnt from the task's text."""
    tie_embeddings: bool = True
    max_position_embeddings: int = 512


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str | None = None
    """Folder with config.json, tokenizer and safetensors of a supported Hugging Face family."""
    scratch: ScratchModelConfig | None = None
    """Make a small model instead of loading one; exactly one of `path` and `scratch` is given."""
    dtype: DType = DType.bf16
    recompute: Recompute = Recompute.none


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Data parallelism follows: world size / (tp * pp * cp)."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline stage."""
    ep: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    lr: float = 1e-6
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    """Optimizer steps."""
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    grad_clip: float = 1.0


@dataclass(kw_only=True, slots=True)
class ReasoningGymSpec:
    name: str = MISSING
    """Family, e.g. ``chain_sum``."""
    weight: float = 1.0
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the family's own config."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    reasoning_gym: list[ReasoningGymSpec] = field(default_factory=list)
    jsonl: list[str] = field(default_factory=list)
    """Files with ``prompt`` or ``messages``, ``answer``, optional ``data_source``."""
    seed: int = 0
    """Seed of problem generation and of the train/validation split."""
    train_size: int = 20000
    """reasoning-gym problems to draw from."""
    val_size: int = 128
    """Held-out problems; from JSONL this many rows are split off by seed."""
    system_prompt: str | None = None
    prompt_template: str | None = None
    """With ``{prompt}``; plain text around the problem, before the chat template if one is used."""
    chat_template: bool = False
    """Apply the tokenizer's chat template."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""


@dataclass(kw_only=True, slots=True)
class OverlongConfig:
    """Soft overlong punishment of DAPO: min(-(len - (max_length - buffer)) / buffer * factor, 0)."""

    enabled: bool = False
    max_length: int = 20480
    buffer: int = 4096
    factor: float = 1.0


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    verifier: str = "auto"
    """``auto``: reasoning-gym's own scoring for its families, ``math`` for JSONL rows. Or ``math``,
    ``exact``, or a path ``pkg.mod:obj`` of a callable (response_text, prompt) -> float."""
    threshold: float = 0.999
    """A reward at or above it counts as correct."""
    binary: bool = True
    """Use the correctness (0 or 1) as the reward instead of the raw score."""
    num_workers: int = 2
    timeout_s: float = 10.0
    """Hard wall-clock limit of one verification."""
    memory_limit_mb: int = 2048
    """Address space one verification may take, beyond what the loaded verifier has; MiB."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)


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
    mem_fraction: float = 0.8
    max_total_tokens: int | None = None
    """KV cache slots. Null: what fits on a GPU, 16384 on a CPU."""
    max_running_requests: int | None = None
    """Null: SGLang's choice on a GPU, 64 on a CPU."""
    base_gpu_id: int = 0
    """First GPU of the local servers; engine i takes `tp` GPUs from base_gpu_id + i * tp."""
    startup_timeout_s: float = 600.0
    max_restarts: int = 3
    router: bool = False
    """Put sglang-router before the servers."""
    extra_args: list[str] = field(default_factory=list)
    """Passed to sglang.launch_server as they are."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    urls: list[str] = field(default_factory=list)
    """Running servers; empty: the trainer starts `server.num_servers` of its own."""
    router_url: str | None = None
    """Router before `urls`; generation goes through it, control calls go to the servers."""
    discovery: str | None = None
    """Folder in which `megatron_rlvr.serve` writes where its servers are (servers.json)."""
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
    max_retries: int = 3


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    estimator: str = "qae"
    """qae, grpo, dr_grpo, rloo, reinforce_pp, or a path ``pkg.mod:obj``."""
    K: str = "0.4"
    """Quantile level of QAE in (0, 1), a decimal or ``p/q``."""
    quantile: Quantile = Quantile.inf
    std: Std = Std.sample
    eps: float = 1e-6
    gate_on: GateOn = GateOn.correctness
    penalty_additive: bool = True
    mask: QaeMask = QaeMask.qae


@dataclass(kw_only=True, slots=True)
class ClipCovConfig:
    ratio: str = "2e-4"
    lower: float = 1.0
    upper: float = 5.0
    eps_low: float = 1.0
    eps_high: float = 1.0


@dataclass(kw_only=True, slots=True)
class KlCovConfig:
    ratio: str = "2e-3"
    beta: float = 1.0
    kl: KlKind = KlKind.abs


@dataclass(kw_only=True, slots=True)
class LossConfig:
    name: str = "ppo"
    """ppo, clip_cov, kl_cov, or a path ``pkg.mod:obj``."""
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None
    """c > 1 bounds the loss of negative advantages; null is off."""
    logratio_clamp: float = 20.0
    aggregation: str = "token-mean"
    """token-mean, seq-mean-token-mean or seq-mean-token-sum-norm, with global denominators."""
    clip_cov: ClipCovConfig = field(default_factory=ClipCovConfig)
    kl_cov: KlCovConfig = field(default_factory=KlCovConfig)
    cov_scope: CovScope = CovScope.minibatch
    cov_logp: CovLogp = CovLogp.old
    kl_coef: float = 0.0
    """KL to the frozen reference model."""
    kl_kind: KlKind = KlKind.k3
    entropy_coef: float = 0.0


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    transport: Transport = Transport.broadcast
    bucket_mb: int = 256
    pause_mode: PauseMode = PauseMode.retract
    timeout_s: float = 300.0
    host: str | None = None
    """Address under which servers reach the trainer; null: the address of this machine that faces them."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    steps: int = 100
    """Rollout steps."""
    seed: int = 0
    updates_per_rollout: int = 1
    """Optimizer steps per rollout batch; prompts_per_step must be divisible by it."""
    max_tokens_per_microbatch: int = 16384
    elide_zero_advantage: Elision = Elision.auto
    """auto: a response whose advantage is exactly 0 costs a forward pass (for the metrics) and no backward, where
    that leaves the gradient as it is: loss ppo without KL and entropy terms, one update per rollout."""
    save_hf: bool = True
    """Write the trained policy as a Hugging Face folder at the end."""


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    every: int = 0
    """Rollout steps between evaluations; 0: only before the first and after the last step."""
    at_start: bool = True
    num_samples: int = 1
    temperature: float = 0.0
    """0 is greedy."""
    max_problems: int | None = None


@dataclass(kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised warm start on the same tasks, cached, before the reinforcement learning begins."""

    enabled: bool = False
    max_steps: int = 2000
    batch_size: int = 64
    lr: float = 2e-3
    target_accuracy: float = 0.25
    """Greedy accuracy on held-out problems at which it stops."""
    check_every: int = 50
    check_problems: int = 64
    cache_dir: str = "outputs/warm_start"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    console: Console = Console.auto
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str | None = None
    samples_per_step: int = 4
    """Rollouts written as text each step."""


@dataclass(kw_only=True, slots=True)
class OpsConfig:
    backend: OpsBackend = OpsBackend.native


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything a run is made of."""

    experiment_name: str = MISSING
    output_dir: str = "outputs"
    """Runs go to <output_dir>/<experiment_name>/<run>; <output_dir>/latest points to the newest."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
