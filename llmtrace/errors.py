"""The one error type that reaches a person."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a state that the person can repair.

    The message is one sentence that says what is wrong, where, and what to do. Command lines print it without a
    traceback and exit with code 2.
    """
