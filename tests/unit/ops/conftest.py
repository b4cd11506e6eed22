"""Fixtures of the ops' tests."""

import pytest

from megatron_rlvr.ops import get_backend, set_backend
from megatron_rlvr.ops.backend import BACKENDS


@pytest.fixture(params=BACKENDS)
def ops_backend(request):
    """Runs a test once with each backend."""
    before = get_backend()
    set_backend(request.param)
    yield request.param
    set_backend(before)
