"""Without a GPU the processes that SGLang's engine starts are forked, whatever method it asks for."""

import multiprocessing
import os
from types import ModuleType

import pytest

from megatron_rlvr.rollout import platform


@pytest.fixture
def spawning():
    """The method that SGLang sets when it starts, put back afterwards."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawning")
def test_a_process_has_what_its_parent_imported():
    engine = ModuleType("engine")
    engine.mp = multiprocessing
    platform._give_forking_processes(engine)
    reader, writer = engine.mp.Pipe(duplex=False)
    # A function of this moment: nothing that is spawned could find it.
    process = engine.mp.Process(target=lambda: writer.send(os.getppid()))
    process.start()
    assert reader.recv() == os.getpid()
    process.join()
    assert process.exitcode == 0


@pytest.mark.usefixtures("spawning")
def test_everything_else_is_multiprocessings():
    engine = ModuleType("engine")
    platform._give_forking_processes(engine)
    assert engine.mp.get_start_method() == "spawn"
    assert engine.mp.Pipe == multiprocessing.Pipe
