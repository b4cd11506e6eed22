"""Every experiment that ships composes, fits its model's shape and is accepted; the papers' say what the papers say."""

import shutil
from pathlib import Path

import pytest

from megatron_rlvr.config.compose import config_dir, load_config
from megatron_rlvr.config.schema import GroupFilter, KlKind, Schedule
from megatron_rlvr.trainer.checks.configuration import check_config

MODELS = {
    "smollm2_135m": ("smollm2-135m.json", 1),
    "qwen3_8b_base_qae": ("qwen3-8b-base.json", 4),
    "qwen2_5_7b_kl_cov": ("qwen2.5-7b.json", 4),
}


def experiments() -> list[str]:
    return sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))


def model_folder(tmp_path: Path, experiment: str) -> Path:
    """A folder that has the model's config.json, which is all that the checks read."""
    shutil.copy(config_dir() / "models" / MODELS[experiment][0], tmp_path / "config.json")
    return tmp_path


@pytest.mark.parametrize("experiment", experiments())
def test_an_experiment_is_named_as_its_file(experiment: str) -> None:
    assert load_config([f"experiment={experiment}"]).experiment_name == experiment


@pytest.mark.parametrize("experiment", MODELS)
def test_an_experiment_on_a_model_is_accepted_without_a_warning(tmp_path: Path, experiment: str) -> None:
    config = load_config([f"experiment={experiment}", f"model.path={model_folder(tmp_path, experiment)}"])
    assert check_config(config, world_size=MODELS[experiment][1]) == []


@pytest.mark.parametrize("experiment", MODELS)
def test_a_model_that_is_not_there_is_named(experiment: str) -> None:
    config = load_config([f"experiment={experiment}", "model.path=/no/such/folder"])
    with pytest.raises(ValueError, match=r"model\.path must be .* got '/no/such/folder'"):
        check_config(config, world_size=MODELS[experiment][1])


def test_qae_recipe() -> None:
    config = load_config(["experiment=qwen3_8b_base_qae"])
    assert (config.advantage.estimator, config.advantage.K) == ("qae", "0.4")
    assert (config.loss.name, config.loss.eps_low, config.loss.eps_high) == ("ppo", 0.2, 0.28)
    assert (config.loss.dual_clip, config.loss.aggregation) == (10.0, "token-mean")
    assert (config.loss.kl_coef, config.loss.entropy_coef) == (0.0, 0.0)
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.group_size, rollout.temperature, rollout.top_p) == (512, 16, 1.0, 1.0)
    assert rollout.prompts_per_step // config.train.updates_per_rollout == 32
    assert (rollout.group_filter, rollout.max_gen_batches) == (GroupFilter.mixed, 10)
    overlong = config.reward.overlong
    assert (overlong.enabled, overlong.max_length, overlong.buffer) == (True, rollout.max_response_tokens, 4096)
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup_steps) == (1e-6, Schedule.constant, 0)
    assert (config.eval.num_samples, config.eval.temperature) == (32, 0.7)


def test_kl_cov_recipe() -> None:
    config = load_config(["experiment=qwen2_5_7b_kl_cov"])
    assert config.advantage.estimator == "grpo"
    assert (config.loss.name, config.loss.aggregation) == ("kl_cov", "token-mean")
    assert (config.loss.kl_cov.ratio, config.loss.kl_cov.beta, config.loss.kl_cov.kl) == ("2e-3", 1.0, KlKind.abs)
    assert (config.loss.kl_coef, config.loss.entropy_coef) == (0.0, 0.0)
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.group_size, rollout.max_response_tokens) == (256, 8, 8192)
    assert rollout.prompts_per_step // config.train.updates_per_rollout == 32
    assert rollout.group_filter is GroupFilter.mixed
    assert not config.reward.overlong.enabled
    assert (config.optim.lr, config.optim.weight_decay, config.optim.grad_clip) == (5e-7, 0.0, 1.0)
    assert (config.eval.num_samples, config.eval.temperature) == (32, 0.6)


@pytest.mark.parametrize("group", ["advantage", "loss", "controller"])
def test_every_choice_of_a_group_is_accepted(group: str) -> None:
    for path in sorted((config_dir() / group).glob("*.yaml")):
        overrides = ["experiment=quickstart", "train.updates_per_rollout=2", f"{group}={path.stem}"]
        if group == "controller":
            overrides.append("controller.target_entropy=0.5")
            overrides += [f"loss={path.stem}"] if path.stem in ("clip_cov", "kl_cov") else []
        config = load_config(overrides)
        assert check_config(config, world_size=2) == []
        name = path.stem.split("_pos_mask")[0].split("_neg_mask")[0]
        if group != "controller":
            assert name == {"advantage": config.advantage.estimator, "loss": config.loss.name}[group]
