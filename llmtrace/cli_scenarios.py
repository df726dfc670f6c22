"""The commands that drive scenarios and read their traces: run, answer, verify, trace."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llmtrace.durations import seconds
from llmtrace.errors import UserError
from llmtrace.perfetto import perfetto_json
from llmtrace.render import tree
from llmtrace.scenarios.autoscaling.led_to import Led, led_to, led_to_text
from llmtrace.scenarios.catalogue import SCENARIOS
from llmtrace.scenarios.catalogue import scenario as scenario_of
from llmtrace.scenarios.driver import Driver, Settings
from llmtrace.scenarios.expectation import CLOCK_TOLERANCE_MS
from llmtrace.scenarios.prefix_cache import NAME
from llmtrace.scenarios.runs import latest_run, load_run, load_time, wait_for
from llmtrace.scenarios.scenario import Scenario
from llmtrace.scenarios.smoke import Verification, check, send_smoke_requests
from llmtrace.scenarios.smoke import verify as verify_traces
from llmtrace.scenarios.text import verification_text
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack
from llmtrace.telemetry import setup_tracing
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import TempoClient

FLUSH_TIMEOUT_MS = 10_000
LOOK_BACK_S = 3600
"""How far back the smoke test looks for traces that no request is part of."""
MIN_WIDTH = 170
"""Columns of output that goes into a file or a pipe."""

Name = Annotated[str, typer.Argument(metavar="SCENARIO", help=f"The scenario: {' or '.join(SCENARIOS)}.")]
Store = Annotated[str | None, typer.Option(help="Base URL of the trace store (or of Tempo); default: the stack's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Since = Annotated[
    str | None,
    typer.Option(help="Of all requests from then on, whoever sent them: 2h for two hours ago, or 2026-01-31T12:00Z."),
]
Until = Annotated[str | None, typer.Option(help="With --since: of those before then; default: now.")]


def run(
    name: Name = NAME,
    blocks: Annotated[int | None, typer.Option(help="Blocks; each is sent by every arm.")] = None,
    conversations: Annotated[int | None, typer.Option(help="Conversations of each tenant in a block.")] = None,
    turns: Annotated[int | None, typer.Option(help="Turns of each conversation.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Tokens to generate for each request.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, max=256, help="Conversations at the same time.")] = None,
    request_timeout: Annotated[float | None, typer.Option(min=0.1, help="Seconds for one request.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the whole run.")] = 900.0,
    store: Store = None,
) -> None:
    """Drive a scenario's workload through the stack, and wait until its traces are in the store.

    What is left out is the scenario's own choice.
    """
    scenario = scenario_of(name)
    stack = _stack(scenario)
    sizes = {"blocks": blocks, "conversations": conversations, "turns": turns}
    workload = scenario.workload(seed=seed, **{key: size for key, size in sizes.items() if size is not None})
    settings = _settings(
        scenario,
        stack,
        scenario.arms,
        max_tokens=max_tokens or scenario.max_tokens,
        concurrency=concurrency or scenario.concurrency,
        request_timeout_s=request_timeout or scenario.request_timeout_s,
        run_timeout_s=timeout,
    )
    tempo = TempoClient(store or stack.store)
    console = Console(stderr=True)
    tracing = setup_tracing(a.CLIENT_SERVICE, "driver", default_endpoint=stack.collector_otlp_grpc)
    provider = tracing.provider
    try:
        driver = Driver(settings, provider)
        with _progress(console) as bars:
            tasks = {arm: bars.add_task(f"{arm} routing", total=workload.size) for arm in scenario.arms}
            driver.progress = lambda arm: bars.advance(tasks[arm])
            record = asyncio.run(driver.run(workload))
        provider.force_flush(FLUSH_TIMEOUT_MS)
    finally:
        tracing.shutdown()
    record.save(stack.run_dir)
    ids = [trace_id for found in record.trace_ids.values() for trace_id in found]
    with console.status("waiting for the traces to reach the store"):
        seen = wait_for(tempo, ids, scenario.complete, timeout_s=30)
    late = sum(trace is None or not scenario.complete(trace) for trace in seen.values())
    console.print(
        f"run {record.run_id}: {record.requests} requests in {record.seconds:.0f} s, {record.failed} failed"
        + (f"; {late} traces are not complete in the store yet" if late else "")
    )
    console.print(f"next: llmtrace answer {name}    one trace: llmtrace trace {ids[-1]}", soft_wrap=True)


def answer(
    name: Name = NAME,
    run_id: Annotated[str | None, typer.Option("--run", help="Run id; default: the latest in the store.")] = None,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    store: Store = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Answer a scenario's question from the traces of a run, or of a time."""
    scenario = scenario_of(name)
    tempo = TempoClient(store or Stack.load().store)
    if since is None and until is None:
        run_id = run_id or latest_run(tempo, name)
        traces = load_run(tempo, run_id, linked=scenario.linked)
    elif run_id is None:
        run_id, traces = _of_time(tempo, scenario, since, until)
    else:
        raise UserError("--run is of one run, --since and --until of a time: give one of the two")
    found = scenario.answer(run_id, _with_others(tempo, scenario, traces))
    if html is not None:
        _write(html, scenario.html(found))
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    console = _console()
    for part in scenario.text(found):
        console.print(part)
    if html is not None:
        console.print(f"report: {html}")
    console.print(
        f"next: llmtrace trace {scenario.example(found) or 'ID'}" + ("" if html else "    plots: --html FILE")
    )


def verify(
    name: Name = NAME,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for complete traces.")] = 30.0,
    clock_tolerance_ms: Annotated[
        float,
        typer.Option(min=0, help="How far a span may lie outside of its parent's time, in milliseconds."),
    ] = CLOCK_TOLERANCE_MS,
    as_json: Json = False,
    store: Store = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Send a few requests by each gateway and check that each gives one complete trace (exit code 1 if not).

    With --since nothing is sent: the traces of that time are checked.
    """
    scenario = scenario_of(name)
    if since is not None or until is not None:
        tempo = TempoClient(store or Stack.load().store)
        _, traces = _of_time(tempo, scenario, since, until)
        result = check(_with_others(tempo, scenario, traces), scenario, clock_tolerance_ms=clock_tolerance_ms)
        _show(result, as_json, "")
        return
    stack = _stack(scenario)
    # Of a cluster's stack that may be one, where the local one has all to compare.
    arms = tuple(arm for arm in scenario.arms if arm in stack.gateways)
    tempo = TempoClient(store or stack.store)
    tracing = setup_tracing(a.CLIENT_SERVICE, "driver", default_endpoint=stack.collector_otlp_grpc)
    provider = tracing.provider
    driver = Driver(_settings(scenario, stack, arms or scenario.arms, max_tokens=4), provider)
    driver.run_id = f"verify-{driver.run_id}"
    try:
        sent = asyncio.run(send_smoke_requests(driver, scenario.smoke_requests()))
        provider.force_flush(FLUSH_TIMEOUT_MS)
    finally:
        tracing.shutdown()
    with Console(stderr=True).status("waiting for the traces to reach the store"):
        result = verify_traces(
            tempo,
            sent,
            scenario,
            stack,
            timeout_s=timeout,
            clock_tolerance_ms=clock_tolerance_ms,
            failed_requests=driver.failures,
            others=scenario.also(tempo, time.time_ns() - LOOK_BACK_S * 10**9, time.time_ns()),
        )
    bad = "components: kubectl get pods --all-namespaces"
    if stack.profile == "local":
        bad = f"logs: {stack.log_dir}    components: llmtrace status"
    _show(result, as_json, f"next: llmtrace trace {result.traces[0].trace_id}" if result.ok else bad)


def _show(result: Verification, as_json: bool, hint: str) -> None:
    """Print the outcome; exit code 1 where it is not good."""
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        console = _console()
        for part in verification_text(result):
            console.print(part)
        if hint:
            console.print(hint)
    if not result.ok:
        raise typer.Exit(1)


def trace(
    trace_id: Annotated[str, typer.Argument(help="Trace id: 32 hexadecimal digits.")],
    as_json: Json = False,
    perfetto: Annotated[Path | None, typer.Option(help="Write it for ui.perfetto.dev here.")] = None,
    store: Store = None,
) -> None:
    """Print one trace as a tree with a time bar; of a request, also the decisions to scale that it drove."""
    wanted = trace_id.strip().lower()
    if len(wanted) != 32 or not all(c in "0123456789abcdef" for c in wanted):
        raise UserError(f"{trace_id!r} is no trace id: give 32 hexadecimal digits, as `llmtrace answer` prints them")
    tempo = TempoClient(store or Stack.load().store)
    found = tempo.trace(wanted)
    if found is None or not found.spans:
        raise UserError(f"the store has no trace {wanted}; a fresh trace needs some seconds, an old one may be dropped")
    if perfetto is not None:
        _write(perfetto, perfetto_json([found]))
    decisions = _led_to(tempo, found)
    if as_json:
        typer.echo(trace_json(found, decisions))
        return
    console = _console()
    console.print(tree(found))
    for line in led_to_text(decisions or []):
        console.print(line)
    if perfetto is not None:
        console.print(f"open {perfetto} in https://ui.perfetto.dev")


def _led_to(tempo: TempoClient, found: Trace) -> list[Led] | None:
    """The decisions that a request led to; None where the store can be asked for traces only."""
    try:
        return led_to(tempo, found)
    except UserError as error:
        Console(stderr=True).print(f"which decisions to scale it drove is not known: {error}")
        return None


def trace_json(found: Trace, decisions: Sequence[Led] | None) -> str:
    """A trace as JSON: the fields of :class:`llmtrace.traces.model.Span`, bytes as hex, and the decisions it led to,
    null where they are not known."""
    led = None
    if decisions is not None:
        led = [{"id": d.id, "trace_id": d.trace_id, "linked": linked} for d, linked in decisions]
    return json.dumps(asdict(found) | {"led_to": led}, indent=2, default=lambda value: bytes(value).hex())


def _of_time(
    tempo: TempoClient, scenario: Scenario[Any], since: str | None, until: str | None
) -> tuple[str, Iterator[Trace]]:
    """The time in words, and the traces of its requests; UserError where the scenario is not about anybody's."""
    if not scenario.traffic:
        raise UserError(f"{scenario.name} is about what `llmtrace run` has sent: give --run, not --since or --until")
    if since is None:
        raise UserError("--until needs --since: give the start of the time, too")
    start, end = int(_moment(since)), int(_moment(until) if until else time.time())
    if start >= end:
        raise UserError(f"--since {since} is not before --until {until or 'now'}")
    words = " to ".join(datetime.fromtimestamp(t).astimezone().isoformat(timespec="seconds") for t in (start, end))
    return words, load_time(tempo, scenario.traffic, start, end)


def _moment(text: str) -> float:
    """Unix seconds of a time: a duration before now, or a date and time of ISO 8601; local, where it has no zone."""
    try:
        return time.time() - seconds(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UserError(f"{text!r} is no time: give a duration before now, like 2h, or 2026-01-31T12:00Z") from None


def _with_others(tempo: TempoClient, scenario: Scenario[Any], traces: Iterable[Trace]) -> Iterator[Trace]:
    """The traces, and then those of their time that no request is part of."""
    start_ns, end_ns = 2**63, 0
    for trace in traces:
        yield trace
        start_ns = min([start_ns, *(s.start_ns for s in trace.spans)])
        end_ns = max([end_ns, *(s.end_ns for s in trace.spans)])
    if end_ns:
        yield from scenario.also(tempo, start_ns, end_ns)


def _stack(scenario: Scenario[Any]) -> Stack:
    """The running stack; UserError when it is set up for another scenario."""
    stack = Stack.load()
    if stack.scenario != scenario.name:
        raise UserError(
            f"the running stack is set up for {stack.scenario}, not for {scenario.name}: "
            f"run `llmtrace up -e scenario={scenario.name}`"
        )
    return stack


def _settings(scenario: Scenario[Any], stack: Stack, arms: tuple[str, ...], **changes: float) -> Settings:
    return Settings(
        scenario.name,
        stack.model,
        stack.gateways,
        {server.name: server.url for server in stack.servers if not server.standby},
        arms,
        {server.name: server.role for server in stack.servers if not server.standby},
        scenario.arm_facts(stack),
        **changes,  # type: ignore[arg-type]
    )


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, MIN_WIDTH))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another file") from None


def mount(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    for command in (run, answer, verify, trace):
        app.command()(command)
