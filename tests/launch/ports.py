"""Ports for tests."""

import socket


def free_port() -> int:
    """Return a port of this machine that was free a moment ago."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
