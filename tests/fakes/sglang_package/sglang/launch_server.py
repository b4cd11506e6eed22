"""Serves the fake protocol with what a real server has around it: a child process, shared memory, a temporary file."""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path


def work_forever(facts: Path) -> None:
    """The child: tells, like a scheduler, whether the launcher's module level has run in it too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    facts.write_text(json.dumps({"pid": os.getpid(), "launcher_ran": "megatron_rlvr.rollout.platform" in sys.modules}))
    while True:
        time.sleep(3600)


def run_server(args: argparse.Namespace) -> None:
    from tests.fakes.sglang_server import FakeSGLang

    if args.fail_start:
        print(f"loading {args.model_path}", flush=True)
        raise SystemExit(args.fail_start)
    if args.never_healthy:
        threading.Event().wait()
    if args.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _, leftover = tempfile.mkstemp()
    shared = Path(f"/dev/shm/sglang_loads_{os.getpid()}_test.shm")
    shared.write_bytes(b"\0" * 4096)
    with shared.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    facts = Path(leftover).with_suffix(".child")
    child = multiprocessing.get_context("spawn").Process(target=work_forever, args=(facts,), daemon=True)
    child.start()
    while not facts.exists() or not facts.read_text():
        time.sleep(0.01)
    print(f"child {facts.read_text()}", flush=True)
    with FakeSGLang(port=args.port, tp_size=args.tp_size, weight_version="0", model_path=args.model_path):
        threading.Event().wait()
    mapped.close()
