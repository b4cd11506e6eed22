"""setup.py's choice between CPU and CUDA, and its refusals."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.fixture
def choose(monkeypatch, capfd):
    """Runs `setup.py build_ext --help`, which makes the choice and then builds nothing; gives the output.

    In this process, which has torch already: importing it is most of what the command costs.
    """

    def choose(wish: str) -> str:
        monkeypatch.setenv("MEGATRON_RLVR_CUDA", wish)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext", "--help"])
        runpy.run_path("setup.py", run_name="__main__")
        return capfd.readouterr().out

    return choose


def test_cpu_by_wish(choose):
    assert "building _C for the CPU only: MEGATRON_RLVR_CUDA=0" in choose("0")


def test_the_choice_says_why(choose):
    said = choose("")
    if torch.version.cuda is None:
        assert f"for the CPU only: torch {torch.__version__} is not built for CUDA" in said
    else:
        assert "megatron_rlvr: building _C" in said


def test_an_unknown_wish_is_refused(choose):
    with pytest.raises(ValueError, match="MEGATRON_RLVR_CUDA must be 0 or 1, got 'yes'"):
        choose("yes")


def test_cuda_that_cannot_be_had_is_refused(choose):
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    with pytest.raises(RuntimeError, match="MEGATRON_RLVR_CUDA=1, but torch"):
        choose("1")
