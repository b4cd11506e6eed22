"""What changes from rollout step to rollout step: K by its schedule, and what the entropy controller moves.

Nothing here claims that an actuator moves the entropy; what it did is reported beside what the entropy did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from megatron_rlvr.config.schema import ActuatorName, AdvantageConfig, ControllerConfig, LossConfig
from megatron_rlvr.entropy.controller import (
    Actuator,
    EntropyControllerSettings,
    EntropyControllerState,
    entropy_controller_step,
    initial_state,
    rank_by_authority,
    values_of,
)
from megatron_rlvr.entropy.prompt_gate import Verdicts
from megatron_rlvr.entropy.schedule import on_grid
from megatron_rlvr.metrics import Max, Metric
from megatron_rlvr.ops.exact import parse_level
from megatron_rlvr.trainer.steering.levels import GroupLevels, build_schedule
from megatron_rlvr.types import RolloutGroup


class Controls:
    """The settings of the next rollout step; the same on every rank. A checkpoint keeps its state.

    Args:
        advantage, loss, controller: checked sections.
        seed: of the dithered ranks.

    Example:
        >>> controls = Controls(config.advantage, config.loss, config.controller, seed=0)
        >>> levels = controls.levels(groups, step=1)
        >>> updater.use_loss(controls.loss())
        >>> controls.observe(entropy=0.7)
    """

    def __init__(
        self, advantage: AdvantageConfig, loss: LossConfig, controller: ControllerConfig, *, seed: int
    ) -> None:
        self.is_qae = advantage.estimator == "qae"
        self.base_loss = loss
        self.schedule = build_schedule(advantage)
        self.group_levels = GroupLevels(advantage, seed=seed)
        self.settings = controller_settings(advantage, loss, controller)
        self.state = initial_state(self.settings) if self.settings is not None else None

    @property
    def values(self) -> dict[str, float]:
        """The controller's actuators by name; empty without one."""
        if self.settings is None or self.state is None:
            return {}
        return values_of(self.settings, self.state)

    def loss(self) -> LossConfig:
        """The loss section of the next update."""
        return apply_to_loss(self.base_loss, self.values)

    def level(self, step: int) -> Fraction:
        """K of the sources that have none of their own."""
        if ActuatorName.K.value in self.values:
            return on_grid(self.values[ActuatorName.K.value])
        return self.schedule.at(step)

    def levels(self, groups: Sequence[RolloutGroup], *, step: int) -> list[Fraction] | None:
        """K of every group; None where the estimator has no K."""
        return self.group_levels.of(groups, self.level(step), step=step) if self.is_qae else None

    def levels_of_sources(self, groups: Sequence[RolloutGroup], *, step: int) -> dict[str, Fraction]:
        """K of every data source among the groups, before dither and memory."""
        base = self.level(step)
        return {g.prompt.data_source: self.group_levels.level_of(g.prompt.data_source, base) for g in groups}

    def learn(self, visits: Sequence[Verdicts]) -> None:
        """Enters what became of the step's prompts; needed where `group_levels.remembers`."""
        self.group_levels.gate.learn(visits)

    def observe(self, entropy: float) -> None:
        """One step of the controller on the entropy just measured, nats; NaN (nothing measured) moves nothing."""
        if self.settings is not None and self.state is not None and math.isfinite(entropy):
            self.state = entropy_controller_step(self.settings, self.state, entropy)

    def metrics(self, step: int) -> dict[str, Metric]:
        """The settings of this step, and the controller's state before its entropy is known."""
        metrics: dict[str, Metric] = {}
        if self.is_qae:
            metrics["advantage/K"] = Max(float(self.level(step)))
            for source, level in self.group_levels.by_source.items():
                metrics[f"advantage/K/{source}"] = Max(float(level))
        if self.settings is None or self.state is None:
            return metrics
        metrics["controller/active"] = Max(-1.0 if self.state.active is None else float(self.state.active))
        metrics["controller/saturated"] = Max(float(self.state.saturated))
        if self.state.ema is not None:
            metrics["controller/entropy_ema"] = Max(self.state.ema)
            metrics["controller/error"] = Max(self.state.error)
        for actuator, current in zip(self.settings.actuators, self.state.actuators, strict=True):
            metrics[f"controller/value/{actuator.name}"] = Max(current.value)
            if current.effect is not None:
                metrics[f"controller/effect/{actuator.name}"] = Max(current.effect)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Controller and gate; schedules are functions of the step and have no state."""
        return {
            "controller": self.state.to_dict() if self.state is not None else None,
            "gate": self.group_levels.gate.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`.

        Raises:
            ValueError: the state is of a controller with other actuators, or of none.
        """
        saved = state["controller"]
        if (saved is None) != (self.settings is None):
            ours, theirs = ("off" if x is None else "on" for x in (self.settings, saved))
            raise ValueError(f"controller must be {theirs} as in the checkpoint, got {ours}")
        if saved is not None:
            assert self.settings is not None
            if len(saved["actuators"]) != len(self.settings.actuators):
                raise ValueError(
                    f"controller.actuators must be the checkpoint's {len(saved['actuators'])}, "
                    f"got {len(self.settings.actuators)}"
                )
            self.state = EntropyControllerState.from_dict(saved)
        self.group_levels.gate.load_state_dict(state["gate"])


def controller_settings(
    advantage: AdvantageConfig, loss: LossConfig, controller: ControllerConfig
) -> EntropyControllerSettings | None:
    """The controller's own settings, actuators in order of rank; None where it is off.

    Raises:
        ValueError: a setting that cannot be, by its name in the configuration.
    """
    if controller.target_entropy is None:
        return None
    by_name = {entry.name.value: entry for entry in controller.actuators}
    if len(by_name) != len(controller.actuators):
        raise ValueError(f"controller.actuators must have different names, got {[*by_name]}")
    actuators = []
    for name in rank_by_authority([*by_name]):
        entry = by_name[name]
        rest = resting_value(name, advantage, loss)
        if not entry.low <= rest <= entry.high:
            raise ValueError(
                f"controller.actuators {name} must have low <= {setting_of(name, loss)} = {rest:g} <= high, "
                f"got [{entry.low:g}, {entry.high:g}]"
            )
        actuators.append((name, entry, rest))
    try:
        return EntropyControllerSettings(
            target=controller.target_entropy,
            actuators=tuple(
                Actuator(name=name, low=e.low, rest=rest, high=e.high, gain=e.gain, max_step=e.max_step)
                for name, e, rest in actuators
            ),
            rho=controller.rho,
            deadband=controller.deadband,
            patience=controller.patience,
            forgetting=controller.forgetting,
        )
    except ValueError as error:
        raise ValueError(f"controller: {error}") from None


def setting_of(name: str, loss: LossConfig) -> str:
    """Which setting of the configuration an actuator moves."""
    return {
        "entropy_coef": "loss.entropy_coef",
        "kl_cov": "loss.kl_cov.ratio",
        "clip_cov": "loss.clip_cov.ratio",
        "eps_high": "loss.eps_high" if loss.name == "ppo" else f"loss.{loss.name}.eps_high",
        "K": "advantage.K",
    }[name]


def resting_value(name: str, advantage: AdvantageConfig, loss: LossConfig) -> float:
    """The configured value of an actuator's setting."""
    if name == "entropy_coef":
        return loss.entropy_coef
    if name == "kl_cov":
        return float(parse_level(loss.kl_cov.ratio, name="loss.kl_cov.ratio"))
    if name == "clip_cov":
        return float(parse_level(loss.clip_cov.ratio, name="loss.clip_cov.ratio"))
    if name == "K":
        return float(parse_level(advantage.K, name="advantage.K"))
    return {
        "ppo": loss.eps_high,
        "clip_cov": loss.clip_cov.eps_high,
        "gspo": loss.gspo.eps_high,
        "cispo": loss.cispo.eps_high,
    }[loss.name]


def apply_to_loss(loss: LossConfig, values: Mapping[str, float]) -> LossConfig:
    """The loss section with the actuators' values in their settings."""
    for name, value in values.items():
        if name == "entropy_coef":
            loss = replace(loss, entropy_coef=value)
        elif name == "kl_cov":
            loss = replace(loss, kl_cov=replace(loss.kl_cov, ratio=repr(value)))
        elif name == "clip_cov":
            loss = replace(loss, clip_cov=replace(loss.clip_cov, ratio=repr(value)))
        elif name == "eps_high":
            loss = _with_eps_high(loss, value)
    return loss


def _with_eps_high(loss: LossConfig, value: float) -> LossConfig:
    if loss.name == "clip_cov":
        return replace(loss, clip_cov=replace(loss.clip_cov, eps_high=value))
    if loss.name == "gspo":
        return replace(loss, gspo=replace(loss.gspo, eps_high=value))
    if loss.name == "cispo":
        return replace(loss, cispo=replace(loss.cispo, eps_high=value))
    return replace(loss, eps_high=value)
