"""Composes the configurations of runs and evaluations with Hydra from configs/ and the structured schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_rlvr.config.cluster import ClusterConfig
from megatron_rlvr.config.schema import EvaluateConfig, RunConfig


@dataclass(kw_only=True, slots=True)
class SubmitConfig:
    """What submit.yaml builds on."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def config_dir() -> Path:
    """The folder with train.yaml: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def register_schema() -> None:
    """Enters the structured schemas under the names that train.yaml and evaluate.yaml build on."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def to_run_config(composed: DictConfig) -> RunConfig:
    """The dataclass behind a composed run.

    Raises:
        ValueError: a value that must be given is missing, or one is of the wrong type.
    """
    config = _to_object(composed, hint=" (pick one with experiment=NAME)")
    assert isinstance(config, RunConfig)
    return config


def to_evaluate_config(composed: DictConfig) -> EvaluateConfig:
    """The dataclass behind a composed evaluation; errors as for `to_run_config`."""
    config = _to_object(composed, hint="")
    assert isinstance(config, EvaluateConfig)
    return config


def _to_object(composed: DictConfig, *, hint: str) -> Any:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"configuration needs a value for {', '.join(missing)}{hint}")
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration: {error}") from error


def load_config(overrides: Sequence[str]) -> RunConfig:
    """Composes train.yaml with overrides such as ``experiment=quickstart`` and ``train.steps=3``.

    Raises:
        ValueError: an unknown key, group or option, a value of the wrong type, or a missing value.
    """
    return to_run_config(_compose("train", overrides))


def load_evaluate_config(overrides: Sequence[str]) -> EvaluateConfig:
    """Composes evaluate.yaml with overrides such as ``protocol=qae``; errors as for `load_config`."""
    return to_evaluate_config(_compose("evaluate", overrides))


def load_cluster(overrides: Sequence[str]) -> ClusterConfig:
    """Composes submit.yaml with overrides such as ``cluster=h100`` and ``cluster.trainer_nodes=4``.

    ``cluster=`` takes the name of a file in configs/cluster, or the path of a YAML file of the same form.

    Raises:
        ValueError: as `load_config`, or a file that cannot be read.
    """
    store = ConfigStore.instance()
    store.store(name="submit_schema", node=SubmitConfig)
    named = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "cluster" and value.endswith((".yaml", ".yml")):
            try:
                given = OmegaConf.load(value)
            except (OSError, YAMLError) as error:
                raise ValueError(f"cluster must be a name or a YAML file, got {value!r}: {error}") from error
            store.store(group="cluster", name="given", node=given)
            override = "cluster=given"
        named.append(override)
    config = _to_object(_compose("submit", named), hint=" (pick a cluster with cluster=NAME)")
    assert isinstance(config, SubmitConfig)
    return config.cluster


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        reason = f": {error.__cause__}" if error.__cause__ is not None else ""
        raise ValueError(f"configuration: {error}{reason}") from error
