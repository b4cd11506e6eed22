"""Under which of its addresses a machine is reached."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

import psutil

LOOPBACK = "127.0.0.1"


def address_facing(urls: Iterable[str]) -> str:
    """The address of this machine that faces servers, so that they can reach it.

    Servers on this machine see every address of it: the first address towards another machine serves all, and loopback
    does where there is no other machine.

    Args:
        urls: ``http://host:port`` of every server.
    """
    found = [source_address(parts.hostname, parts.port or 80) for parts in map(urlsplit, urls) if parts.hostname]
    return next((address for address in found if not ip_address(address).is_loopback), LOOPBACK)


def source_address(host: str, port: int = 80) -> str:
    """The address from which this machine would talk to ``host``; asks the kernel, sends nothing.

    Raises:
        OSError: the name is unknown, or there is no route.
    """
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        route.connect(target)
        return str(route.getsockname()[0])


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface.

    Raises:
        ValueError: there is no such interface, or it has no IPv4 address.
    """
    addresses = psutil.net_if_addrs()
    if name not in addresses:
        raise ValueError(f"network interface must be one of {sorted(addresses)}, got {name!r}")
    for address in addresses[name]:
        if address.family is socket.AF_INET:
            return str(address.address)
    raise ValueError(f"network interface must have an IPv4 address, got {name!r}, which has none")


def main(argv: list[str]) -> int:
    """Prints the address; exit status 0, or 2 when there is none."""
    parser = argparse.ArgumentParser(description="prints under which address this machine is reached")
    parser.add_argument("--interface", help="the address of this network interface")
    parser.add_argument("--facing", nargs="*", default=[], help="the address that faces these hosts, any of them")
    arguments = parser.parse_args(argv)
    try:
        if arguments.interface is not None:
            print(interface_address(arguments.interface))
        else:
            print(address_facing(f"http://{host}" for host in arguments.facing))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
