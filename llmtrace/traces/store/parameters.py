"""Parameters of Tempo's HTTP API."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llmtrace.traces.store import traceql as q
from llmtrace.traces.store.search import Window

DEFAULT_LIMIT, MAX_LIMIT = 20, 10_000
DEFAULT_SPANS, MAX_SPANS = 3, 1_000
_ID_DIGITS = 32
_SCOPES: dict[str, q.Scope] = {"span.": "span", "resource.": "resource", ".": "any"}
_LOGFMT = re.compile(r'\s*([^\s="]+)=("(?:[^"\\]|\\.)*"|[^\s"]*)(?=\s|$)')


class ParameterError(ValueError):
    """A parameter that cannot be used; the message is one sentence."""


def hexadecimal(trace_id: str) -> str:
    """A trace id with 32 lower-case digits. ParameterError when it is none."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,32}", trace_id):
        raise ParameterError("the trace id must have 1 to 32 hexadecimal digits")
    return trace_id.lower().rjust(_ID_DIGITS, "0")


def _number(parameters: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = parameters.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"\d{1,19}", text, re.ASCII) or not least <= int(text) <= most:
        raise ParameterError(f"{name} must be a whole number from {least} to {most}")
    return int(text)


def limits(parameters: Mapping[str, str]) -> tuple[int, int]:
    """The most traces, and the most spans of each. ParameterError when one of them is none."""
    limit = _number(parameters, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    return limit, _number(parameters, "spss", DEFAULT_SPANS, 0, MAX_SPANS) or MAX_SPANS


def window(parameters: Mapping[str, str]) -> Window:
    """``start`` and ``end`` in Unix seconds, as nanoseconds. ParameterError when they are none."""
    most = 2**63 // 10**9
    start = _number(parameters, "start", 0, 0, most)
    end = _number(parameters, "end", 0, 0, most)
    if end and start > end:
        raise ParameterError("start must not be after end")
    return Window(start * 10**9, (end + 1) * 10**9 - 1) if 0 < end < most else Window(start * 10**9)


def query(parameters: Mapping[str, str]) -> q.Query:
    """The tree of ``q``, or of the older ``tags``, ``minDuration`` and ``maxDuration``.

    Raises ParameterError or TraceQLError when it is not understood.
    """
    text = parameters.get("q", "")
    older = _tags(parameters.get("tags", ""))
    if text and older:
        raise ParameterError("give q or tags, not both")
    if text:
        return q.parse(text)
    for name, op in (("minDuration", ">="), ("maxDuration", "<=")):
        given = parameters.get(name, "")
        if given:
            older.append(f"duration {op} {_duration(name, given)}")
    return q.parse("{ " + " && ".join(older) + " }")


def _duration(name: str, text: str) -> str:
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+", text, re.ASCII):
        raise ParameterError(f"{name} must be a duration like 100ms or 1.5s")
    return text


def _tags(text: str) -> list[str]:
    conditions = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _LOGFMT.match(text, position)
        if match is None:
            raise ParameterError(f"tags is not understood at position {position + 1}; write key=value pairs")
        conditions.append(_condition(match[1], match[2]))
        position = match.end()
    return conditions


def _condition(key: str, value: str) -> str:
    quoted = value if value.startswith('"') else _quoted(value)
    match key:
        case "name":
            return f"name = {quoted}"
        case "error" if value == "true":
            return "status = error"
        case "status.code" if value in q.STATUSES:
            return f"status = {value}"
        case "root.name":
            return f"rootName = {quoted}"
        case "root.service.name":
            return f"rootServiceName = {quoted}"
    alternatives = [f".{_quoted(key)} = {quoted}"]
    if re.fullmatch(r"-?\d+(?:\.\d+)?|true|false", value):
        alternatives.append(f".{_quoted(key)} = {value}")
    return "(" + " || ".join(alternatives) + ")"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def tag_field(tag: str, *, scoped: bool) -> q.Field:
    """The attribute or intrinsic that a tag names; unscoped tags are as in ``/api/search/tag``.

    ParameterError when it names none.
    """
    if tag in q.INTRINSICS:
        return q.Field("intrinsic", q.INTRINSICS[tag])
    if scoped:
        for prefix, scope in _SCOPES.items():
            if tag.startswith(prefix) and len(tag) > len(prefix):
                name = tag.removeprefix(prefix)
                if len(name) > 1 and name.startswith('"') and name.endswith('"'):
                    name = name[1:-1]
                return q.Field("span" if scope == "span" else "resource" if scope == "resource" else "any", name)
        raise ParameterError("the tag must be like span.NAME, resource.NAME, .NAME, or an intrinsic like name")
    if not tag:
        raise ParameterError("the tag has no name")
    return q.Field("any", tag)
