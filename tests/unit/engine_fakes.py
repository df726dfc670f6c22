"""A scheduler and its messages as vLLM has them, as far as llmtrace.engine looks at them."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-1] + "0"


class EventType(enum.IntEnum):
    QUEUED = 1
    SCHEDULED = 2
    PREEMPTED = 3


class Status(enum.IntEnum):
    WAITING = 1
    WAITING_FOR_REMOTE_KVS = 2
    RUNNING = 3
    PREEMPTED = 4
    FINISHED_STOPPED = 5
    FINISHED_ABORTED = 6
    FINISHED_ERROR = 7


class Reason(enum.IntEnum):
    STOP = 0
    ABORT = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


REASONS = {
    Status.FINISHED_STOPPED: Reason.STOP,
    Status.FINISHED_ABORTED: Reason.ABORT,
    Status.FINISHED_ERROR: Reason.ERROR,
}


@dataclass(eq=False)
class Request:
    request_id: str
    trace_headers: dict[str, str] | None = field(default_factory=lambda: {"traceparent": SAMPLED})
    num_prompt_tokens: int = 300
    client_index: int = 0
    arrival_time: float = 1_000_000.0
    status: Status = Status.WAITING
    events: list[Any] = field(default_factory=list)
    is_prefill_chunk: bool = False
    num_computed_tokens: int = 0
    num_tokens: int = 300
    use_structured_output: bool = False
    lora_request: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    prefill_stats: Any = field(
        default_factory=lambda: SimpleNamespace(
            num_computed_tokens=172, num_local_cached_tokens=128, num_external_cached_tokens=0
        )
    )

    def is_finished(self) -> bool:
        return self.status > Status.PREEMPTED

    def get_finished_reason(self) -> Reason | None:
        return REASONS.get(self.status)

    def record(self, kind: EventType, timestamp: float) -> None:
        self.events.append(SimpleNamespace(type=kind, timestamp=timestamp))


@dataclass
class Output:
    request_id: str
    new_token_ids: list[int]
    finish_reason: Any = None
    trace_headers: dict[str, str] | None = None


@dataclass
class Outputs:
    outputs: list[Output] = field(default_factory=list)
    timestamp: float = 0.0


@dataclass
class Step:
    """A SchedulerOutput."""

    num_scheduled_tokens: dict[str, int]
    scheduled_new_reqs: list[Any] = field(default_factory=list)
    preempted_req_ids: set[str] | None = None
    finished_req_ids: set[str] = field(default_factory=set)
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    num_invalid_spec_tokens: dict[str, int] | None = None

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


class Scheduler:
    """Does what it is told, step by step: the tests are the scheduling policy."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_index=2),
            kv_transfer_config=None,
            instance_id="engine-a",
        )
        self.requests: dict[str, Request] = {}
        self.waiting: Iterable[Request] = deque()
        self.connector: Any = None
        self.block_size = 128
        self.finished_recving_kv_req_ids: set[str] = set()
        self.failed_recving_kv_req_ids: set[str] = set()
        self.counts = (0, 0)
        self.steps: deque[Step] = deque()
        self.messages: dict[int, Outputs] = {}

    def get_request_counts(self) -> tuple[int, int]:
        return self.counts

    def get_kv_cache_usage(self) -> float:
        return 0.25

    def add_request(self, request: Request) -> None:
        self.requests[request.request_id] = request

    def schedule(self, throttle_prefills: bool = False) -> Step:
        return self.steps.popleft()

    def update_from_output(self, scheduler_output: Step, model_runner_output: Any) -> dict[int, Outputs]:
        messages, self.messages = self.messages, {}
        return messages

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Status) -> list[Request]:
        if request_ids is None:
            ids = list(self.requests)
        else:
            ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        gone = [self.requests.pop(request_id) for request_id in ids if request_id in self.requests]
        for request in gone:
            request.status = finished_status
        return gone


class Store:
    """torch.distributed.Store, as far as it is used: set only if it is what was expected, the empty string where it is
    not set.
    """

    def __init__(self, **values: bytes) -> None:
        self.values = values
        self.counts: dict[str, int] = {}
        self.asked = 0
        self.broken = False

    def clone(self) -> Store:
        return self

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.asked += 1
        if self.broken:
            raise ConnectionError("the store is gone")
        if self.values.get(key, b"") == expected.encode():
            self.values[key] = desired.encode()
        return self.values[key]

    def add(self, key: str, value: int) -> int:
        self.counts[key] = self.counts.get(key, 0) + value
        return self.counts[key]

    def delete_key(self, key: str) -> bool:
        return self.counts.pop(key, None) is not None
