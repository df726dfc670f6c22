"""The commands that drive scenarios and read their traces: run, answer, verify, trace."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
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

from llmtrace.errors import UserError
from llmtrace.perfetto import perfetto_json
from llmtrace.render import tree
from llmtrace.scenarios.catalogue import SCENARIOS
from llmtrace.scenarios.catalogue import scenario as scenario_of
from llmtrace.scenarios.driver import Driver, Settings
from llmtrace.scenarios.expectation import CLOCK_TOLERANCE_MS
from llmtrace.scenarios.prefix_cache import NAME
from llmtrace.scenarios.runs import latest_run, load_run, wait_for
from llmtrace.scenarios.scenario import Scenario
from llmtrace.scenarios.smoke import send_smoke_requests
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
MIN_WIDTH = 150
"""Columns of output that goes into a file or a pipe."""

Name = Annotated[str, typer.Argument(metavar="SCENARIO", help=f"The scenario: {' or '.join(SCENARIOS)}.")]
Store = Annotated[str | None, typer.Option(help="Base URL of the trace store (or of Tempo); default: the stack's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
) -> None:
    """Answer a scenario's question from the traces of a run."""
    scenario = scenario_of(name)
    tempo = TempoClient(store or Stack.load().store)
    run_id = run_id or latest_run(tempo, name)
    traces = load_run(tempo, run_id, linked=scenario.linked)
    spans = [s for trace in traces for s in trace.spans]
    others = scenario.also(tempo, min(s.start_ns for s in spans), max(s.end_ns for s in spans)) if spans else []
    found = scenario.answer(run_id, [*traces, *others])
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
) -> None:
    """Send a few requests by each gateway and check that each gives one complete trace (exit code 1 if not)."""
    scenario = scenario_of(name)
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
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        console = _console()
        for part in verification_text(result):
            console.print(part)
        if result.ok:
            console.print(f"next: llmtrace trace {result.traces[0].trace_id}")
        else:
            console.print(
                f"logs: {stack.log_dir}    components: llmtrace status"
                if stack.profile == "local"
                else "components: kubectl get pods --all-namespaces"
            )
    if not result.ok:
        raise typer.Exit(1)


def trace(
    trace_id: Annotated[str, typer.Argument(help="Trace id: 32 hexadecimal digits.")],
    as_json: Json = False,
    perfetto: Annotated[Path | None, typer.Option(help="Write it for ui.perfetto.dev here.")] = None,
    store: Store = None,
) -> None:
    """Print one trace as a tree with a time bar."""
    wanted = trace_id.strip().lower()
    if len(wanted) != 32 or not all(c in "0123456789abcdef" for c in wanted):
        raise UserError(f"{trace_id!r} is no trace id: give 32 hexadecimal digits, as `llmtrace answer` prints them")
    tempo = TempoClient(store or Stack.load().store)
    found = tempo.trace(wanted)
    if found is None or not found.spans:
        raise UserError(f"the store has no trace {wanted}; a fresh trace needs some seconds, an old one may be dropped")
    if perfetto is not None:
        _write(perfetto, perfetto_json([found]))
    if as_json:
        typer.echo(trace_json(found))
        return
    console = _console()
    console.print(tree(found))
    if perfetto is not None:
        console.print(f"open {perfetto} in https://ui.perfetto.dev")


def trace_json(found: Trace) -> str:
    """A trace as JSON: the fields of :class:`llmtrace.traces.model.Span`, bytes as hex."""
    return json.dumps(asdict(found), indent=2, default=lambda value: bytes(value).hex())


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
