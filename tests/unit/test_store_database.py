import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from llmtrace.errors import UserError
from llmtrace.traces.model import Span, Trace
from llmtrace.traces.otlp import decode_trace, encode
from llmtrace.traces.store import database as module
from llmtrace.traces.store import retention
from llmtrace.traces.store import traceql as q
from llmtrace.traces.store.batch import Batch, prepare, table
from llmtrace.traces.store.database import Database, QueueFullError
from llmtrace.traces.store.retention import Retention, delete_until, sweep, used_bytes
from llmtrace.traces.store.search import Window, search, tag_names, tag_values

A, B, C = "a" * 32, "b" * 32, "0" * 31 + "c"
SECOND = 10**9
NOW_S = 1_800_000_000
HOUR_MS = 3_600_000


def span(trace_id: str, number: int, **changes: object) -> Span:
    plain = Span(
        trace_id=trace_id,
        span_id=f"{number:016x}",
        parent_id=None if number == 1 else f"{1:016x}",
        name=f"span {number}",
        kind="SERVER",
        start_ns=(NOW_S + number) * SECOND,
        end_ns=(NOW_S + number) * SECOND + 5_000_000,
        attributes={"n": number, "run.id": "r1"},
        resource={"service.name": "gateway"},
        scope="test",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def batch(*spans: Span) -> Batch:
    return prepare(ExportTraceServiceRequest.FromString(encode(spans).SerializeToString()))


def write(database: Database, *spans: Span) -> None:
    database.write(batch(*spans)).result(10)


def read(database: Database, trace_id: str) -> Trace | None:
    data = database.trace(trace_id)
    return None if data is None else decode_trace(trace_id, data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "traces.duckdb"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(path)
    yield database
    database.close()


def found(database: Database, text: str, limit: int = 20, window: Window | None = None) -> list[str]:
    return [one.trace_id for one in search(database, q.parse(text), window or Window(), limit)]


def test_what_is_written_is_read_also_after_a_restart(path: Path) -> None:
    spans = (span(A, 1), span(A, 2, resource={"service.name": "picker"}, scope="other"))
    database = Database(path)
    write(database, *spans)
    assert read(database, A) == Trace(A, spans)
    assert read(database, B) is None
    database.close()
    database = Database(path)
    assert read(database, A) == Trace(A, spans)
    assert tag_names(database) == (["n", "run.id"], ["service.name"])
    database.close()


def test_a_repeated_span_is_one_and_a_shared_id_is_two(database: Database) -> None:
    write(database, span(A, 1))
    write(database, span(A, 1), span(A, 1, name="other"))
    trace = read(database, A)
    assert trace is not None
    assert sorted(s.name for s in trace.spans) == ["other", "span 1"]
    (one,) = search(database, q.parse("{}"), Window(), 5)
    assert len(one.spans) == 2


def test_invalid_spans_are_left_out() -> None:
    zero = span("0" * 32, 1)
    short = span("ab", 1)
    no_id = span(A, 1, span_id="")
    parent = span(A, 2, parent_id="abcd")
    mixed = batch(zero, short, no_id, parent, span(A, 3))
    assert (len(mixed), mixed.rejected) == (1, 4)
    assert mixed.complaint == "a parent span id is not 8 bytes"


def test_search(database: Database) -> None:
    write(database, span(A, 1), span(A, 2), span(B, 3, parent_id=None, attributes={"x": "y"}))
    write(database, span(C, 4, parent_id=None, resource={"service.name": "late"}, status="ERROR"))
    assert found(database, "{}") == [C, B, A]
    assert found(database, "{}", limit=2) == [C, B]
    assert found(database, '{ span.run.id = "r1" }') == [C, A]
    assert found(database, '{ span.run.id = "r1" && name = "span 2" }') == [A]
    assert found(database, "{ span.n > 1 && span.n <= 2.5 }") == [A]
    assert found(database, "{ span.n = 2.0 }") == [A]
    assert found(database, '{ resource.service.name = "late" }') == [C]
    assert found(database, '{ .service.name !~ "l.*" }') == [B, A]
    assert found(database, "{ status = error }") == [C]
    assert found(database, '{ !(span.run.id = "r1") }') == [B]
    assert found(database, "{ span.x != nil }") == [B]
    assert found(database, "{ span.run.id = nil }") == [B]
    assert found(database, f'{{ trace:id = "{A}" }}') == [A]
    assert found(database, '{ instrumentation:name = "test" }') == [C, B, A]
    assert found(database, '{ name = "span 1" } > { name = "span 2" }') == [A]
    assert found(database, '{ name = "span 1" } && { name = "span 3" }') == []
    assert found(database, '{ name = "span 1" } || { name = "span 3" }') == [B, A]
    assert found(database, '{ rootName = "span 1" && name = "span 2" }') == [A]
    assert found(database, '{ rootServiceName = "late" || rootServiceName =~ "nothing" }') == [C]
    assert found(database, "{ traceDuration > 500ms }") == [A]
    window = Window((NOW_S + 3) * SECOND, (NOW_S + 3) * SECOND)
    assert found(database, "{}", window=window) == [B]


def test_a_trace_is_described(database: Database) -> None:
    write(database, span(A, 1), span(A, 2), span(B, 2))
    b, a = search(database, q.parse('{ name = "span 2" }'), Window(), 5)
    assert (a.root_name, a.root_service, a.start_ns) == ("span 1", "gateway", (NOW_S + 1) * SECOND)
    assert a.end_ns == (NOW_S + 2) * SECOND + 5_000_000
    assert b.root_name == "<root span not yet received>"


def test_values(database: Database) -> None:
    write(database, span(A, 1), span(A, 2, attributes={"n": "text", "flag": True}))
    everything = q.parse("{}")
    assert tag_values(database, q.Field("span", "n"), everything, Window()) == [1, "text"]
    assert tag_values(database, q.Field("any", "service.name"), everything, Window()) == ["gateway"]
    assert tag_values(database, q.Field("intrinsic", "name"), q.parse("{ span.flag }"), Window()) == ["span 2"]
    assert tag_values(database, q.Field("span", "none"), everything, Window()) == []


def test_hostile_values_are_stored_and_found(database: Database) -> None:
    odd = "quote \" ' \\ \x00 \u2028 😀"
    write(database, span(A, 1, name=odd, attributes={odd: odd, "": ""}, start_ns=2**64 - 1, end_ns=0))
    trace = read(database, A)
    assert trace is not None
    assert trace.spans[0].attributes == {odd: odd, "": ""}
    assert trace.spans[0].start_ns == 2**64 - 1
    quoted = odd.replace("\\", "\\\\").replace('"', '\\"')
    assert found(database, f'{{ span."{quoted}" = "{quoted}" && name = "{quoted}" }}') == [A]


def test_many_writers(database: Database) -> None:
    def work(number: int) -> None:
        for index in range(20):
            write(database, span(f"{number + 1:032x}", index + 1))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        trace = read(database, f"{number + 1:032x}")
        assert trace is not None
        assert len(trace.spans) == 20


def test_the_queue_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING_BYTES", 1)
    hold = threading.Event()
    insert = database._insert

    def slow(batches: list[Batch]) -> None:
        hold.wait(10)
        insert(batches)

    monkeypatch.setattr(database, "_insert", slow)
    first = database.write(batch(span(A, 1)))
    with pytest.raises(QueueFullError):
        database.write(batch(span(A, 2)))
    hold.set()
    first.result(10)
    write(database, span(A, 3))


def test_a_failed_commit_is_reported_and_survived(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(batches: object, received_ms: int) -> None:
        raise duckdb.IOException("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "table", broken)
        with pytest.raises(duckdb.IOException):
            write(database, span(A, 1, resource={"service.name": "first seen"}))
    write(database, span(A, 1, resource={"service.name": "first seen"}))
    trace = read(database, A)
    assert trace is not None
    assert trace.spans[0].service == "first seen"


def test_a_cancelled_write_does_not_stop_the_writer(database: Database) -> None:
    database.write(batch(span(A, 1))).cancel()
    write(database, span(B, 1))


def test_by_age_whole_traces_go(path: Path) -> None:
    clock = [NOW_S]
    database = Database(path, Retention(hours=1), clock=lambda: clock[0])
    write(database, span(A, 1), span(B, 1))
    clock[0] += 1800
    write(database, span(B, 2))
    with database.cursor() as cursor:
        assert sweep(cursor, path, Retention(hours=1), (NOW_S + 3600) * 1000) == 0
        assert sweep(cursor, path, Retention(hours=1), (NOW_S + 3700) * 1000) == 1
    assert read(database, A) is None
    trace = read(database, B)
    assert trace is not None
    assert len(trace.spans) == 2
    database.close()


def test_the_writer_sweeps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SWEEP_S", 0.05)
    clock = [NOW_S]
    database = Database(path, Retention(hours=1), clock=lambda: clock[0])
    write(database, span(A, 1))
    clock[0] += 7200
    deadline = time.monotonic() + 10
    while read(database, A) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read(database, A) is None
    time.sleep(0.1)
    assert tag_names(database) == ([], [])
    write(database, span(B, 1))
    assert read(database, B) is not None
    database.close()


def test_by_size_the_oldest_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [NOW_S]
    database = Database(path, clock=lambda: clock[0])
    for number in range(10):
        write(database, span(f"{number + 1:032x}", 1))
        clock[0] += 1

    # DuckDB frees whole row groups only, so a file this small does not shrink: let the rows be the measure.
    def used(cursor: duckdb.DuckDBPyConnection, _: Path) -> int:
        row = cursor.execute("SELECT count(*) FROM spans").fetchone()
        return row[0] if row else 0

    with database.cursor() as cursor:
        assert used_bytes(cursor, path) > 0
        monkeypatch.setattr(retention, "used_bytes", used)
        assert sweep(cursor, path, Retention(max_bytes=7), NOW_S * 1000) == 5
    assert [read(database, f"{number + 1:032x}") is None for number in range(10)] == [True] * 5 + [False] * 5
    database.close()


def test_a_trace_that_grows_for_ever_can_be_cut(database: Database) -> None:
    write(database, span(A, 1))
    with database.cursor() as cursor:
        now_ms = int(time.time() * 1000) + HOUR_MS
        assert delete_until(cursor, 0) == 0
        assert delete_until(cursor, now_ms, whole=False) == 1


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "x.duckdb"
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(UserError, match="no database of the store, or is damaged"):
        Database(path)


def test_a_database_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE spans (x INTEGER)")
    with pytest.raises(UserError, match="another version"):
        Database(path)


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be opened"):
        Database(tmp_path / "file" / "x.duckdb")


def test_an_empty_table() -> None:
    assert table([], 0).num_rows == 0
