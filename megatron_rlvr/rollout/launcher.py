"""Starts one SGLang server: ``python -m megatron_rlvr.rollout.launcher [--parent-pid PID] [--api-key-file FILE] <sglang
arguments>``.

On a GPU this is ``sglang.launch_server`` and nothing else. Without one, the stand-ins of `platform` come first; they
are inherited by the scheduler and the detokenizer, which are forked there, and the module level runs again in whatever
else SGLang spawns.

With ``--parent-pid`` the server and all its children are killed as soon as that parent is gone. With
``--api-key-file`` it answers only those who send the key in that file.
"""

from __future__ import annotations

import sys

from megatron_rlvr.rollout import lifetime

if __name__ == "__main__" and sys.argv[1:2] == ["--parent-pid"]:
    lifetime.end_with_parent(int(sys.argv[2]))
    del sys.argv[1:3]

from megatron_rlvr.rollout import platform
from megatron_rlvr.rollout.api_key import RequireKey, read_key

platform.install()


def main(argv: list[str]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        argv: SGLang's arguments.
    """
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    if argv[:1] == ["--api-key-file"]:
        from sglang.srt.entrypoints.http_server import app

        app.add_middleware(RequireKey, key=read_key(argv[1]))
        argv = argv[2:]
    try:
        run_server(prepare_server_args(argv))
    finally:
        lifetime.kill_children()


if __name__ == "__main__":
    main(sys.argv[1:])
