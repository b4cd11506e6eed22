"""Free TCP ports."""

from __future__ import annotations

import random
import socket

LOWEST, HIGHEST = 20000, 32000
"""Below Linux's ephemeral range (32768-60999), so that no outgoing connection takes the port before the server does."""


def free_port(host: str, *, attempts: int = 200) -> int:
    """A port nobody listens on at ``host`` now; drawn at random, so that jobs on one machine rarely meet.

    Raises:
        OSError: no free port found, or ``host`` is not an address of this machine.
    """
    draw = random.SystemRandom()
    for _ in range(attempts):
        port = draw.randint(LOWEST, HIGHEST)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                last = error
                continue
        return port
    raise OSError(f"no free port between {LOWEST} and {HIGHEST} on {host}: {last}")
