"""Options of the advantage estimators: which estimator has which, their defaults and their checks (spec J)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_rlvr.ops.checks import check_choice, check_not_negative, check_number, check_options
from megatron_rlvr.ops.exact import parse_quantile_level

QAE_OPTIONS = ("K", "quantile", "std", "eps", "mask", "gate_on", "correctness_N", "penalty_N", "penalty_additive")
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "qae": QAE_OPTIONS,
    "grpo": ("std", "eps"),
    "dr_grpo": (),
    "rloo": (),
    "reinforce_pp": ("lengths_N",),
    "reinforce_pp_baseline": ("lengths_N",),
    "psr": (),
    "nsr": (),
    "w_reinforce": ("positive_weight",),
    "gpg": (),
    "opo": ("lengths_N",),
}
ESTIMATOR_NAMES = tuple(OPTIONS_OF)


@dataclass(kw_only=True, slots=True)
class AdvantageOptions:
    """Complete and checked options; those an estimator does not have keep their default and are not read."""

    K: Fraction | tuple[Fraction, ...] | None = Fraction(2, 5)
    """Quantile level in (0, 1), or one for each group."""
    quantile: str = "inf"
    """inf or linear."""
    std: str = "sample"
    """sample, population, or none (qae only: no division at all)."""
    eps: float = 1e-6
    """Added to the std."""
    mask: str = "qae"
    """qae, pos_mask, neg_mask or none."""
    gate_on: str = "reward"
    """correctness or reward: what baseline, std and regime are taken of."""
    correctness_N: np.ndarray | None = None
    """float64 [N], 0 or 1."""
    penalty_N: np.ndarray | None = None
    """float64 [N], <= 0, on the +-1 reward scale."""
    penalty_additive: bool = True
    lengths_N: np.ndarray | None = None
    """int64 [N] response tokens."""
    positive_weight: float = 0.1
    """lambda of w_reinforce."""
    valid_N: np.ndarray | None = None
    """bool [N]; invalid responses get 0 and count nowhere."""

    def level_of_groups(self, num_groups: int) -> tuple[Fraction, ...]:
        """K of every group."""
        assert self.K is not None, "the face parses K"
        return self.K if isinstance(self.K, tuple) else (self.K,) * num_groups


def parse_advantage_options(
    estimator: str, options: Mapping[str, Any], *, rewards_N: np.ndarray, num_groups: int
) -> AdvantageOptions:
    """Checks the options of one call.

    Raises:
        TypeError: an option that the estimator does not have or would ignore.
        ValueError: a bad value.
    """
    check_choice(estimator, name="estimator", choices=ESTIMATOR_NAMES)
    known = (*OPTIONS_OF[estimator], "valid_N")
    check_options(dict(options), known=known, owner=f"estimator {estimator!r}")
    parsed = AdvantageOptions()
    size = len(rewards_N)
    for name, value in options.items():
        if name.endswith("_N"):
            setattr(parsed, name, _array(value, name=name, size=size))
    if "K" in options:
        parsed.K = _parse_levels(options["K"], num_groups)
    if "quantile" in options:
        parsed.quantile = check_choice(options["quantile"], name="quantile", choices=("inf", "linear"))
    if "std" in options:
        choices = ("sample", "population", "none") if estimator == "qae" else ("sample", "population")
        parsed.std = check_choice(options["std"], name="std", choices=choices)
    if "eps" in options:
        parsed.eps = check_not_negative(options["eps"], name="eps")
    if "positive_weight" in options:
        parsed.positive_weight = check_number(options["positive_weight"], name="positive_weight")
    if "lengths_N" in known and parsed.lengths_N is None:
        raise ValueError(f"lengths_N must be given for estimator {estimator!r}, got None")
    if estimator == "qae":
        _parse_qae(parsed, options, rewards_N)
    return parsed


def _parse_levels(level: Any, num_groups: int) -> Fraction | tuple[Fraction, ...]:
    if not isinstance(level, list | tuple):
        return parse_quantile_level(level)
    if len(level) != num_groups:
        raise ValueError(f"K must have one level, or one for each of the {num_groups} groups, got {len(level)}")
    return tuple(parse_quantile_level(one) for one in level)


def _parse_qae(parsed: AdvantageOptions, options: Mapping[str, Any], rewards_N: np.ndarray) -> None:
    if "mask" in options:
        parsed.mask = check_choice(options["mask"], name="mask", choices=("qae", "pos_mask", "neg_mask", "none"))
    if parsed.mask != "qae" and parsed.quantile == "linear":
        raise ValueError(f"mask must be 'qae' with quantile='linear', which has no regimes, got {parsed.mask!r}")
    if "gate_on" in options:
        parsed.gate_on = check_choice(options["gate_on"], name="gate_on", choices=("correctness", "reward"))
    elif parsed.correctness_N is not None:
        parsed.gate_on = "correctness"
    if parsed.gate_on == "correctness" and parsed.correctness_N is None:
        parsed.correctness_N = _correctness_of(rewards_N)
    for name in ("correctness_N", "penalty_N", "penalty_additive"):
        if parsed.gate_on == "reward" and name in options:
            raise ValueError(f"{name} has no effect with gate_on='reward', got {options[name]!r}")
    if "penalty_additive" in options:
        if not isinstance(options["penalty_additive"], bool):
            raise TypeError(f"penalty_additive must be a bool, got {options['penalty_additive']!r}")
        parsed.penalty_additive = options["penalty_additive"]


def _correctness_of(rewards_N: np.ndarray) -> np.ndarray:
    """0/1 from rewards that are all 0/1 or all -1/+1."""
    for wrong in (0.0, -1.0):
        if np.isin(rewards_N, (wrong, 1.0)).all():
            return (rewards_N == 1.0).astype(np.float64)
    raise ValueError(
        "correctness_N must be given for gate_on='correctness' unless all rewards are 0/1 or -1/+1, got None"
    )


def _array(value: Any, *, name: str, size: int) -> np.ndarray:
    """[N] of the option's dtype, values checked."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}] like rewards_N, got {list(array.shape)}")
    if name == "valid_N":
        if array.dtype != np.bool_:
            raise ValueError(f"valid_N must be bool, got {array.dtype}")
        return array
    if name == "lengths_N":
        if not np.issubdtype(array.dtype, np.integer) or (size and array.min() < 0):
            raise ValueError(f"lengths_N must be integers, 0 or above, got {array.tolist()[:8]} of {array.dtype}")
        return array.astype(np.int64)
    array = array.astype(np.float64)
    if name == "correctness_N" and not np.isin(array, (0.0, 1.0)).all():
        raise ValueError(f"correctness_N must be 0 or 1, got {array[~np.isin(array, (0.0, 1.0))][0]}")
    if name == "penalty_N" and not (array <= 0).all():
        raise ValueError(f"penalty_N must be 0 or below, got {array[~(array <= 0)][0]}")
    return array
