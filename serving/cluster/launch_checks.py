"""What can be checked before anything heavy is imported or started."""

from __future__ import annotations

import socket


class LaunchError(Exception):
    """The server cannot start; the message says why and what would help."""


def check_port_is_free(host: str, port: int) -> None:
    """Raise LaunchError unless a server could listen on `host` and `port` now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise LaunchError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another with --port or --host"
        ) from None
