"""What a watcher keeps over a restart, in a ConfigMap of its own.

An annotation of the scalers would need the right to write to what is watched. The ConfigMap is one named object in the
watcher's namespace, and its resourceVersion keeps a watcher that leads no longer from writing over the next one's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from http import HTTPStatus

from kubernetes.aio.client.exceptions import ApiException
from pydantic import ValidationError

from llmtrace.autoscale.kubernetes.api import Api
from llmtrace.autoscale.kubernetes.ledger import State
from llmtrace.autoscale.kubernetes.objects import Object, get
from llmtrace.errors import UserError

_log = logging.getLogger(__name__)

KEY = "state.json"
MOST_BYTES = 900_000
"""A ConfigMap holds 1 MiB at most; of more, the oldest decisions are given up."""


class LostError(Exception):
    """Another watcher has written the state."""


class Store:
    """The state's ConfigMap. Methods may raise what is in :data:`~llmtrace.autoscale.kubernetes.api.FAULTS`."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self._api = api
        self._folder = f"/api/v1/namespaces/{namespace}/configmaps"
        self._path = f"{self._folder}/{name}"
        self._object: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
        self._written = ""
        self._saved: set[str] = set()
        self._saving = asyncio.Lock()

    def holds(self, decision_id: str) -> bool:
        """Whether a decision was in the state that was written last."""
        return decision_id in self._saved

    async def load(self) -> State:
        """The state of the last watcher, or a new one that begins now; UserError where it cannot be read."""
        try:
            self._object = await self._api.read(self._path)
        except ApiException as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            state = State(since_ns=time.time_ns() // 10**9 * 10**9)
            self._object = await self._api.create(self._folder, self._body(state.model_dump_json()))
            return state
        text = get(self._object, "data", KEY)
        if text is None:
            return State(since_ns=time.time_ns() // 10**9 * 10**9)
        try:
            return State.model_validate_json(text)
        except ValidationError:
            raise UserError(
                f"the state in {self._path} is not one of this version: delete that ConfigMap to begin anew"
            ) from None

    async def save(self, state: State) -> None:
        """Write the state if it changed; raises LostError where another has."""
        async with self._saving:
            text = state.model_dump_json()
            while len(text) > MOST_BYTES and state.decisions:
                _log.warning("%s: given up, there are too many to keep", state.decisions.pop(0).id)
                text = state.model_dump_json()
            if text == self._written:
                return
            try:
                self._object = await self._api.replace(self._path, self._body(text))
            except ApiException as error:
                if error.status == HTTPStatus.CONFLICT:
                    raise LostError from None
                raise
            self._written, self._saved = text, {d.id for d in state.decisions}

    def _body(self, text: str) -> Object:
        return self._object | {"data": {KEY: text}}
