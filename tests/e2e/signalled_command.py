"""A command that gets a signal when it begins to import a module. Run by test_early_signals.py.

Arguments: the module, the signal's name, ``train`` or ``launch``, then the command's arguments.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from megatron_rlvr import launch, train


class Signalling(MetaPathFinder):
    """Finds nothing; sends the signal when it is asked for the module for the first time."""

    def __init__(self, module: str, number: signal.Signals) -> None:
        self.module, self.number = module, number

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == self.module:
            self.module = ""
            os.kill(os.getpid(), self.number)
        return None


if __name__ == "__main__":
    # A shell's job in the background gets it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.meta_path.insert(0, Signalling(sys.argv.pop(1), signal.Signals[sys.argv.pop(1)]))
    if sys.argv.pop(1) == "train":
        train.main()
    else:
        sys.exit(launch.Launcher().launch(sys.argv[1:]))
