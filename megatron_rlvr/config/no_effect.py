"""The error for an option that would be ignored."""

from __future__ import annotations

from collections.abc import Sequence


class NoEffectError(ValueError):
    """An option is set that another one leaves without effect.

    Args:
        message: for the user; names the option, why it has no effect, and its value.
        option: its dotted name.
        because: dotted names of the options that leave it without effect.
    """

    def __init__(self, message: str, *, option: str, because: Sequence[str]) -> None:
        super().__init__(message)
        self.option = option
        self.because = tuple(because)
