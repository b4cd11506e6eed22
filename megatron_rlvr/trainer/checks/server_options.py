"""Options of local servers that have no effect because somebody else's servers are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from megatron_rlvr.config.schema import RolloutConfig, ServerConfig
from megatron_rlvr.trainer.checks.giving_way import Typed

PREFIX = "rollout.server."


def check_server_options(rollout: RolloutConfig, overrides: Sequence[str]) -> list[str]:
    """Refuses options of local servers beside `rollout.urls`.

    What an experiment says of its own servers gives way to `rollout.urls` silently where the experiment is only the
    base of this run; what is typed for this run may not be lost. With `rollout.discovery` nothing is refused: there
    ``serve`` starts its servers from the same configuration.

    Args:
        rollout: the composed group.
        overrides: what was typed, ``key=value`` each.

    Returns:
        Nothing but the list of fields that an experiment sets in vain, for a line at the start.

    Raises:
        ValueError: an override that would be ignored; names it and its value.
    """
    if not rollout.urls:
        return []
    default = ServerConfig()
    set_in_vain = {f.name for f in fields(ServerConfig) if getattr(rollout.server, f.name) != getattr(default, f.name)}
    typed = Typed(overrides)
    for name in sorted(set_in_vain):
        if typed.sets(PREFIX + name):
            raise ValueError(
                f"{PREFIX}{name} has no effect while rollout.urls names servers that run already, "
                f"got {getattr(rollout.server, name)}"
            )
    return [PREFIX + name for name in sorted(set_in_vain)]
