"""Leader election by a Lease: of several watchers one works.

The client library's election neither survives an API server that cannot be reached (its exception ends the election,
and the work goes on without a lease) nor gives the lease back, so that every restart would wait for it to expire.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from http import HTTPStatus

from kubernetes.aio.client.exceptions import ApiException

from llmtrace.autoscale.kubernetes.api import FAULTS, Api, said
from llmtrace.autoscale.kubernetes.objects import Object, get, micro_time

_log = logging.getLogger(__name__)


class Lease:
    """A lease of coordination.k8s.io/v1.

    It counts as held for ``duration_s`` seconds after its last renewal, as seen here: clocks need not agree. Whoever
    holds it stops after two thirds of that without a renewal.
    """

    def __init__(self, api: Api, namespace: str, name: str, identity: str, duration_s: float = 15.0) -> None:
        self._api = api
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name = name
        self._identity = identity
        self._duration_s = duration_s
        self._retry_s = duration_s / 7
        self._seen: tuple[object, object] = (None, None)
        self._seen_at = 0.0
        self._renewed = -math.inf
        self._failure = ""

    @property
    def held(self) -> bool:
        """Whether nobody else can have it yet; not so for a process that was stopped for a while, before it notices."""
        return time.monotonic() - self._renewed < self._duration_s * 2 / 3

    async def acquire(self) -> None:
        """Wait until the lease is held."""
        while not await self._try():  # noqa: ASYNC110  # the lease is the server's
            await asyncio.sleep(self._retry_s)
        _log.info("%s leads", self._identity)

    async def hold(self) -> None:
        """Renew the lease; returns when it is lost."""
        while self.held:
            await asyncio.sleep(self._retry_s)
            if not await self._try() and self._seen[0] not in (self._identity, "", None):
                break
        self._renewed = -math.inf
        _log.warning("%s leads no longer", self._identity)

    async def release(self) -> None:
        """Give the lease back, if it is held, so that another need not wait for its end."""
        try:
            async with asyncio.timeout(self._retry_s):
                lease = await self._api.read(f"{self._path}/{self._name}")
                if get(lease, "spec", "holderIdentity") == self._identity:
                    lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                    await self._api.replace(f"{self._path}/{self._name}", lease)
        except FAULTS as error:
            _log.warning("the lease %s cannot be given back: %s", self._name, said(error))

    async def _try(self) -> bool:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._duration_s / 2):
                taken = await self._take()
        except FAULTS as error:
            why = "" if isinstance(error, ApiException) and error.status == HTTPStatus.CONFLICT else said(error)
            if why and why != self._failure:
                _log.warning("the lease %s cannot be had: %s", self._name, why)
            self._failure = why or self._failure
            return False
        self._failure = ""
        if taken:
            self._renewed = begun
        return taken

    async def _take(self) -> bool:
        """Create, take over or renew the lease; False where another holds it."""
        try:
            lease = await self._api.read(f"{self._path}/{self._name}")
        except ApiException as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            await self._api.create(
                self._path,
                {
                    "apiVersion": "coordination.k8s.io/v1",
                    "kind": "Lease",
                    "metadata": {"name": self._name},
                    "spec": self._spec({}),
                },
            )
            return True
        spec = get(lease, "spec", default={})
        now = get(spec, "holderIdentity"), get(spec, "renewTime")
        if now != self._seen:
            self._seen, self._seen_at = now, time.monotonic()
        lasts = float(get(spec, "leaseDurationSeconds", default=self._duration_s))
        if now[0] and now[0] != self._identity and time.monotonic() - self._seen_at < lasts:
            return False
        lease["spec"] = self._spec(spec)
        await self._api.replace(f"{self._path}/{self._name}", lease)
        self._seen = self._identity, lease["spec"]["renewTime"]
        return True

    def _spec(self, old: Object) -> Object:
        now = micro_time(time.time())
        mine = old.get("holderIdentity") == self._identity
        changes = int(old.get("leaseTransitions") or 0)
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(round(self._duration_s), 1),
            "acquireTime": old.get("acquireTime") if mine else now,
            "renewTime": now,
            "leaseTransitions": changes if mine or not old else changes + 1,
        }
