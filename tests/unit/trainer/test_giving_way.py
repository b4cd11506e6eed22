"""What is typed goes before what an experiment says; what is typed in vain is refused."""

from __future__ import annotations

import pytest

from megatron_rlvr.config.compose import config_dir, load_config
from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.trainer.checks.configuration import check_config
from megatron_rlvr.trainer.checks.giving_way import give_way
from megatron_rlvr.weights.hf_config import ModelShape


def accepted(*overrides: str, world_size: int = 8) -> tuple[RunConfig, list[str], list[str]]:
    config = load_config(overrides)
    shape = None
    if config.model.scratch is None or "model.path=somewhere" in overrides:
        shape = ModelShape.from_hf(config_dir() / "models/qwen3-8b-base.json")
    warnings, reset = give_way(config, overrides, lambda: check_config(config, world_size=world_size, shape=shape))
    return config, warnings, reset


def test_another_loss_leaves_the_dual_clip_of_the_recipe_out() -> None:
    config, [warning], reset = accepted("experiment=qwen3_8b_base_qae", "loss.name=kl_cov")
    assert (config.loss.name, config.loss.dual_clip, config.advantage.K) == ("kl_cov", None, "0.4")
    assert reset == ["loss.dual_clip"]
    assert warning == ("loss.dual_clip has no effect with loss.name=kl_cov, got 10.0: left out, as the experiment's")


@pytest.mark.parametrize(
    ("overrides", "reset"),
    [
        (["experiment=qwen3_8b_base_qae", "parallel.tp=1"], "parallel.sequence_parallel"),
        (["experiment=qwen3_8b_base_qae", "rollout.group_filter=none"], None),
        (["experiment=qwen3_8b_base_qae", "loss=clip_cov"], None),
        (["experiment=quickstart", "model.path=somewhere"], "model.scratch"),
        (["experiment=quickstart", "model.path=somewhere", "warm_start.enabled=false"], "warm_start.check_every"),
    ],
)
def test_an_experiment_gives_way(overrides: list[str], reset: str | None) -> None:
    _, warnings, found = accepted(*overrides)
    assert reset is None or reset in found
    assert len(warnings) >= len(found)
    for option in found:
        assert any(option in warning for warning in warnings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=qwen3_8b_base_qae", "loss.name=kl_cov", "loss.dual_clip=3"], "loss.dual_clip has no effect"),
        (["experiment=qwen3_8b_base_qae", "loss.dual_clip=3", "loss={name: kl_cov}"], "loss.dual_clip has no effect"),
        (["experiment=quickstart", "loss.kl_kind=k1"], "loss.kl_kind has no effect"),
        (["experiment=quickstart", "model.path=somewhere", "model.scratch.num_layers=2"], "exactly one of"),
        (["experiment=quickstart", "model.path=somewhere", "warm_start={enabled: false, check_every: 7}"], "no effect"),
    ],
)
def test_what_is_typed_in_vain_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accepted(*overrides)


def test_an_experiment_that_contradicts_itself_is_refused() -> None:
    config = load_config(["experiment=qwen3_8b_base_qae"])
    config.loss.name = "kl_cov"
    shape = ModelShape.from_hf(config_dir() / "models/qwen3-8b-base.json")
    with pytest.raises(ValueError, match=r"loss\.dual_clip has no effect"):
        give_way(config, ["train.steps=3"], lambda: check_config(config, world_size=8, shape=shape))


def test_a_scratch_model_takes_the_place_of_a_path() -> None:
    typed = ["experiment=quickstart", "model.scratch={num_layers: 2}"]
    config = load_config(typed)
    config.model.path = "of the experiment"
    notes, reset = give_way(config, typed, list)
    assert (notes, reset) == (["model.scratch takes the place of the experiment's model.path"], ["model.path"])
    assert config.model.path is None
    assert config.model.scratch is not None
