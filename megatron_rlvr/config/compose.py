"""Composes the run's configuration with Hydra from configs/ and the structured schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rlvr.config.schema import RunConfig


def config_dir() -> Path:
    """The folder with train.yaml: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def register_schema() -> None:
    """Enters the structured schema under the name that train.yaml builds on."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)


def to_run_config(composed: DictConfig) -> RunConfig:
    """The dataclass behind a composed configuration.

    Raises:
        ValueError: a value that must be given is missing.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"configuration needs a value for {', '.join(missing)} (pick one with experiment=NAME)")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration: {error}") from error
    assert isinstance(config, RunConfig)
    return config


def load_config(overrides: Sequence[str]) -> RunConfig:
    """Composes train.yaml with overrides such as ``experiment=quickstart`` and ``train.steps=3``.

    Raises:
        ValueError: an unknown key, group or option, a value of the wrong type, or a missing value.
    """
    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("train", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        reason = f": {error.__cause__}" if error.__cause__ is not None else ""
        raise ValueError(f"configuration: {error}{reason}") from error
    return to_run_config(composed)
