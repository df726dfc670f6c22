"""Which model servers a scenario has, and on which ports: the same for the playbook and for ``llmtrace doctor``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmtrace.errors import UserError

SCENARIOS = ("prefix-cache", "pd-disaggregation", "wide-ep", "autoscaling")
"""Those with a topology of their own."""
DISAGGREGATED, WIDE, AUTOSCALED = "pd-disaggregation", "wide-ep", "autoscaling"

Role = Literal["both", "prefill", "decode"]


@dataclass(frozen=True)
class ModelServer:
    """A model server on 127.0.0.1.

    ``role`` is what llm-d's label ``llm-d.ai/role`` says, ``both`` where there is no such label. A decode server has a
    ``sidecar_port`` before it, and every server that moves KV a ``side_channel_port`` for NIXL's handshake. One in
    ``standby`` is defined and not started: a scaler does that.
    """

    name: str
    role: Role
    port: int
    sidecar_port: int | None = None
    side_channel_port: int | None = None
    standby: bool = False

    @property
    def endpoint_port(self) -> int:
        """The port to which requests for this server go."""
        return self.sidecar_port or self.port


def model_servers(variables: Mapping[str, object]) -> list[ModelServer]:
    """The model servers that an inventory's variables describe.

    Reads ``scenario``, ``vllm_servers``, ``prefill_servers``, ``autoscaling_min_servers``, ``vllm_base_port``,
    ``vllm_side_channel_base_port`` and ``sidecar_base_port``. Raises UserError for a value that cannot be.
    """
    scenario = known_scenario(variables["scenario"])
    count = whole_number(variables, "vllm_servers")
    base = whole_number(variables, "vllm_base_port")
    if scenario == WIDE:
        return [ModelServer("moe-0", "both", base)]  # one server; its ranks are processes of it
    if scenario == AUTOSCALED:
        fewest = whole_number(variables, "autoscaling_min_servers")
        if fewest > count:
            raise UserError(
                f"autoscaling_min_servers is {fewest} of {count} vllm_servers: raise vllm_servers, or lower "
                "autoscaling_min_servers"
            )
        return [ModelServer(f"vllm-{n}", "both", base + n, standby=n >= fewest) for n in range(count)]
    if scenario != DISAGGREGATED:
        return [ModelServer(f"vllm-{index}", "both", base + index) for index in range(count)]
    prefill = whole_number(variables, "prefill_servers")
    if prefill >= count:
        raise UserError(
            f"prefill_servers is {prefill} of {count} vllm_servers, so that no decode server is left: "
            "raise vllm_servers, or lower prefill_servers"
        )
    channel = whole_number(variables, "vllm_side_channel_base_port")
    sidecar = whole_number(variables, "sidecar_base_port")
    return [
        ModelServer(
            name=f"prefill-{index}" if index < prefill else f"decode-{index - prefill}",
            role="prefill" if index < prefill else "decode",
            port=base + index,
            sidecar_port=None if index < prefill else sidecar + index - prefill,
            side_channel_port=channel + index,
        )
        for index in range(count)
    ]


def known_scenario(value: object) -> str:
    """``value`` if it names a scenario that the local profile can stand up."""
    if value not in SCENARIOS:
        *others, last = SCENARIOS
        raise UserError(f"there is no scenario {value!r} to stand up: set scenario to {', '.join(others)} or {last}")
    return str(value)


def whole_number(variables: Mapping[str, object], name: str) -> int:
    """The variable ``name``, which must be a whole number from 1 to 65535."""
    value = variables[name]
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if not 0 < number < 65536:
        raise UserError(f"{name} is {value!r}: set it to a whole number from 1 to 65535")
    return number
