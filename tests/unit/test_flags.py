"""What the command lines of the kit's servers share."""

from __future__ import annotations

import argparse
import socket
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.errors import UserError
from llmtrace.flags import Parser, duration, listen


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("1.5s", 1.5), ("2m", 120.0), ("1h", 3600.0), ("1m30s", 90.0), ("250us", 0.00025), ("7ns", 7e-9)],
)
def test_durations_are_gos(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@given(st.text(max_size=8))
def test_any_other_text_is_refused(text: str) -> None:
    with suppress(argparse.ArgumentTypeError):
        assert duration(text) > 0


def test_flags_are_not_abbreviated() -> None:
    parser = Parser("x", None)
    parser.add_argument("--port")
    with pytest.raises(UserError, match="unknown flag --por; the nearest known one is '--port'"):
        parser.parse_args(["--por=1"])


def test_small_writes_are_not_held_back() -> None:
    """asyncio sets TCP_NODELAY only on sockets that name their protocol, and so do those that a listener accepts."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_an_address_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port} .*give another --address or --port"):
            listen("127.0.0.1", port, "--address")
