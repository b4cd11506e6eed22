"""Checks of the loss section, before anything is started."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum

from megatron_rlvr.config.no_effect import NoEffectError
from megatron_rlvr.config.schema import (
    CispoConfig,
    ClipCovConfig,
    CovLogp,
    CovScope,
    GspoConfig,
    KlCovConfig,
    LossConfig,
    MismatchConfig,
    RatioLevel,
)
from megatron_rlvr.loss.aggregation import AGGREGATIONS
from megatron_rlvr.loss.policy import LOSSES
from megatron_rlvr.ops.checks import check_choice, check_not_negative, check_number, check_positive
from megatron_rlvr.ops.exact import parse_ratio
from megatron_rlvr.ops.loss_options import check_dual_clip, check_eps_low

# Fields of LossConfig that one built-in loss reads and the others ignore.
COVARIANCE_FIELDS = ("cov_scope", "cov_logp", "cov_mass")
OWN_FIELDS = {
    "ppo": ("eps_low", "eps_high", "dual_clip"),
    "clip_cov": ("clip_cov", *COVARIANCE_FIELDS),
    "kl_cov": ("kl_cov", *COVARIANCE_FIELDS),
    "gspo": ("gspo", "dual_clip"),
    "cispo": ("cispo",),
}


def validate_loss(config: LossConfig, updates_per_rollout: int) -> list[str]:
    """Checks the section.

    Args:
        config: the loss section.
        updates_per_rollout: optimizer steps per rollout batch.

    Returns:
        Warnings to print at start-up.

    Raises:
        ValueError: unknown name, bad value, or an option that would be ignored.
    """
    LOSSES.get(config.name)
    _check_values(config)
    _check_mismatch(config.mismatch)
    _check_ignored(config)
    warnings = []
    if config.name == "kl_cov" and updates_per_rollout == 1:
        warnings.append(
            "loss.name=kl_cov does nothing with train.updates_per_rollout=1: on policy the log ratio is 0 and with it "
            "the gradient of the penalty"
        )
    if config.name == "kl_cov" and config.kl_cov.beta == 0:
        warnings.append("loss.kl_cov.beta=0 makes KL-Cov a plain policy gradient")
    return warnings


def _check_values(config: LossConfig) -> None:
    check_choice(config.aggregation, name="loss.aggregation", choices=AGGREGATIONS)
    check_positive(config.logratio_clamp, name="loss.logratio_clamp")
    check_eps_low(config.eps_low, name="loss.eps_low")
    check_not_negative(config.eps_high, name="loss.eps_high")
    if config.dual_clip is not None:
        check_dual_clip(config.dual_clip, name="loss.dual_clip")
    check_eps_low(config.clip_cov.eps_low, name="loss.clip_cov.eps_low")
    check_not_negative(config.clip_cov.eps_high, name="loss.clip_cov.eps_high")
    check_eps_low(config.gspo.eps_low, name="loss.gspo.eps_low")
    check_not_negative(config.gspo.eps_high, name="loss.gspo.eps_high")
    check_eps_low(config.cispo.eps_low, name="loss.cispo.eps_low")
    check_not_negative(config.cispo.eps_high, name="loss.cispo.eps_high")
    if config.cov_mass is not None and not 0 < config.cov_mass <= 1:
        raise ValueError(f"loss.cov_mass must be in (0, 1], got {config.cov_mass}")
    lower = check_number(config.clip_cov.lower, name="loss.clip_cov.lower")
    upper = check_number(config.clip_cov.upper, name="loss.clip_cov.upper")
    if not lower < upper:
        raise ValueError(f"loss.clip_cov.lower must be below loss.clip_cov.upper, got {lower} and {upper}")
    check_not_negative(config.kl_cov.beta, name="loss.kl_cov.beta")
    for section, ratio in {"clip_cov": config.clip_cov.ratio, "kl_cov": config.kl_cov.ratio}.items():
        try:
            parse_ratio(ratio)
        except ValueError as error:
            raise ValueError(f"loss.{section}.{error}") from None
    check_not_negative(config.kl_coef, name="loss.kl_coef")
    check_not_negative(config.entropy_coef, name="loss.entropy_coef")


def _check_mismatch(config: MismatchConfig) -> None:
    default = MismatchConfig()
    if config.weight is RatioLevel.none and config.cap != default.cap:
        raise NoEffectError(
            f"loss.mismatch.cap has no effect with loss.mismatch.weight=none, got {config.cap}",
            option="loss.mismatch.cap",
            because=["loss.mismatch.weight"],
        )
    for name, value in (("lower", config.lower), ("upper", config.upper)):
        if config.reject is RatioLevel.none and value != getattr(default, name):
            raise NoEffectError(
                f"loss.mismatch.{name} has no effect with loss.mismatch.reject=none, got {value}",
                option=f"loss.mismatch.{name}",
                because=["loss.mismatch.reject"],
            )
    if config.cap is None and config.reject is RatioLevel.none:
        raise ValueError("loss.mismatch.cap must be a number where loss.mismatch.reject=none bounds no ratio, got null")
    if config.cap is not None and not config.cap >= 1:
        raise ValueError(f"loss.mismatch.cap must be 1 or above, got {config.cap}")
    if not 0 <= config.lower <= 1 <= config.upper:
        raise ValueError(
            f"loss.mismatch.lower and upper must enclose 1 (no mismatch at all), got {config.lower} and {config.upper}"
        )


def _check_ignored(config: LossConfig) -> None:
    default = LossConfig()
    if config.kl_coef == 0 and config.kl_kind != default.kl_kind:
        raise NoEffectError(
            f"loss.kl_kind has no effect with loss.kl_coef=0, got {config.kl_kind.value!r}",
            option="loss.kl_kind",
            because=["loss.kl_coef"],
        )
    own = OWN_FIELDS.get(config.name)
    if own is None:
        return  # A plugin reads what it likes.
    for name in sorted({name for names in OWN_FIELDS.values() for name in names} - set(own)):
        changed = _changed(getattr(config, name), getattr(default, name))
        if changed is not None:
            field, value = changed
            raise NoEffectError(
                f"loss.{name}{field} has no effect with loss.name={config.name}, got {value!r}",
                option=f"loss.{name}{field}",
                because=["loss.name"],
            )


Section = ClipCovConfig | KlCovConfig | GspoConfig | CispoConfig | CovScope | CovLogp | float | None


def _changed(value: Section, default: Section) -> tuple[str, object] | None:
    """The first setting that differs from its default, as (suffix of the name, value)."""
    if isinstance(value, ClipCovConfig | KlCovConfig | GspoConfig | CispoConfig):
        for field in fields(value):
            if getattr(value, field.name) != getattr(default, field.name):
                return f".{field.name}", _shown(getattr(value, field.name))
        return None
    return None if value == default else ("", _shown(value))


def _shown(value: object) -> object:
    return value.value if isinstance(value, Enum) else value
