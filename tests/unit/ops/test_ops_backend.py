"""Choosing the implementation of the ops."""

import sys

import pytest

from megatron_rlvr.ops import backend, get_backend, group_advantages, set_backend


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"ops.backend must be one of .*, got 'cuda'"):
        set_backend("cuda")


def test_native_without_the_extension_is_a_clear_error(monkeypatch):
    # None in sys.modules makes the import fail as for a package that was never built.
    monkeypatch.setitem(sys.modules, "megatron_rlvr.ops.native", None)
    before = get_backend()
    with pytest.raises(RuntimeError, match=r"ops\.backend=native needs the extension"):
        set_backend("native")
    assert get_backend() == before


def test_missing_op_is_a_clear_error(monkeypatch):
    before = get_backend()
    set_backend("native")  # loads the extension before its ops are hidden
    monkeypatch.setattr(backend, "_current", "native")
    monkeypatch.setitem(backend._implementations, "native", {})
    with pytest.raises(NotImplementedError, match="backend 'native' has no op 'group_advantages'"):
        group_advantages([1.0, 0.0], 2)
    monkeypatch.undo()
    set_backend(before)


def test_an_op_is_registered_once():
    with pytest.raises(ValueError, match="op 'group_advantages' is registered twice for backend 'reference'"):
        backend.register("group_advantages", backend="reference")(print)
