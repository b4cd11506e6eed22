"""The policy: its model, layout and optimizer."""

from dataclasses import dataclass
from enum import Enum


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
    logits_mb: int | None = None
    """MiB for logits at a time on a rank: they are made piece by piece and once more in backward, exactly. Null: the
    logits of a micro-batch's response tokens at once."""


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
