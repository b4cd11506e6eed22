"""Which folder an evaluation takes."""

import os
import shutil

import pytest

from megatron_rlvr.trainer.evaluation.model import find_model
from megatron_rlvr.trainer.evaluation.run import claim_folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "outputs" / "quickstart" / "one"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    return folder


def find(path, tmp_path):
    return find_model(str(path), converted=tmp_path / "converted", on_convert=lambda line: None)


def test_a_hugging_face_folder_is_taken_as_it_is(tiny_qwen3, tmp_path):
    copy = tmp_path / "mine"
    shutil.copytree(tiny_qwen3, copy)
    found = find(copy, tmp_path)
    assert (found.path, found.name) == (copy, "mine")
    os.utime(copy / "model.safetensors", (0, 0))
    assert find(copy, tmp_path).identity != found.identity, "other weights are another model"


def test_of_a_run_the_trained_model_comes_before_exports(run, tiny_qwen3, tmp_path):
    with pytest.raises(ValueError, match="has neither a trained model"):
        find(run, tmp_path)
    for name in ("step_000004", "step_000012"):
        shutil.copytree(tiny_qwen3, run / "export" / name)
    found = find(run, tmp_path)
    assert (found.path, found.name) == (run / "export" / "step_000012", "quickstart-one-step_000012")
    shutil.copytree(tiny_qwen3, run / "model")
    found = find(run, tmp_path)
    assert (found.path, found.name) == (run / "model", "quickstart-one")


def test_a_checkpoint_is_converted_once(run, tiny_qwen3, tmp_path):
    """The newest complete one, before an older export; one that is still being written has another name."""
    import torch
    from safetensors.torch import load_file

    from megatron_rlvr.weights.conversion import Team, hf_to_megatron
    from megatron_rlvr.weights.layout import Layout

    newest = run / "checkpoints" / "step_000012"
    newest.parent.mkdir()
    shutil.copytree(tiny_qwen3, run / "export" / "step_000008")
    hf_to_megatron(tiny_qwen3, newest, layout=Layout(), dtype=None, team=Team(), progress=lambda done, total: None)
    (run / "checkpoints" / ".step_000016.incomplete").mkdir()
    told = []
    found = find_model(str(run), converted=tmp_path / "converted", on_convert=told.append)
    again = find_model(str(run), converted=tmp_path / "converted", on_convert=told.append)
    assert len(told) == 1
    assert again == found
    assert found.name == "quickstart-one-step_000012"
    given, taken = load_file(tiny_qwen3 / "model.safetensors"), load_file(found.path / "model.safetensors")
    assert given.keys() == taken.keys()
    assert all(torch.equal(given[name], taken[name]) for name in given)


def test_results_of_two_models_never_share_a_folder(tmp_path):
    claim_folder(tmp_path, {"model": "a", "source": "outputs/latest", "seed": 0})
    claim_folder(tmp_path, {"model": "a", "source": "outputs/x/y", "seed": 0})
    with pytest.raises(ValueError, match=r"results of other settings: seed was 0 there, is 1 now; give another name"):
        claim_folder(tmp_path, {"model": "a", "source": "outputs/latest", "seed": 1})


def test_anything_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.path must be an existing folder"):
        find(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="which holds none of these"):
        find(tmp_path / "empty", tmp_path)
