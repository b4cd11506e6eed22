"""Which estimator, loss, elision and controller go together; what does not is refused with its reason."""

from __future__ import annotations

from megatron_rlvr.advantage.validation import shown
from megatron_rlvr.config.no_effect import NoEffectError
from megatron_rlvr.config.schema import (
    ActuatorName,
    AdvantageConfig,
    ControllerConfig,
    Elision,
    GateOn,
    KCourse,
    LossConfig,
    Quantile,
    RunConfig,
    TrainConfig,
)
from megatron_rlvr.entropy.prompt_gate import parse_memory
from megatron_rlvr.ops.exact import parse_quantile_level
from megatron_rlvr.trainer.steering.controls import controller_settings, setting_of
from megatron_rlvr.trainer.steering.levels import build_schedule
from megatron_rlvr.trainer.update.elision import plan_elision

WITH_EPS_HIGH = ("ppo", "clip_cov", "gspo", "cispo")


def check_composition(config: RunConfig) -> None:
    """Checks sections against each other; each is checked on its own elsewhere.

    Raises:
        ValueError: naming the field, and why it cannot be or would be ignored.
    """
    if config.advantage.estimator == "qae":
        check_course(config.advantage)
    if config.advantage.estimator == "w_reinforce" and config.reward.overlong.enabled:
        raise NoEffectError(
            "reward.overlong.enabled has no effect with advantage.estimator=w_reinforce, which counts right and wrong",
            option="reward.overlong.enabled",
            because=["advantage.estimator"],
        )
    check_controller(config.advantage, config.loss, config.controller)
    check_elision(config.train, config.loss, config.controller)


def check_controller(advantage: AdvantageConfig, loss: LossConfig, controller: ControllerConfig) -> None:
    """Whether every actuator has something to move, within bounds that its setting allows."""
    if controller.target_entropy is None:
        if controller.actuators:
            raise ValueError("controller.target_entropy must be given (nats) with controller.actuators, got null")
        default = ControllerConfig()
        for name in ("rho", "deadband", "patience", "forgetting"):
            if getattr(controller, name) != getattr(default, name):
                raise NoEffectError(
                    f"controller.{name} has no effect while controller.target_entropy is null, "
                    f"got {shown(getattr(controller, name))!r}",
                    option=f"controller.{name}",
                    because=["controller.target_entropy"],
                )
        return
    for entry in controller.actuators:
        name = entry.name.value
        reason = _powerless(name, advantage, loss)
        if reason is not None:
            raise ValueError(f"controller.actuators must not hold {name}: {reason}")
        _check_bounds(name, entry.low, entry.high, setting_of(name, loss))
    controller_settings(advantage, loss, controller)


def _powerless(name: str, advantage: AdvantageConfig, loss: LossConfig) -> str | None:
    """Why an actuator has nothing to move."""
    if name in ("kl_cov", "clip_cov") and loss.name != name:
        return f"it moves loss.{name}.ratio, which has no effect with loss.name={loss.name}"
    if name == "eps_high" and loss.name not in WITH_EPS_HIGH:
        return f"loss.name={loss.name} has no upper clip"
    if name != "K":
        return None
    if advantage.estimator != "qae":
        return f"advantage.estimator={advantage.estimator} has no K"
    if advantage.K_schedule.kind is not KCourse.constant:
        return f"advantage.K_schedule.kind={advantage.K_schedule.kind.value} moves K already"
    return None


def _check_bounds(name: str, low: float, high: float, setting: str) -> None:
    allowed = {
        "entropy_coef": (low >= 0, "0 or above"),
        "kl_cov": (low > 0 and high <= 1, "in (0, 1]"),
        "clip_cov": (low > 0 and high <= 1, "in (0, 1]"),
        "eps_high": (low >= 0, "0 or above"),
        "K": (low > 0 and high < 1, "in (0, 1)"),
    }
    within, words = allowed[name]
    if not within:
        raise ValueError(f"controller.actuators {name} must keep {setting} {words}, got [{low:g}, {high:g}]")


def check_elision(train: TrainConfig, loss: LossConfig, controller: ControllerConfig) -> None:
    """Whether zero-advantage responses can be left out where that is demanded."""
    if not 0.0 <= train.elided_metrics_share <= 1.0:
        raise ValueError(f"train.elided_metrics_share must be in [0, 1], got {train.elided_metrics_share}")
    if train.elide_zero_advantage is Elision.never:
        if train.elided_metrics_share != TrainConfig().elided_metrics_share:
            raise NoEffectError(
                f"train.elided_metrics_share has no effect with train.elide_zero_advantage=never, "
                f"got {train.elided_metrics_share}",
                option="train.elided_metrics_share",
                because=["train.elide_zero_advantage"],
            )
        return
    if controller.target_entropy is not None and train.elided_metrics_share == 0.0:
        raise ValueError(
            "train.elided_metrics_share must be above 0 with controller.target_entropy: without a sample of the elided "
            "responses entropy/mean is not the policy's"
        )
    plan_elision(train, loss, has_auxiliary_loss=False)
    bonus = any(entry.name is ActuatorName.entropy_coef for entry in controller.actuators)
    if train.elide_zero_advantage is Elision.always and bonus:
        raise ValueError(
            "train.elide_zero_advantage must be auto or never here, got 'always': "
            "the controller may turn on the entropy bonus, which has a gradient on all tokens"
        )


def check_course(config: AdvantageConfig) -> None:
    """K over steps, sources and visits.

    Raises:
        ValueError: a setting that cannot be or would be ignored, by its name in the configuration.
    """
    build_schedule(config)
    sources = [entry.source for entry in config.K_by_source]
    if len(set(sources)) != len(sources):
        raise ValueError(f"advantage.K_by_source must name every source once, got {sources}")
    for entry in config.K_by_source:
        try:
            parse_quantile_level(entry.K)
        except ValueError as error:
            raise ValueError(f"advantage.K_by_source of {entry.source!r}: {error}") from None
    try:
        remembers = parse_memory(config.gate_memory) > 0
    except ValueError as error:
        raise ValueError(f"advantage.{error}") from None
    if remembers and config.K_dither:
        raise ValueError("advantage.K_dither has no effect with advantage.gate_memory above 0, which takes no rank")
    for name, on in (("K_dither", config.K_dither), ("gate_memory", remembers)):
        if on and config.quantile is Quantile.linear:
            raise ValueError(f"advantage.{name} needs advantage.quantile=inf (a rank), got 'linear'")
    if remembers and config.gate_on is GateOn.reward:
        raise ValueError("advantage.gate_memory needs advantage.gate_on=correctness (right or wrong), got 'reward'")
