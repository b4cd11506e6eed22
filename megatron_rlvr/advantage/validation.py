"""Checks of the advantage section, before anything is started."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum

from megatron_rlvr.advantage.scored import ESTIMATORS
from megatron_rlvr.config.no_effect import NoEffectError
from megatron_rlvr.config.schema import AdvantageConfig, GateOn, QaeMask, Quantile, Std
from megatron_rlvr.ops.checks import check_not_negative
from megatron_rlvr.ops.exact import parse_quantile_level

# Fields of AdvantageConfig that act on each built-in estimator, besides `estimator` itself.
COURSE_FIELDS = ("K_schedule", "K_by_source", "K_dither", "gate_memory")
FIELDS_OF = {
    "qae": ("K", "quantile", "std", "eps", "gate_on", "penalty_additive", "mask", *COURSE_FIELDS),
    "grpo": ("std", "eps"),
    "dr_grpo": (),
    "rloo": (),
    "reinforce_pp": (),
    "reinforce_pp_baseline": (),
    "psr": (),
    "nsr": (),
    "w_reinforce": ("positive_weight",),
    "gpg": (),
    "opo": (),
}


def validate_advantage(config: AdvantageConfig) -> None:
    """Checks the section on its own.

    Raises:
        ValueError: unknown estimator, bad value, or an option that the estimator would ignore.
    """
    ESTIMATORS.get(config.estimator)
    _check_values(config)
    known = FIELDS_OF.get(config.estimator)
    if known is None:
        return  # A plugin reads what it likes.
    default = AdvantageConfig()
    for field in fields(AdvantageConfig):
        name = field.name
        if name != "estimator" and name not in known and getattr(config, name) != getattr(default, name):
            raise NoEffectError(
                f"advantage.{name} has no effect with advantage.estimator={config.estimator}, "
                f"got {shown(getattr(config, name))!r}",
                option=f"advantage.{name}",
                because=["advantage.estimator"],
            )
    if config.estimator == "grpo" and config.std is Std.none:
        raise ValueError("advantage.std must be sample or population with grpo (dr_grpo is without), got 'none'")
    if config.estimator == "qae":
        _check_qae(config)


def _check_values(config: AdvantageConfig) -> None:
    try:
        parse_quantile_level(config.K)
    except (TypeError, ValueError) as error:
        raise ValueError(f"advantage.{error}") from None
    check_not_negative(config.eps, name="advantage.eps")
    check_not_negative(config.positive_weight, name="advantage.positive_weight")


def _check_qae(config: AdvantageConfig) -> None:
    if config.gate_on is GateOn.reward and not config.penalty_additive:
        raise NoEffectError(
            "advantage.penalty_additive has no effect with advantage.gate_on=reward, got False",
            option="advantage.penalty_additive",
            because=["advantage.gate_on"],
        )
    if config.mask is not QaeMask.qae and config.gate_on is GateOn.reward:
        raise ValueError(
            f"advantage.mask must be qae with advantage.gate_on=reward, whose rewards may have more than two values, "
            f"got {config.mask.value!r}"
        )
    if config.mask is not QaeMask.qae and config.quantile is Quantile.linear:
        raise ValueError(
            "advantage.mask must be qae with advantage.quantile=linear, which has no regimes, "
            f"got {config.mask.value!r}"
        )


def shown(value: object) -> object:
    """A setting as the user writes it."""
    return value.value if isinstance(value, Enum) else value
