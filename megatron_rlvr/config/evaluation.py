"""Evaluation: of held-out problems and named sets while training, and as a command of its own."""

from dataclasses import dataclass, field

from megatron_rlvr.config.policy import DType
from megatron_rlvr.config.rollouts import ServerConfig
from megatron_rlvr.config.tasks import ReasoningGymSpec, RewardConfig

MISSING = "???"


@dataclass(kw_only=True, slots=True)
class EvalSetConfig:
    """A named set of problems, from JSONL files or from reasoning-gym."""

    name: str = MISSING
    """Metrics are ``eval/<name>/...``, results ``<name>.jsonl``."""
    jsonl: list[str] = field(default_factory=list)
    """Files with ``prompt`` or ``messages``, ``answer``, optional ``data_source``; in the order of the files."""
    reasoning_gym: list[ReasoningGymSpec] = field(default_factory=list)
    """Families, instead of files. Problems may coincide with training ones of the same family; the run's own held-out
    problems (data.val_size) never do."""
    size: int | None = None
    """Problems: the first so many of the files (null: all), or so many distinct ones of the families."""
    seed: int = 0
    """Of the reasoning-gym problems."""
    num_samples: int = 1
    """Sampled answers a problem; 0: none, only the greedy one."""
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""
    greedy: bool = False
    """One greedy answer a problem as well."""
    k: list[int] = field(default_factory=lambda: [1])
    """pass@k to report, each at most num_samples."""
    max_response_tokens: int | None = None
    """Null: rollout.max_response_tokens."""
    system_prompt: str | None = None
    """Null: data.system_prompt; so the two below."""
    prompt_template: str | None = None
    chat_template: bool | None = None


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation while training: the held-out problems of `data`, and further sets."""

    every: int = 0
    """Rollout steps between evaluations; 0: only before the first and after the last step."""
    at_start: bool = True
    num_samples: int = 1
    """Of the held-out problems."""
    temperature: float = 0.0
    """0 is greedy."""
    max_problems: int | None = None
    sets: list[EvalSetConfig] = field(default_factory=list)
    """Evaluated with the held-out problems, each with sampling of its own."""


@dataclass(kw_only=True, slots=True)
class EvaluatedModelConfig:
    path: str | None = None
    """Hugging Face folder, folder of a finished run, or Megatron checkpoint (converted on the way). Null: whatever the
    servers of rollout.urls serve."""
    dtype: DType | None = None
    """Of the servers that are started; null: fp32 for a model whose config.json says float32, else bf16."""
    tokenizer: str | None = None
    """Folder with the tokenizer, for rollout.urls whose model folder is not on this machine."""


@dataclass(kw_only=True, slots=True)
class EvaluatedPromptConfig:
    """Templates of sets that have none of their own."""

    system_prompt: str | None = None
    prompt_template: str | None = None
    """With ``{prompt}``."""
    chat_template: bool = False
    max_prompt_tokens: int = 2048
    """A longer prompt is an error: a benchmark without some of its problems is another one."""


@dataclass(kw_only=True, slots=True)
class EvaluationServersConfig:
    """Servers and limits of generation."""

    urls: list[str] = field(default_factory=list)
    """Running servers; empty: `server.num_servers` are started."""
    router_url: str | None = None
    api_key_file: str | None = None
    """File with the key that servers want, as in training."""
    server: ServerConfig = field(default_factory=ServerConfig)
    max_response_tokens: int = 1024
    """Of sets that say nothing else."""
    stop: list[str] = field(default_factory=list)
    concurrency: int = 256
    """Requests in flight over all servers."""
    request_timeout_s: float = 3600.0
    max_retries: int = 3


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """``python -m megatron_rlvr.evaluate``."""

    output_dir: str = "outputs/evaluations"
    name: str | None = None
    """Results go to <output_dir>/<name>-<hash of what decides them>; null: named by the model's folder."""
    model: EvaluatedModelConfig = field(default_factory=EvaluatedModelConfig)
    rollout: EvaluationServersConfig = field(default_factory=EvaluationServersConfig)
    data: EvaluatedPromptConfig = field(default_factory=EvaluatedPromptConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sets: list[EvalSetConfig] = field(default_factory=list)
    seed: int = 0
    """Of the sampling seeds sent to the servers, and of the intervals' resampling."""
    level: float = 0.95
    """Nominal coverage of the confidence intervals."""
