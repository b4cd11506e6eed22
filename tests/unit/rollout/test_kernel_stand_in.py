"""Which sgl_kernel a server without a GPU takes: one built for the CPU if there is one, else the stand-in."""

import importlib
import sys

import pytest

from megatron_rlvr.rollout import platform

LIKE_THE_CUDA_WHEEL = "raise ImportError('libcuda.so.1: cannot open shared object file')"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Installs a package of that name with these folders, and imports what the platform then finds."""

    def kernels(source: str, *folders: str):
        package = tmp_path / "sgl_kernel"
        for folder in folders:
            (package / folder).mkdir(parents=True)
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        # Without a stand-in that another test of this process has put there.
        finders = [finder for finder in sys.meta_path if not isinstance(finder, platform._KernelFinder)]
        monkeypatch.setattr(sys, "meta_path", finders)
        for name in [name for name in sys.modules if name.partition(".")[0] == "sgl_kernel"]:
            monkeypatch.delitem(sys.modules, name)
        platform._stand_in_for_sgl_kernel()
        module = importlib.import_module("sgl_kernel")
        monkeypatch.delitem(sys.modules, "sgl_kernel")
        return module

    return kernels


@pytest.mark.parametrize("architecture", ["sm90", "sm100"])
def test_a_cuda_wheel_is_not_imported(kernels, architecture):
    module = kernels(LIKE_THE_CUDA_WHEEL, architecture)
    assert module.assign_req_to_token_pool_cpu is platform.assign_req_to_token_pool_cpu
    with pytest.raises(NotImplementedError, match=r"sgl_kernel.rmsnorm needs a GPU build"):
        module.rmsnorm()


def test_a_build_for_the_cpu_stays(kernels):
    assert kernels("built_for = 'cpu'").built_for == "cpu"
