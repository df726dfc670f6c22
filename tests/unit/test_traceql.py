import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.traces.model import Span, Trace
from llmtrace.traces.store import traceql as q
from llmtrace.traces.store.evaluate import TraceFacts, facts, holds, select

SPAN = Span(
    trace_id="a" * 32,
    span_id="1" * 16,
    parent_id=None,
    name="chat",
    kind="CLIENT",
    start_ns=0,
    end_ns=20_000_000,
    status="ERROR",
    attributes={"a.b": "x", "n": 5, "f": 0.5, "flag": True, "a b": "spaced", "list": ["p", "q"], "dash-ed": "d"},
    resource={"service.name": "gateway", "n": 9},
    scope="scope",
)


def matches(text: str, span: Span = SPAN) -> bool:
    tree = q.parse(text)
    assert isinstance(tree, q.Spanset)
    return holds(tree.condition, span, TraceFacts("root", "svc", 20_000_000))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "{ true }",
        '{ span.a.b = "x" }',
        '{span.a.b="x"}',
        "{ span.a.b = `x` }",
        '{ "x" = span.a.b }',
        '{ .a.b != "y" }',
        '{ span."a b" = "spaced" }',
        '{ span.dash-ed = "d" }',
        "{ span.n = 5 && span.n = 5.0 && span.n > 4 && span.n >= 5 && span.n < 6 && span.n <= 5 }",
        "{ 4 < span.n }",
        "{ span.f = 0.5 && span.flag && span.flag = true }",
        "{ .n = 5 && resource.n = 9 }",
        '{ resource.service.name =~ "gate.*" && .service.name !~ "x" }',
        "{ duration = 20ms && duration > 0.01s && duration < 1m && span:duration >= 20000us }",
        '{ name = "chat" && span:name =~ "c.+" && status = error && kind = client && span:kind != server }',
        '{ rootName = "root" && trace:rootService = "svc" && trace:duration = 20ms }',
        f'{{ trace:id = "{"a" * 32}" && span:id = "{"1" * 16}" && instrumentation:name = "scope" }}',
        '{ span.list = "p" && span.list = "q" && span.list != "r" }',
        "{ span.none = nil && span.n != nil && resource.none = nil }",
        '{ !(span.a.b = "y") && !span.none }',
        '{ span.a.b = "y" || (span.n = 5 && span.f < 1) }',
        '{ span.n = 5\n  && name = "chat" }',
    ],
)
def test_matches(text: str) -> None:
    assert matches(text)


@pytest.mark.parametrize(
    "text",
    [
        "{ false }",
        '{ span.a.b = "y" }',
        '{ span.none != "y" }',
        '{ span.n = "5" }',
        '{ resource.a.b = "x" }',
        '{ span.a.b =~ "x.+" }',
        '{ span.list != "p" }',
        '{ span.n != "x" }',
        "{ status = ok || kind = server }",
        "{ span.n = nil }",
    ],
)
def test_does_not_match(text: str) -> None:
    assert not matches(text)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("{ span.a = }", "12"),
        ("{ span.a", "9"),
        ('{ span.a = "x" } | count() > 2', "18"),
        ("{ event.x = 1 }", "3"),
        ("nonsense", "1"),
        ('{ span.a =~ "(" }', "10"),
        ("{ span.a =~ 5 }", "10"),
    ],
)
def test_says_where_it_does_not_understand(text: str, position: str) -> None:
    with pytest.raises(q.TraceQLError, match=f"position {position}\\b") as caught:
        q.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{" + "(" * 3000 + "true" + ")" * 3000 + "}", "{}||" * 1900 + "{}", "{" + "!" * 4000 + "true}"]
)
def test_deep_queries_are_no_danger(text: str) -> None:
    try:
        q.parse(text)
    except q.TraceQLError as error:
        assert "deep" in str(error)  # noqa: PT017


def test_a_query_may_not_be_endless() -> None:
    with pytest.raises(q.TraceQLError, match="longer"):
        q.parse("{ " + " " * 9000 + "}")


def test_a_literal_alone_is_no_condition() -> None:
    with pytest.raises(q.TraceQLError, match="alone"):
        q.parse('{ "x" }')


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        q.parse(text)
    except q.TraceQLError as error:
        assert str(error)  # noqa: PT017


@given(st.text(alphabet='{}()&|!=<>~."` abspan.resource:0123456789mnilk', max_size=60))
def test_any_text_of_the_language_is_parsed_or_refused(text: str) -> None:
    try:
        q.parse(text)
    except q.TraceQLError as error:
        assert str(error)  # noqa: PT017


@given(st.text(), st.text(min_size=1))
def test_quoted_text_is_taken_as_it_is(value: str, name: str) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    assert q.parse(f"{{ span.{quoted(name)} = {quoted(value)} }}") == q.Spanset(
        q.Comparison(q.Field("span", name), "=", q.Constant(value))
    )


def _span(span_id: str, parent_id: str | None, name: str) -> Span:
    return Span("a" * 32, span_id, parent_id, name, "INTERNAL", int(span_id, 16), 100)


TRACE = Trace(
    "a" * 32,
    (_span("01", None, "root"), _span("02", "01", "middle"), _span("03", "02", "leaf"), _span("04", "01", "leaf")),
)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('{ name = "root" } > { name = "leaf" }', ["04"]),
        ('{ name = "root" } >> { name = "leaf" }', ["03", "04"]),
        ('{ name = "root" } && { name = "middle" }', ["01", "02"]),
        ('{ name = "root" } && { name = "none" }', []),
        ('{ name = "none" } || { name = "middle" }', ["02"]),
        ('({ name = "none" } || { name = "root" }) > { name = "middle" } > { }', ["03"]),
        ('{ rootName = "root" && name = "leaf" }', ["03", "04"]),
    ],
)
def test_spansets_of_a_trace(text: str, ids: list[str]) -> None:
    assert [span.span_id for span in select(q.parse(text), TRACE, facts(TRACE))] == ids
