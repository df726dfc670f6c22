"""The endpoints of the inference pool and what is known about their load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

STALE_AFTER_S = 5.0
"""An endpoint that answered no scrape for this long is not ready."""


@dataclass(slots=True)
class Load:
    """Load of a model server as its metrics tell. ``kv_cache_usage`` is a share from 0 to 1.

    ``waiting_known`` says whether they told the number of waiting requests at all; schedulers take 0 otherwise.
    """

    waiting: int = 0
    running: int = 0
    kv_cache_usage: float = 0.0
    block_size: int = 0
    num_blocks: int = 0
    waiting_known: bool = field(default=False, compare=False)


@dataclass(slots=True, eq=False)
class Endpoint:
    """A model server.

    ``id`` is namespace/name, ``address`` host:port. ``answered_at`` is the monotonic time of the last answer to a
    scrape, in seconds; None before the first and after a refused connection. ``in_flight`` are requests that were sent
    to it and whose exchange goes on.
    """

    name: str
    namespace: str
    host: str
    port: str
    labels: Mapping[str, str] = field(default_factory=dict)
    load: Load = field(default_factory=Load)
    answered_at: float | None = None
    in_flight: int = 0
    id: str = field(init=False)
    address: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.namespace}/{self.name}"
        self.address = f"{self.host}:{self.port}"

    def ready(self, now: float | None = None) -> bool:
        """Whether the endpoint answered a scrape lately."""
        if self.answered_at is None:
            return False
        return (time.monotonic() if now is None else now) - self.answered_at <= STALE_AFTER_S


class Pool:
    """The endpoints by id, as discovery last told."""

    def __init__(self, name: str, namespace: str = "default") -> None:
        self.name = name
        self.namespace = namespace
        self._endpoints: dict[str, Endpoint] = {}
        self._on_removal: list[Callable[[str], None]] = []

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(list(self._endpoints.values()))

    def __len__(self) -> int:
        return len(self._endpoints)

    def on_removal(self, listener: Callable[[str], None]) -> None:
        """Call ``listener`` with the id of every endpoint that leaves the pool."""
        self._on_removal.append(listener)

    def replace(self, endpoints: Iterable[Endpoint]) -> None:
        """Make these the pool's endpoints; one that stays as it was keeps what is known about its load."""
        incoming: dict[str, Endpoint] = {}
        for endpoint in endpoints:
            known = self._endpoints.get(endpoint.id)
            if known is not None and known.address == endpoint.address:
                known.labels = endpoint.labels
                endpoint = known
            incoming[endpoint.id] = endpoint
        # A server at another address has another cache.
        removed = [id_ for id_, old in self._endpoints.items() if incoming.get(id_) is not old]
        self._endpoints = incoming
        for id_ in removed:
            for listener in self._on_removal:
                listener(id_)

    def ready(self, hosts: frozenset[str] | None = None) -> list[Endpoint]:
        """The endpoints that can serve now; with ``hosts`` only those on one of these addresses."""
        now = time.monotonic()
        return [e for e in self._endpoints.values() if e.ready(now) and (hosts is None or e.host in hosts)]
