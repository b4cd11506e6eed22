"""Options of local servers beside `rollout.urls`."""

from __future__ import annotations

import pytest

from megatron_rlvr.config.schema import RolloutConfig, ServerConfig
from megatron_rlvr.trainer.checks.server_options import check_server_options

URLS = ["http://127.0.0.1:1"]


def test_a_typed_option_without_effect_is_refused() -> None:
    rollout = RolloutConfig(urls=URLS, server=ServerConfig(tp=2))
    with pytest.raises(ValueError, match=r"rollout.server.tp has no effect while rollout.urls .*got 2"):
        check_server_options(rollout, ["rollout.server.tp=2"])


def test_an_experiments_own_servers_give_way_with_a_word() -> None:
    rollout = RolloutConfig(urls=URLS, server=ServerConfig(tp=2, num_servers=4))
    assert check_server_options(rollout, ["train.steps=3"]) == ["rollout.server.num_servers", "rollout.server.tp"]


def test_a_typed_default_is_no_mistake() -> None:
    assert check_server_options(RolloutConfig(urls=URLS), ["rollout.server.tp=1"]) == []


def test_local_and_discovered_servers_have_their_options() -> None:
    server = ServerConfig(tp=2)
    assert check_server_options(RolloutConfig(server=server), ["rollout.server.tp=2"]) == []
    discovered = RolloutConfig(server=server, discovery="servers")
    assert check_server_options(discovered, ["rollout.server.tp=2"]) == []
