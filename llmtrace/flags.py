"""What the command lines of the kit's servers share: flags, their values, and the port to listen on."""

from __future__ import annotations

import argparse
import re
import socket
from typing import NoReturn

from llmtrace.durations import seconds
from llmtrace.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """A command line that raises UserError where it is wrong; flags are never abbreviated."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown flag {unknown[1]}{nearest(unknown[1], flags)}"
        raise UserError(message)


def duration(text: str) -> float:
    """Seconds of a duration as Go writes it, such as 500ms, 2s or 1m30s; more than 0."""
    try:
        return seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def port(text: str) -> int:
    """A port; 0 takes a free one."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def listen(host: str, port: int, host_flag: str = "--host", port_flag: str = "--port") -> socket.socket:
    """A socket bound to the address; raises UserError, naming the flags, where it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio switches Nagle's algorithm off, which holds small writes for 40 ms, where the protocol is named.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); stop what listens there, "
            f"or give another {host_flag} or {port_flag}"
        ) from None
    return listener
