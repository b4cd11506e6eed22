"""Where finished warm starts are kept, for several runs at once: one makes a warm start, the others wait for it.

An entry is a folder named by `cache_key`: ``init`` is a model made from nothing,
``warm`` the warm start's result. Both appear by one rename and are never replaced, since servers of any run may be
reading them. Files only; for rank 0.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from megatron_rlvr.config.schema import RunConfig

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""How file systems without locks answer."""
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


def cache_key(config: RunConfig) -> str:
    """Names everything that decides the result: model, task, templates, recipe and seed."""
    parts = [asdict(config.model), asdict(config.data), asdict(config.warm_start), config.train.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class WarmCacheEntry:
    """One warm start's place.

    Args:
        folder: of the entry; need not exist.

    Example:
        >>> entry = WarmCacheEntry(cache_dir / cache_key(config))
        >>> while entry.finished is None and not entry.claim():
        ...     time.sleep(1.0)   # another run is making it
        >>> if entry.finished is None:
        ...     policy.save_hf(entry.draft, like=path)
        ...     path = entry.keep(entry.draft)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.init = folder / "init"
        self._warm = folder / "warm"
        self.draft = folder / f"warm.{socket.gethostname()}-{os.getpid()}"
        """Where this process writes its result; no other one does."""
        self._lock: TextIO | None = None

    @property
    def finished(self) -> Path | None:
        """The warm start's result, or None."""
        return finished_model(self._warm)

    def claim(self) -> bool:
        """Whether this process is to make the entry: no other one does now. A lock that ends with the process.

        Where the file system has no locks several may make it at once, and the first result is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "maker.txt").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        except OSError as error:
            lock.close()
            if error.errno in NO_LOCKS:
                return True
            raise
        self._lock = lock
        for left in [*self.folder.glob("warm.*"), *self.folder.glob(".warm.*")]:  # of makers that were killed
            shutil.rmtree(left)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return True

    def maker(self) -> str:
        """In words, which process makes the entry."""
        try:
            return (self.folder / "maker.txt").read_text(encoding="utf-8") or "another run"
        except FileNotFoundError:
            return "another run"

    def release(self) -> None:
        """Lets others have it; safe to call twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def keep(self, draft: Path) -> Path:
        """Makes a complete folder the entry's result, unless there is one; the result."""
        keep_first(draft, self._warm)
        self.release()
        return self._warm


def finished_model(folder: Path) -> Path | None:
    """The folder if it holds a model, else None."""
    return folder if (folder / "config.json").is_file() else None


def keep_first(made: Path, final: Path) -> None:
    """Gives a complete folder its final name, or removes it where another process has been faster."""
    try:
        os.rename(made, final)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        shutil.rmtree(made)
