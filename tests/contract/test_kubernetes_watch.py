"""The watch protocol, against a server that speaks it: going on, 410, bookmarks, and connections that end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml
from kubernetes_server import ApiServer

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from scaling import until

from llmtrace.autoscale.kubernetes.api import Api, Kind, follow
from llmtrace.errors import UserError

PODS = Kind("", "v1", "pods")
PATH = "/api/v1/namespaces/llm-d/pods"


def kubeconfig(folder: Path, port: int) -> Path:
    path = folder / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "test", "user": {"token": "secret"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


class Sink:
    """What a watch told."""

    def __init__(self) -> None:
        self.there: dict[str, str] = {}
        self.lists = 0
        self.events: list[tuple[str, str]] = []
        self.complaints: list[str] = []

    def replace(self, kind, items) -> None:
        self.lists += 1
        self.there = {i["metadata"]["name"]: i["metadata"]["resourceVersion"] for i in items}

    def change(self, kind, event, item) -> None:
        name = item["metadata"]["name"]
        self.events.append((event, name))
        self.there |= {name: item["metadata"]["resourceVersion"]}
        if event == "DELETED":
            del self.there[name]

    def complain(self, part: str, said: str) -> None:
        if said:
            self.complaints.append(said)


def pod(name: str, note: str = "") -> dict:
    return {"kind": "Pod", "metadata": {"name": name, "annotations": {"note": note}}}


@asynccontextmanager
async def followed(server: ApiServer, folder: Path, kind: Kind = PODS) -> AsyncIterator[Sink]:
    sink = Sink()
    api = await Api.connect(kubeconfig(folder, server.port))

    async def soon(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.05))

    task = asyncio.create_task(follow(api, kind, "llm-d", sink, sink.complain, soon))
    try:
        yield sink
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await api.close()


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as made:
        yield made


async def test_what_is_there_is_listed_and_what_changes_is_told(server, tmp_path):
    server.tokens = {"secret"}
    await server.put(PATH, pod("a"))
    async with followed(server, tmp_path) as sink:
        await until(lambda: set(sink.there) == {"a"}, "the list")
        await server.put(PATH, pod("b"))
        await server.put(PATH, pod("a", "changed"))
        await server.remove(PATH, "b")
        await until(lambda: len(sink.events) == 3, "the changes")
    assert sink.events == [("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]
    assert sink.lists == 1
    watch = next(query for _, path, query in server.requests if path == PATH and "watch" in query)
    assert watch["allowWatchBookmarks"] == "true"
    assert int(watch["timeoutSeconds"]) > 0


async def test_a_long_list_comes_in_pages(server, tmp_path):
    for number in range(1201):
        await server.put(PATH, pod(f"p{number}"))
    async with followed(server, tmp_path) as sink:
        await until(lambda: sink.lists == 1, "the list")
    assert len(sink.there) == 1201
    assert [q.get("continue") for _, p, q in server.requests if p == PATH and "watch" not in q] == [None, "500", "1000"]


async def test_a_watch_that_ends_within_a_line_goes_on_where_it_was(server, tmp_path):
    async with followed(server, tmp_path) as sink:
        await until(lambda: server.watches == 1, "a watch")
        server.cut_after = 1
        await server.put(PATH, pod("a"))
        await server.put(PATH, pod("b"))
        await until(lambda: len(sink.events) >= 2, "both")
    assert sink.events == [("ADDED", "a"), ("ADDED", "b")]
    assert sink.lists == 1


@pytest.mark.parametrize("in_stream", [True, False])
async def test_where_the_version_is_gone_everything_is_listed_again_and_what_is_missing_is_told(
    server, tmp_path, in_stream
):
    await server.put(PATH, pod("a"))
    async with followed(server, tmp_path) as sink:
        await until(lambda: server.watches == 1 and "a" in sink.there, "a watch")
        server.gone_in_stream = in_stream
        server.objects[PATH].pop("a")
        server.objects[PATH]["b"] = pod("b") | {"metadata": {"name": "b", "resourceVersion": "150"}}
        server.compact()
        await server.end_watches()
        await until(lambda: sink.lists == 2, "another list")
        await server.put(PATH, pod("c"))
        await until(lambda: len(sink.events) == 1, "the watch after it")
    assert set(sink.there) == {"b", "c"}


async def test_a_bookmark_moves_the_version_on(server, tmp_path):
    async with followed(server, tmp_path) as sink:
        await until(lambda: server.watches == 1, "a watch")
        await server.bookmark(PATH)
        version = server.version
        await asyncio.sleep(0.1)
        await server.end_watches()
        await until(lambda: server.watches == 2, "another watch")
        await server.put(PATH, pod("a"))
        await until(lambda: len(sink.events) == 1, "the change")
    last = [q for _, p, q in server.requests if p == PATH and "watch" in q][-1]
    assert last["resourceVersion"] == str(version)
    assert sink.lists == 1


async def test_a_server_that_is_down_is_waited_for_and_nothing_is_lost(server, tmp_path):
    async with followed(server, tmp_path) as sink:
        await until(lambda: server.watches == 1, "a watch")
        server.down = True
        await server.end_watches()
        await server.put(PATH, pod("a"))
        await until(lambda: len(sink.complaints) > 1, "complaints")
        server.down = False
        await until(lambda: "a" in sink.there, "the change")
    assert any("503" in c for c in sink.complaints)


async def test_a_kind_that_is_not_known_is_empty_where_it_is_optional(server, tmp_path):
    kind = Kind("keda.sh", "v1alpha1", "scaledobjects", optional=True)
    server.absent.add(kind.path("llm-d"))
    async with followed(server, tmp_path, kind) as sink:
        await until(lambda: sink.lists >= 2, "looked for again")
        server.absent.clear()
        await server.put(kind.path("llm-d"), pod("a"))
        await until(lambda: "a" in sink.there, "known now")
    assert sink.complaints == []


async def test_a_refusal_is_told_with_the_servers_words(server, tmp_path):
    server.tokens = {"other"}
    async with followed(server, tmp_path) as sink:
        await until(lambda: bool(sink.complaints), "a complaint")
    assert sink.complaints[0] == "the API server answered 401: Unauthorized"


async def test_there_are_connections_for_every_watch_and_the_lease(server, tmp_path):
    api = await Api.connect(kubeconfig(tmp_path, server.port))
    kinds = [Kind("", "v1", f"things{n}") for n in range(20)]
    tasks = [asyncio.create_task(follow(api, kind, "llm-d", Sink(), lambda *_: None)) for kind in kinds]
    await until(lambda: server.watches == 20, "twenty watches")
    assert (await api.read(PATH))["items"] == []
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await api.close()


async def test_no_cluster_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="give --kubeconfig"):
        await Api.connect(None)
    with pytest.raises(UserError, match="give --kubeconfig"):
        await Api.connect(tmp_path / "missing")
