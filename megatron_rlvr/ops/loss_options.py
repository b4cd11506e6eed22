"""Options of the policy losses: which loss has which, their defaults and their checks (spec B3, B4, E1, J)."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rlvr.ops.checks import check_choice, check_not_negative, check_number, check_options, check_positive

LossOptions = dict[str, float | str | None]

OPTIONS_OF: dict[str, LossOptions] = {
    "ppo": {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": None, "logratio_clamp": 20.0},
    "clip_cov": {"eps_low": 1.0, "eps_high": 1.0, "logratio_clamp": 20.0},
    "kl_cov": {"beta": 1.0, "kl": "abs", "logratio_clamp": 20.0},
    "gspo": {"eps_low": 3e-4, "eps_high": 4e-4, "dual_clip": None, "logratio_clamp": 20.0},
    "cispo": {"eps_low": 1.0, "eps_high": 0.28, "logratio_clamp": 20.0},
}
LOSS_NAMES = tuple(OPTIONS_OF)
KL_KINDS = ("abs", "k1", "k2", "k3")
COVARIANCE_LOSSES = ("clip_cov", "kl_cov")


def parse_loss_options(loss: str, options: Mapping[str, object]) -> LossOptions:
    """Defaults overlaid with the checked options of one call.

    Raises:
        TypeError: an option that the loss does not have.
        ValueError: unknown loss, or a bad value.
    """
    check_choice(loss, name="loss", choices=LOSS_NAMES)
    defaults = OPTIONS_OF[loss]
    check_options(dict(options), known=tuple(defaults), owner=f"loss {loss!r}")
    parsed = dict(defaults)
    for name, value in options.items():
        if name == "kl":
            parsed[name] = check_choice(value, name=name, choices=KL_KINDS)
        elif name == "dual_clip":
            parsed[name] = None if value is None else check_dual_clip(value)
        elif name == "eps_low":
            parsed[name] = check_eps_low(value)
        elif name == "logratio_clamp":
            parsed[name] = check_positive(value, name=name)
        else:
            parsed[name] = check_not_negative(value, name=name)
    return parsed


def check_dual_clip(value: object, *, name: str = "dual_clip") -> float:
    """c above 1, else positive-ratio tokens of the first update would be clipped."""
    number = check_number(value, name=name)
    if not number > 1:
        raise ValueError(f"{name} must be above 1, got {value!r}")
    return number


def check_eps_low(value: object, *, name: str = "eps_low") -> float:
    """In [0, 1]: the lower bound of the ratio is 1 - eps_low."""
    number = check_not_negative(value, name=name)
    if number > 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return number
