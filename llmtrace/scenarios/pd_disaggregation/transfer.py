"""What moving KV from prefill to decode servers cost."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.pd_disaggregation.requests import Handled
from llmtrace.stats import Distribution, distribution


class TransferTotal(BaseModel):
    """The transfers from one server to another. None where the traces do not tell.

    ``wait`` is what requests waited for their KV, up to the engine step that noticed it, ``transfer`` the transfers
    alone, both in ms; ``ttft_share`` is the wait as a share of the time to first token. ``bytes_per_s`` is that of
    the transfers alone.
    """

    model_config = ConfigDict(frozen=True)
    source: str
    target: str
    transfers: int
    failed: int
    tokens: int
    blocks: int | None
    bytes: int | None
    wait: Distribution | None
    transfer: Distribution | None
    ttft_share: Distribution | None
    bytes_per_s: float | None


def transfer_totals(requests: Iterable[Handled]) -> list[TransferTotal]:
    """The transfers of all requests, by pair of servers."""
    pairs: dict[tuple[str, str], list[Handled]] = {}
    for request in requests:
        prefill, decode = request.legs.prefill, request.legs.decode
        if decode is not None and decode.load is not None:
            source = prefill.server if prefill is not None else decode.load.remote_engine_id
            pairs.setdefault((source or "unknown", decode.server), []).append(request)
    return [_total(source, target, moved) for (source, target), moved in sorted(pairs.items())]


def ttft_share(request: Handled) -> float | None:
    """The wait for KV as a share of the client's time to first token."""
    load = request.legs.decode.load if request.legs.decode else None
    ttft = request.served.ttft_ms
    return load.wait_ms / ttft if load is not None and ttft else None


def _total(source: str, target: str, moved: list[Handled]) -> TransferTotal:
    loads = [r.legs.decode.load for r in moved if r.legs.decode is not None and r.legs.decode.load is not None]
    timed = [(load.bytes, load.transfer_ms) for load in loads if load.bytes is not None and load.transfer_ms]
    seconds = sum(ms for _, ms in timed) / 1e3
    return TransferTotal(
        source=source,
        target=target,
        transfers=len(loads),
        failed=sum(load.failed for load in loads),
        tokens=sum(load.tokens or 0 for load in loads),
        blocks=_sum([load.blocks for load in loads]),
        bytes=_sum([load.bytes for load in loads]),
        wait=distribution([load.wait_ms for load in loads]),
        transfer=distribution([load.transfer_ms for load in loads if load.transfer_ms is not None]),
        ttft_share=distribution([share for r in moved if (share := ttft_share(r)) is not None]),
        bytes_per_s=sum(size for size, _ in timed) / seconds if seconds else None,
    )


def _sum(values: list[int | None]) -> int | None:
    """The sum, None where a value is not told."""
    told = [value for value in values if value is not None]
    return sum(told) if len(told) == len(values) else None
