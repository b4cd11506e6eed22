"""What is typed for a run goes before what its experiment says.

``experiment=qwen3_8b_base_qae loss.name=kl_cov`` asks for another loss, which has no use for the ``dual_clip`` that the
experiment sets: it is left out, and a line says so. Options that were typed themselves are refused as always, and so is
an experiment that contradicts itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rlvr.config.no_effect import NoEffectError
from megatron_rlvr.config.schema import RunConfig

ALTERNATIVES = (("model.path", "model.scratch"), ("model.scratch", "model.path"))
"""Of such a pair one is given; the first, typed, puts the second out."""


class Typed:
    """The options that a user typed, ``key=value`` each."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self._values = {key.lstrip("+~"): value for key, _, value in (each.partition("=") for each in overrides)}

    def sets(self, option: str) -> bool:
        """Whether the option's own value was typed: itself, a field of it, or a section as ``{...}``."""
        return any(
            key == option or key.startswith(option + ".") or (option.startswith(key + ".") and value.startswith("{"))
            for key, value in self._values.items()
        )

    def decides(self, option: str) -> bool:
        """Whether what was typed decides on the option: its value, or the choice of its group."""
        return self.sets(option) or option.partition(".")[0] in self._values


def give_way(
    config: RunConfig, overrides: Sequence[str], check: Callable[[], list[str]]
) -> tuple[list[str], list[str]]:
    """Runs `check` on a configuration; options of the experiment that what was typed leaves without effect are reset.

    Args:
        config: changed in place.
        overrides: what was typed.
        check: checks `config`; returns warnings.

    Returns:
        The warnings, those of this included, and the options that were reset to their defaults.

    Raises:
        ValueError: what `check` raises.
    """
    typed, notes, reset = Typed(overrides), [], []
    for winner, loser in ALTERNATIVES:
        if typed.sets(winner) and not typed.sets(loser) and None not in (_get(config, winner), _get(config, loser)):
            notes.append(f"{winner} takes the place of the experiment's {loser}")
            reset.append(loser)
            _set_default(config, loser)
    while True:
        try:
            return [*notes, *check()], reset
        except NoEffectError as error:
            is_typed = typed.sets(error.option) or error.option in reset
            if is_typed or not any(typed.decides(name) for name in error.because):
                raise
            notes.append(f"{error}: left out, as the experiment's")
            reset.append(error.option)
            _set_default(config, error.option)


def _get(config: Any, option: str) -> Any:
    for name in option.split("."):
        config = getattr(config, name)
    return config


def _set_default(config: RunConfig, option: str) -> None:
    section, _, name = option.rpartition(".")
    setattr(_get(config, section), name, _get(RunConfig(), option))
