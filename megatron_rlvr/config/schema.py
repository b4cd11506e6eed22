"""The run's configuration as dataclasses; Hydra composes them, `trainer.checks` checks them together.

Fields are plain types, enums (by member name) or nested classes; ``???`` marks a value that must be given.
Every class lies in the file of its subject and is found here too.
"""

from dataclasses import dataclass, field

from megatron_rlvr.config.algorithm import (
    AdvantageConfig,
    CispoConfig,
    ClipCovConfig,
    CovLogp,
    CovScope,
    GateOn,
    GspoConfig,
    KlCovConfig,
    KlKind,
    LossConfig,
    MismatchConfig,
    QaeMask,
    Quantile,
    RatioLevel,
    Std,
)
from megatron_rlvr.config.checkpoints import CheckpointConfig, Resume
from megatron_rlvr.config.control import (
    ActuatorConfig,
    ActuatorName,
    ControllerConfig,
    KCourse,
    KPoint,
    KScheduleConfig,
    SourceLevel,
)
from megatron_rlvr.config.diagnostics import DiagnosticsConfig
from megatron_rlvr.config.evaluation import EvalConfig, EvalSetConfig, EvaluateConfig
from megatron_rlvr.config.policy import (
    DType,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Recompute,
    Schedule,
    ScratchModelConfig,
)
from megatron_rlvr.config.rollouts import (
    GroupFilter,
    PauseMode,
    RolloutConfig,
    RolloutSource,
    ServerConfig,
    SyncConfig,
    Transport,
    Verify,
)
from megatron_rlvr.config.tasks import (
    DataConfig,
    OverlongConfig,
    ReasoningGymSpec,
    RewardConfig,
)
from megatron_rlvr.config.training import (
    Console,
    Elision,
    LoggingConfig,
    OpsBackend,
    OpsConfig,
    TrainConfig,
    WarmStartConfig,
)

__all__ = [
    "ActuatorConfig",
    "ActuatorName",
    "AdvantageConfig",
    "CheckpointConfig",
    "CispoConfig",
    "ClipCovConfig",
    "Console",
    "ControllerConfig",
    "CovLogp",
    "CovScope",
    "DType",
    "DataConfig",
    "DiagnosticsConfig",
    "Elision",
    "EvalConfig",
    "EvalSetConfig",
    "EvaluateConfig",
    "GateOn",
    "GroupFilter",
    "GspoConfig",
    "KCourse",
    "KPoint",
    "KScheduleConfig",
    "KlCovConfig",
    "KlKind",
    "LoggingConfig",
    "LossConfig",
    "MISSING",
    "MismatchConfig",
    "ModelConfig",
    "OpsBackend",
    "OpsConfig",
    "OptimConfig",
    "OverlongConfig",
    "ParallelConfig",
    "PauseMode",
    "QaeMask",
    "Quantile",
    "RatioLevel",
    "ReasoningGymSpec",
    "Recompute",
    "Resume",
    "RewardConfig",
    "RolloutConfig",
    "RolloutSource",
    "RunConfig",
    "Schedule",
    "ScratchModelConfig",
    "ServerConfig",
    "SourceLevel",
    "Std",
    "SyncConfig",
    "TrainConfig",
    "Transport",
    "Verify",
    "WarmStartConfig",
]

MISSING = "???"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything a run is made of."""

    experiment_name: str = MISSING
    output_dir: str = "outputs"
    """Runs go to <output_dir>/<experiment_name>/<run_name>; <output_dir>/latest points to the newest."""
    run_name: str | None = None
    """The run's folder; with a name, starting again goes on in the same folder. Null: the time of the start."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
