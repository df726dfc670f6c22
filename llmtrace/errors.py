"""The one error type that reaches a person, and what its sentences share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or a state that the person can repair.

    The message is one sentence that says what is wrong, where, and what to do. Command lines print it without a
    traceback and exit with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if close:
        return f"; the nearest known one is {close[0]!r}"
    return f"; known: {', '.join(names)}" if names else "; none is known here"
