"""The part of TraceQL that the store understands: a grammar, and the tree that it gives.

Spansets ``{ ... }`` with comparisons of attributes and intrinsics, joined by ``&&``, ``||``, ``>`` and
``>>``. Names, literals and operators mean what they mean in Tempo's TraceQL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
from lark import Lark, Token, Transformer, UnexpectedInput, v_args
from lark.exceptions import VisitError

MAX_QUERY_CHARACTERS = 8192
MAX_DEPTH = 100

Scope = Literal["span", "resource", "any", "intrinsic"]


class TraceQLError(ValueError):
    """A query that the store does not understand; the message is one sentence with the position."""


@dataclass(frozen=True, slots=True)
class Field:
    """An attribute of a span or resource (scope "any": of either, the span first), or an intrinsic."""

    scope: Scope
    name: str


@dataclass(frozen=True, slots=True)
class Word:
    """A literal of its own type: a status (error, ok, unset) or a kind (server, client, ...)."""

    text: str


@dataclass(frozen=True, slots=True)
class Duration:
    """A literal duration in nanoseconds."""

    ns: float


Scalar = str | bool | int | float | Word | Duration | None


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal; None is ``nil``."""

    value: Scalar


Operand = Field | Constant


@dataclass(frozen=True, slots=True)
class Comparison:
    """``left op right`` with op one of = != > >= < <= =~ !~."""

    left: Operand
    op: str
    right: Operand


@dataclass(frozen=True, slots=True)
class Truth:
    """A constant or a boolean attribute that stands alone."""

    operand: Operand


@dataclass(frozen=True, slots=True)
class Not:
    """The span does not match the part."""

    part: Condition


@dataclass(frozen=True, slots=True)
class And:
    """The span matches all parts; of no parts, it matches."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """The span matches one of the parts."""

    parts: tuple[Condition, ...]


Condition = Comparison | Truth | Not | And | Or


@dataclass(frozen=True, slots=True)
class Spanset:
    """``{ condition }``: the spans of a trace that match."""

    condition: Condition


@dataclass(frozen=True, slots=True)
class Join:
    """Two spansets of one trace.

    op is ``&&`` (both, or none), ``||`` (union), ``>`` (those on the right with a parent on the left) or
    ``>>`` (... with an ancestor on the left).
    """

    left: Query
    op: str
    right: Query


Query = Spanset | Join

INTRINSICS = {
    "name": "name",
    "span:name": "name",
    "status": "status",
    "span:status": "status",
    "statusMessage": "statusMessage",
    "span:statusMessage": "statusMessage",
    "kind": "kind",
    "span:kind": "kind",
    "duration": "duration",
    "span:duration": "duration",
    "rootName": "rootName",
    "trace:rootName": "rootName",
    "rootServiceName": "rootServiceName",
    "trace:rootService": "rootServiceName",
    "traceDuration": "traceDuration",
    "trace:duration": "traceDuration",
    "trace:id": "trace:id",
    "span:id": "span:id",
    "span:parentID": "span:parentID",
    "instrumentation:name": "instrumentation:name",
}
"""Spellings of the intrinsics, and the one that stands for them in a Field."""
OF_TRACE = frozenset({"rootName", "rootServiceName", "traceDuration"})
"""Intrinsics that need the whole trace."""
KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
STATUSES = ("unset", "ok", "error")
_UNIT_NS = {"ns": 1, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9, "m": 60e9, "h": 3600e9}

_GRAMMAR = r"""
    ?query: both | query "||" both        -> union
    ?both: related | both "&&" related    -> intersection
    ?related: group | related ">" group   -> child
        | related ">>" group              -> descendant
    ?group: "(" query ")" | spanset
    spanset: "{" [condition] "}"

    ?condition: every ("||" every)*       -> any_of
    ?every: unit ("&&" unit)*             -> all_of
    ?unit: "!" unit                       -> negation
        | "(" condition ")"
        | operand OP operand              -> comparison
        | operand ">" operand             -> greater
        | operand                         -> truth
    ?operand: ATTRIBUTE                   -> attribute
        | INTRINSIC                       -> intrinsic
        | STRING                          -> string
        | DURATION                        -> duration
        | NUMBER                          -> number
        | WORD                            -> word

    OP: "=~" | "!~" | "!=" | "=" | ">=" | "<=" | "<"
    ATTRIBUTE.3: /(?:span|resource)?\.(?:"(?:[^"\\]|\\.)*"|[^\s(){}=<>!~&|^,;"`\\])+/
    INTRINSIC.2: /(?:trace:(?:id|rootName|rootService|duration)|instrumentation:name)\b/
        | /span:(?:name|statusMessage|status|kind|duration|id|parentID)\b/
        | /(?:name|statusMessage|status|kind|duration|rootServiceName|rootName|traceDuration)\b/
    STRING: /"(?:[^"\\]|\\.)*"/ | /`[^`]*`/
    DURATION.2: /-?(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+(?![\w.])/
    NUMBER: /-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])/
    WORD: /(?:true|false|nil|error|ok|unset|unspecified|internal|server|client|producer|consumer)\b/
    %ignore /\s+/
"""
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def _unquoted(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1]
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), text[1:-1], flags=re.DOTALL)


@v_args(inline=True)
class _Tree(Transformer[Token, Query]):
    def spanset(self, condition: Condition | None = None) -> Spanset:
        return Spanset(And(()) if condition is None else condition)

    def union(self, left: Query, right: Query) -> Join:
        return Join(left, "||", right)

    def intersection(self, left: Query, right: Query) -> Join:
        return Join(left, "&&", right)

    def child(self, left: Query, right: Query) -> Join:
        return Join(left, ">", right)

    def descendant(self, left: Query, right: Query) -> Join:
        return Join(left, ">>", right)

    def any_of(self, *parts: Condition) -> Condition:
        return parts[0] if len(parts) == 1 else Or(parts)

    def all_of(self, *parts: Condition) -> Condition:
        return parts[0] if len(parts) == 1 else And(parts)

    def negation(self, part: Condition) -> Condition:
        return part.part if isinstance(part, Not) else Not(part)

    def comparison(self, left: Operand, op: Token, right: Operand) -> Comparison:
        if op in ("=~", "!~"):
            if not isinstance(right, Constant) or not isinstance(right.value, str):
                raise TraceQLError(f"at position {_position(op)}, {op} needs a regular expression in quotes")
            try:
                matches(right.value, "")
            except pa.ArrowInvalid:
                raise TraceQLError(
                    f"at position {_position(op)}, the regular expression after {op} is invalid"
                ) from None
        return Comparison(left, str(op), right)

    def greater(self, left: Operand, right: Operand) -> Comparison:
        return Comparison(left, ">", right)

    def truth(self, operand: Operand) -> Truth:
        boolean = isinstance(operand, Constant) and isinstance(operand.value, bool)
        if not boolean and not (isinstance(operand, Field) and operand.scope != "intrinsic"):
            raise TraceQLError("a literal or intrinsic stands alone where a comparison is needed")
        return Truth(operand)

    def attribute(self, token: Token) -> Field:
        prefix, _, rest = token.partition(".")
        parts = re.findall(r'"(?:[^"\\]|\\.)*"|[^"]+', rest)
        name = "".join(_unquoted(part) if part.startswith('"') else part for part in parts)
        return Field(cast("Scope", prefix or "any"), name)

    def intrinsic(self, token: Token) -> Field:
        return Field("intrinsic", INTRINSICS[token])

    def string(self, token: Token) -> Constant:
        return Constant(_unquoted(token))

    def duration(self, token: Token) -> Constant:
        parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", token)
        ns = sum(float(number) * _UNIT_NS[unit] for number, unit in parts)
        return Constant(Duration(-ns if token.startswith("-") else ns))

    def number(self, token: Token) -> Constant:
        return Constant(int(token) if re.fullmatch(r"-?\d{1,19}", token) else float(token))

    def word(self, token: Token) -> Constant:
        constants: dict[str, bool | None] = {"true": True, "false": False, "nil": None}
        return Constant(constants[token] if token in constants else Word(str(token)))


_PARSER = Lark(_GRAMMAR, parser="lalr", start="query", maybe_placeholders=False, transformer=_Tree())


def matches(pattern: str, text: str) -> bool:
    """Whether an RE2 regular expression matches the whole text; pa.ArrowInvalid when it is none.

    RE2 as in Tempo: Python's own engine can be made to run for ever by a query.
    """
    return bool(pc.match_substring_regex(pa.scalar(text), f"^(?s:{pattern})$").as_py())


def _position(token: Token) -> int:
    return (token.start_pos or 0) + 1


def parse(text: str) -> Query:
    """The tree of a query; an empty query is ``{ }``. TraceQLError when the store does not understand it."""
    if not text.strip():
        return Spanset(And(()))
    if len(text) > MAX_QUERY_CHARACTERS:
        raise TraceQLError(f"the query is longer than {MAX_QUERY_CHARACTERS} characters")
    try:
        query = cast("Query", _PARSER.parse(text))
        if _depth(query) > MAX_DEPTH:
            raise TraceQLError(f"the query is nested more than {MAX_DEPTH} levels deep")
    except UnexpectedInput as error:
        raise TraceQLError(_complaint(text, error)) from None
    except VisitError as error:
        if isinstance(error.orig_exc, TraceQLError):
            raise error.orig_exc from None
        raise TraceQLError("the query has a literal that is out of range") from None
    except RecursionError:
        raise TraceQLError(f"the query is nested more than {MAX_DEPTH} levels deep") from None
    return query


def _complaint(text: str, error: UnexpectedInput) -> str:
    position = error.pos_in_stream or 0
    token: object = getattr(error, "token", None)
    if position < 0 or (isinstance(token, Token) and token.type == "$END"):
        return f"the query ends at position {len(text.rstrip()) + 1}, before it is complete"
    near = text[position : position + 20].split("\n")[0]
    return (
        f"the query is not understood at position {position + 1}, near {near!r} (this store knows spansets "
        "{ ... } joined by &&, ||, > and >>, and no pipelines)"
    )


def _depth(node: Query | Condition) -> int:
    match node:
        case Spanset(condition=part) | Not(part=part):
            return 1 + _depth(part)
        case Join(left=left, right=right):
            return 1 + max(_depth(left), _depth(right))
        case And(parts=parts) | Or(parts=parts):
            return 1 + max((_depth(part) for part in parts), default=0)
    return 1
