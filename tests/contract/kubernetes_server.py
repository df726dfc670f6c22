"""A small API server: lists, watches and leases as kube-apiserver answers them, and faults at will.

What it answers is from kubernetes.io/docs/reference/using-api/api-concepts and was compared with kube-apiserver 1.34:
a watch is a stream of lines {"type", "object"}; one that asks for bookmarks gets objects that have a resourceVersion
alone; a resourceVersion that is too old gives 410, as status of the answer or as an ERROR in the stream.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any, Self

from aiohttp import web

Object = dict[str, Any]
GONE = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"}


class ApiServer:
    """Objects by path, and their changes in order. ``requests`` are the paths with their queries, as asked for."""

    def __init__(self) -> None:
        self.version = 100
        self.objects: dict[str, dict[str, Object]] = defaultdict(dict)
        self.log: dict[str, list[tuple[int, str, Object]]] = defaultdict(list)
        self.oldest = 0
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.absent: set[str] = set()
        self.down = False
        self.gone_in_stream = True
        self.cut_after: int | None = None
        self.watches = 0
        self.tokens: set[str] = set()
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self.port = 0
        self._closing: set[web.StreamResponse] = set()

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def put(self, path: str, item: Object) -> Object:
        """Add or change an object."""
        kept, name = self.objects[path], item["metadata"]["name"]
        self.version += 1
        item = json.loads(json.dumps(item))
        item["metadata"]["resourceVersion"] = str(self.version)
        item["metadata"].setdefault("uid", f"uid-{path}-{name}")
        self.log[path].append((self.version, "MODIFIED" if name in kept else "ADDED", item))
        kept[name] = item
        await self._notify()
        return item

    async def remove(self, path: str, name: str) -> None:
        self.version += 1
        item = self.objects[path].pop(name)
        item["metadata"]["resourceVersion"] = str(self.version)
        self.log[path].append((self.version, "DELETED", item))
        await self._notify()

    async def bookmark(self, path: str) -> None:
        """Tell watches that nothing changed up to now."""
        self.version += 1
        self.log[path].append(
            (self.version, "BOOKMARK", {"kind": "X", "metadata": {"resourceVersion": str(self.version)}})
        )
        await self._notify()

    def compact(self) -> None:
        """Forget all changes: to go on from before now is no longer possible."""
        self.version += 1
        self.oldest = self.version
        self.log.clear()

    async def end_watches(self) -> None:
        """End all watches, as a server does that goes down."""
        for response in list(self._closing):
            if response._payload_writer is not None and response._payload_writer.transport is not None:  # type: ignore[attr-defined]
                response._payload_writer.transport.abort()  # type: ignore[attr-defined]
        await asyncio.sleep(0)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.requests.append((request.method, path, dict(request.query)))
        if self.down:
            return web.json_response({"kind": "Status", "code": 503, "message": "down"}, status=503)
        if self.tokens and request.headers.get("Authorization", "").split(" ")[-1] not in self.tokens:
            return web.json_response({"kind": "Status", "code": 401, "message": "Unauthorized"}, status=401)
        if path in self.absent:
            return web.json_response({"kind": "Status", "code": 404, "message": "not found"}, status=404)
        if request.query.get("watch") == "true":
            return await self._watch(request)
        if request.method == "POST":
            body = await request.json()
            if body["metadata"]["name"] in self.objects[path]:
                return web.json_response({"kind": "Status", "code": 409, "message": "exists"}, status=409)
            return web.json_response(await self.put(path, body), status=201)
        folder, _, name = path.rpartition("/")
        if path not in self.objects and name in self.objects.get(folder, {}):
            if request.method == "PUT":
                body = await request.json()
                if body["metadata"].get("resourceVersion") != self.objects[folder][name]["metadata"]["resourceVersion"]:
                    return web.json_response({"kind": "Status", "code": 409, "message": "conflict"}, status=409)
                return web.json_response(await self.put(folder, body))
            return web.json_response(self.objects[folder][name])
        if name == "llmtrace-autoscale":
            return web.json_response({"kind": "Status", "code": 404, "message": "not found"}, status=404)
        return web.json_response(self._list(request))

    def _list(self, request: web.Request) -> Object:
        items = [i for i in self.objects[request.path].values() if _selected(request, i)]
        start, limit = int(request.query.get("continue") or 0), int(request.query.get("limit") or 500)
        metadata = {"resourceVersion": str(self.version)}
        if start + limit < len(items):
            metadata["continue"] = str(start + limit)
        return {"kind": "List", "metadata": metadata, "items": items[start : start + limit]}

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self.watches += 1
        position = int(request.query["resourceVersion"])
        if position < self.oldest and not self.gone_in_stream:
            return web.json_response(GONE | {"message": "too old resource version"}, status=410)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if position < self.oldest:
            await _line(response, "ERROR", GONE | {"message": f"too old resource version: {position}"})
            return response
        self._closing.add(response)
        try:
            while True:
                for version, kind, item in [e for e in self.log[request.path] if e[0] > position]:
                    position = version
                    if kind == "BOOKMARK" and request.query.get("allowWatchBookmarks") != "true":
                        continue
                    if kind != "BOOKMARK" and not _selected(request, item):
                        continue
                    if self.cut_after is not None:
                        self.cut_after -= 1
                        if self.cut_after < 0:
                            self.cut_after = None
                            await response.write(json.dumps({"type": kind, "object": item}).encode()[:20])
                            request.transport.abort()  # type: ignore[union-attr]
                            return response
                    await _line(response, kind, item)
                async with self._changed:
                    if not any(e[0] > position for e in self.log[request.path]):
                        await self._changed.wait()
        finally:
            self._closing.discard(response)


def _selected(request: web.Request, item: Object) -> bool:
    only = request.query.get("fieldSelector")
    return only is None or item.get("reason") == only.removeprefix("reason=")


async def _line(response: web.StreamResponse, kind: str, item: Object) -> None:
    await response.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")
