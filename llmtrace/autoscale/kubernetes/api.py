"""The API server: requests, and watches that go on where they were.

The official client has authentication, TLS and the reading of a watch. What to do when a watch ends is here, since it
decides what may be missed: a watch that ends goes on from the last resourceVersion; where that is gone (410), all
objects are listed again, and what is no longer among them was deleted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config
from kubernetes.aio.watch import Watch

from llmtrace.autoscale.kubernetes.objects import Object, get
from llmtrace.errors import UserError

REQUEST_S = 10.0
WATCH_S = 60
"""How long a watch lasts; the server ends it then, and it goes on. A connection that died in silence is noticed at
the latest after this time."""
PAGE = 500
ABSENT_S = 300.0
"""How often to look whether an optional kind has come to be known."""
MOST_FAILURES = 5
"""After so many failures one after the other, everything is listed again."""
LONGEST_WAIT_S = 30.0

FAULTS = (ApiException, aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What a request may raise."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of objects that is watched. ``only`` is a field selector; one that is ``optional`` need not be known."""

    group: str
    version: str
    plural: str
    only: str = ""
    optional: bool = False

    def path(self, namespace: str) -> str:
        """The path of its objects: in a namespace, or in all."""
        base = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{base}/namespaces/{namespace}/{self.plural}" if namespace else f"{base}/{self.plural}"


class Api:
    """The API server, as JSON. Every method may raise what is in :data:`FAULTS`."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, kubeconfig: Path | None) -> Api:
        """Use a kubeconfig, or without one the service account of the pod; raises UserError."""
        configuration = Configuration()
        try:
            if kubeconfig is None:
                load_incluster_config(client_configuration=configuration)
            else:
                await load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
        except (ConfigException, OSError, ValueError) as error:
            raise UserError(
                f"the cluster is not known ({error}): run in a pod with a service account, or give --kubeconfig"
            ) from None
        return cls(ApiClient(configuration))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def read(self, path: str, **query: str | int) -> Object:
        """GET."""
        return await self._json("GET", path, query)

    async def create(self, path: str, body: Object) -> Object:
        """POST."""
        return await self._json("POST", path, {}, body)

    async def replace(self, path: str, body: Object) -> Object:
        """PUT: 409 where the object is no longer what ``metadata.resourceVersion`` says."""
        return await self._json("PUT", path, {}, body)

    async def every(self, kind: Kind, namespace: str) -> tuple[list[Object], str]:
        """All objects of a kind, and the resourceVersion from which to watch."""
        items: list[Object] = []
        query: dict[str, str | int] = {"limit": PAGE} | ({"fieldSelector": kind.only} if kind.only else {})
        while True:
            page = await self.read(kind.path(namespace), **query)
            items += get(page, "items", default=[])
            if not (rest := get(page, "metadata", "continue", default="")):
                return items, str(get(page, "metadata", "resourceVersion", default=""))
            query["continue"] = rest

    async def watch(self, kind: Kind, namespace: str, version: str, take: Callable[[str, Object], None]) -> str:
        """Hand every change after ``version`` to ``take`` until the watch ends; returns the version to go on from.

        Bookmarks move that version on where nothing changes. What the watch is told of as an error is raised.
        """
        watch = Watch(return_type="object")

        async def begin(**query: str | int) -> aiohttp.ClientResponse:
            query |= {"fieldSelector": kind.only} if kind.only else {}
            del query["_preload_content"]
            return await self._send("GET", kind.path(namespace), _camel(query), timeout_s=WATCH_S * 1.5)

        try:
            async for event in watch.stream(
                begin, resource_version=version, allow_watch_bookmarks="true", timeout_seconds=WATCH_S
            ):
                if not isinstance(event, dict):
                    break  # The connection ended within a line.
                if event["type"] != "BOOKMARK":
                    take(event["type"], event["raw_object"])
        except FAULTS as error:
            raise _InterruptedError(watch.resource_version or version) from error
        finally:
            await watch.close()
        return str(watch.resource_version or version)

    async def _json(self, method: str, path: str, query: dict[str, str | int], body: Object | None = None) -> Object:
        response = await self._send(method, path, query, body)
        async with response:
            text = await response.text()
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise ApiException(status=response.status, reason=_said(text) or response.reason)
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"{path} gave no object")  # noqa: TRY004  # a fault of the server's
        return found

    async def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str | int],
        body: Object | None = None,
        timeout_s: float = REQUEST_S,
    ) -> aiohttp.ClientResponse:
        request = await self._client.param_serialize(
            method, path, query_params=list(query.items()), body=body, auth_settings=["BearerToken"]
        )
        limits = aiohttp.ClientTimeout(total=timeout_s, connect=REQUEST_S)
        answer = await self._client.call_api(*request, _request_timeout=limits)
        response: aiohttp.ClientResponse = answer.response
        return response


class _InterruptedError(Exception):
    """A watch that failed; its cause says why. ``version`` is where it goes on."""

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.version = version


class Sink(Protocol):
    """What takes the objects of a kind."""

    def replace(self, kind: Kind, items: Iterable[Object]) -> None:
        """These are all there are."""

    def change(self, kind: Kind, event: str, item: Object) -> None:
        """One was ADDED, MODIFIED or DELETED; the same may be told more than once."""


async def follow(
    api: Api,
    kind: Kind,
    namespace: str,
    sink: Sink,
    complain: Callable[[str, str], None],
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
) -> None:
    """Keep ``sink`` up to date for good. ``complain`` gets what is followed and what went wrong, '' when it is well."""
    version, failures = "", 0
    while True:
        try:
            if not version:
                items, version = await api.every(kind, namespace)
                sink.replace(kind, items)
            version = await api.watch(kind, namespace, version, lambda event, item: sink.change(kind, event, item))
        except (*FAULTS, _InterruptedError) as error:
            cause = error
            if isinstance(error, _InterruptedError):
                version = error.version
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            status = cause.status if isinstance(cause, ApiException) else None
            if kind.optional and status == HTTPStatus.NOT_FOUND:
                sink.replace(kind, ())
                version = ""
                await sleep(ABSENT_S)
                continue
            failures += 1
            if status == HTTPStatus.GONE or failures % MOST_FAILURES == 0:
                version = ""
            if status == HTTPStatus.GONE:
                _log.info("%s: changes were missed and are gone; all of them are listed again", kind.plural)
            else:
                complain(kind.plural, said(cause))
            if status != HTTPStatus.GONE or failures > 1:
                await sleep(min(2.0 ** min(failures - 1, 10), LONGEST_WAIT_S) * random.uniform(0.5, 1.0))
        else:
            failures = 0
            complain(kind.plural, "")


def said(error: BaseException) -> str:
    """A failed request in a few words."""
    if isinstance(error, ApiException):
        return f"the API server answered {error.status}: {error.reason}"
    if isinstance(error, TimeoutError):
        return "the API server did not answer in time"
    return f"the API server cannot be reached ({type(error).__name__}: {error})"


def _said(text: str) -> str:
    try:
        return str(get(json.loads(text), "message", default=""))
    except ValueError:
        return ""


def _camel(query: dict[str, str | int | bool]) -> dict[str, str | int]:
    """Names of the query's parameters as the API has them."""
    names = {
        "resource_version": "resourceVersion",
        "allow_watch_bookmarks": "allowWatchBookmarks",
        "timeout_seconds": "timeoutSeconds",
    }
    return {names.get(k, k): "true" if v is True else v for k, v in query.items()}
