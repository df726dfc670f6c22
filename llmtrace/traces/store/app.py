"""The store's HTTP application: OTLP in, the part of Tempo's HTTP API that reads out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

import duckdb
from google.protobuf import json_format
from opentelemetry.proto.trace.v1 import trace_pb2 as pb
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from llmtrace.traces.store import answers, search
from llmtrace.traces.store import traceql as q
from llmtrace.traces.store.database import Database
from llmtrace.traces.store.ingest import Ingest, Limits
from llmtrace.traces.store.parameters import ParameterError, hexadecimal, limits, query, tag_field, window

PROTOBUF = "application/protobuf"
_READERS = 4

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


class Tempo:
    """The handlers of Tempo's HTTP API. Bad parameters are answered with 400 and one sentence."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._readers = asyncio.Semaphore(_READERS)

    def reading(self, handler: Callable[[Request], Response]) -> Handler:
        """Run a handler in a thread, a few at once, and turn what it raises into answers."""

        async def run(request: Request) -> Response:
            async with self._readers:
                try:
                    return await asyncio.to_thread(handler, request)
                except (ParameterError, q.TraceQLError) as error:
                    return PlainTextResponse(f"{error}\n", 400)
                except RecursionError:
                    return PlainTextResponse("the query is nested too deeply\n", 400)
                except duckdb.Error as error:
                    log.error("%s failed: %s", request.url.path, type(error).__name__)  # noqa: TRY400
                    return PlainTextResponse("the database could not answer; try again\n", 500)

        return run

    async def ready(self, _: Request) -> Response:
        """200 while spans can be written and read."""
        if self._database.failed:
            return PlainTextResponse("the database is unusable; start the store again\n", 503)
        return PlainTextResponse("ready\n")

    async def echo(self, _: Request) -> Response:
        """Says that Tempo's API is here."""
        return PlainTextResponse("echo")

    async def build_info(self, _: Request) -> Response:
        """The version, where Grafana looks which features it may use."""
        try:
            release = version("llmtrace")
        except PackageNotFoundError:
            release = "0"
        return JSONResponse({"version": release, "revision": "", "branch": "", "goVersion": ""})

    def trace_v2(self, request: Request) -> Response:
        """GET /api/v2/traces/{id}: TraceByIDResponse."""
        data = self._trace(request)
        if data is None:
            return Response(status_code=404)
        if PROTOBUF in request.headers.get("accept", ""):
            return Response(answers.trace_by_id_response(data), media_type=PROTOBUF)
        return JSONResponse({"trace": json_format.MessageToDict(pb.TracesData.FromString(data))})

    def trace_v1(self, request: Request) -> Response:
        """GET /api/traces/{id}: Trace, whose field has another name in JSON."""
        data = self._trace(request)
        if data is None:
            return Response(status_code=404)
        if PROTOBUF in request.headers.get("accept", ""):
            return Response(data, media_type=PROTOBUF)
        document = json_format.MessageToDict(pb.TracesData.FromString(data))
        return JSONResponse({"batches": document.get("resourceSpans", [])})

    def _trace(self, request: Request) -> bytes | None:
        return self._database.trace(hexadecimal(request.path_params["trace_id"]))

    def search(self, request: Request) -> Response:
        """GET /api/search."""
        parameters = request.query_params
        tree = query(parameters)
        limit, spans_per_set = limits(parameters)
        found = search.search(self._database, tree, window(parameters), limit)
        return JSONResponse(answers.search_response(tree, found, spans_per_set))

    def tags(self, _: Request) -> Response:
        """GET /api/search/tags: names without scopes."""
        of_spans, of_resources = search.tag_names(self._database)
        return JSONResponse({"tagNames": sorted({*of_spans, *of_resources}), "metrics": {}})

    def tags_v2(self, request: Request) -> Response:
        """GET /api/v2/search/tags: names by scope."""
        scope = request.query_params.get("scope", "")
        return JSONResponse(answers.tags_v2_response(scope, *search.tag_names(self._database)))

    def tag_values(self, request: Request) -> Response:
        """GET /api/search/tag/{tag}/values: values as text."""
        values = self._values(request, scoped=False)
        return JSONResponse({"tagValues": [value["value"] for value in values], "metrics": {}})

    def tag_values_v2(self, request: Request) -> Response:
        """GET /api/v2/search/tag/{tag}/values: values with their types."""
        return JSONResponse({"tagValues": self._values(request, scoped=True), "metrics": {}})

    def _values(self, request: Request, *, scoped: bool) -> list[dict[str, str]]:
        field = tag_field(request.path_params["tag"], scoped=scoped)
        tree = query(request.query_params)
        return answers.tag_values(search.tag_values(self._database, field, tree, window(request.query_params)))


def create_app(database: Database, ingest_limits: Limits | None = None) -> Starlette:
    """The application over an open database, which stays the caller's to close."""
    tempo = Tempo(database)
    ingest = Ingest(database, ingest_limits)

    async def post_traces(request: Request) -> Response:
        return await ingest(request)

    reads: dict[str, Callable[[Request], Response]] = {
        "/api/v2/traces/{trace_id}": tempo.trace_v2,
        "/api/traces/{trace_id}": tempo.trace_v1,
        "/api/search": tempo.search,
        "/api/search/tags": tempo.tags,
        "/api/v2/search/tags": tempo.tags_v2,
        "/api/search/tag/{tag:path}/values": tempo.tag_values,
        "/api/v2/search/tag/{tag:path}/values": tempo.tag_values_v2,
    }
    routes = [
        Route("/v1/traces", post_traces, methods=["POST"]),
        Route("/ready", tempo.ready),
        Route("/api/echo", tempo.echo),
        Route("/api/status/buildinfo", tempo.build_info),
        *(Route(path, tempo.reading(handler)) for path, handler in reads.items()),
    ]
    return Starlette(routes=routes)
