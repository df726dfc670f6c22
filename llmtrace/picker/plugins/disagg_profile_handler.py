"""disagg-profile-handler: a decode server for every request, and for some a prefill server as well.

Beyond llm-d, the span prepare_disaggregation says why a request was split or not, with the numbers behind it.

Source: llm-d-router, profilehandler/disagg/disagg_profile_handler.go.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmtrace.picker.disaggregation import Decision, PrefillDecider, Reason, Verdict
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import (
    PREFILL_PROFILE,
    REGISTRY,
    Handle,
    Others,
    Parameters,
    ProfileHandler,
    ProfileResult,
    SchedulingResult,
)
from llmtrace.picker.request import InferenceRequest, no_result
from llmtrace.semconv import attributes as a
from llmtrace.spans import Attributes, Span

SCOPE = "llm-d-router/pkg/epp/framework/plugins/scheduling"
DECODE_PROFILE = "decode"
FLAT_NAMES = {
    "decodeProfile": ("profiles", "decode"),
    "prefillProfile": ("profiles", "prefill"),
    "encodeProfile": ("profiles", "encode"),
    "deciderPluginName": ("deciders", "prefill"),
    "prefillDeciderPluginName": ("deciders", "prefill"),
    "encodeDeciderPluginName": ("deciders", "encode"),
}
"""llm-d's deprecated names of the parameters. Of two for the same thing, the later one counts."""
STAGE_ORDERS = {
    **dict.fromkeys(("", "decode", "decodefirst"), "decode-first"),
    **dict.fromkeys(("prefill", "prefillfirst"), "prefill-first"),
}
"""What may be written for each stage order, without hyphens, underscores and capitals."""
NO_DECIDER = Verdict(False, Reason.NO_DECIDER)

_log = logging.getLogger(__name__)


class _Stages(Parameters):
    """Names by stage; an empty one is like one left out."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, dict) and "encode" in given:
            raise ValueError(
                "the embedded picker has no stage encode: remove it, or run llm-d's own EPP by picker_binary"
            )
        return {stage: name for stage, name in given.items() if name != ""} if isinstance(given, dict) else given


class Profiles(_Stages):
    """Names of the scheduling profiles."""

    decode: str = DECODE_PROFILE
    prefill: str = PREFILL_PROFILE

    @model_validator(mode="after")
    def _distinct(self) -> Profiles:
        if self.decode == self.prefill:
            raise ValueError("decode and prefill must be two scheduling profiles")
        return self


class Deciders(_Stages):
    """Name of the plugin that decides about prefill; none: no request is split."""

    prefill: str = ""


class DisaggProfileHandlerParameters(Parameters):
    """llm-d's parameters, and one of the kit's, which llm-d's own EPP refuses.

    ``stage_order`` prefill-first splits every request, and runs the decode profile after the prefill profile.
    ``keep_traces``, the kit's: reasons of decisions whose traces the Collector's sampling shall keep.
    """

    stage_order: Literal["decode-first", "prefill-first"] = "decode-first"
    profiles: Profiles = Field(default_factory=Profiles)
    deciders: Deciders = Field(default_factory=Deciders)
    keep_traces: list[Annotated[Reason, Field(strict=False)]] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not (flat := [name for name in FLAT_NAMES if name in given]):
            return given
        if "profiles" in given or "deciders" in given:
            raise ValueError(f"profiles and deciders cannot stand beside their deprecated form, here {flat[0]}")
        _log.warning("disagg-profile-handler: llm-d deprecates %s; use profiles and deciders", ", ".join(flat))
        nested: dict[str, Any] = {key: value for key, value in given.items() if key not in FLAT_NAMES}
        for name in flat:
            group, stage = FLAT_NAMES[name]
            if given[name] != "":
                nested.setdefault(group, {})[stage] = given[name]
        return nested

    @field_validator("stage_order", mode="before")
    @classmethod
    def _order(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        return STAGE_ORDERS.get(given.lower().replace("-", "").replace("_", ""), given)

    @model_validator(mode="after")
    def _undecided(self) -> DisaggProfileHandlerParameters:
        if self.stage_order == "prefill-first" and self.deciders.prefill:
            raise ValueError("stageOrder prefill-first splits every request: remove deciders.prefill")
        return self


@REGISTRY.register
class DisaggProfileHandler(ProfileHandler[DisaggProfileHandlerParameters]):
    """Runs the decode profile, asks the decider, and runs the prefill profile where it says so."""

    type: ClassVar[str] = "disagg-profile-handler"
    parameters_type = DisaggProfileHandlerParameters

    def __init__(self, name: str, parameters: DisaggProfileHandlerParameters, handle: Handle) -> None:
        super().__init__(name, parameters, handle)
        self._decode, self._prefill = parameters.profiles.decode, parameters.profiles.prefill
        self._decider: PrefillDecider[Any] | None = None

    def connect(self, others: Others) -> None:
        """There must be the profiles that it may come to run, and the decider."""
        where = f"plugin {self.name!r}"
        others.profile(self._decode, f"{where}: profiles.decode")
        if decider := self.parameters.deciders.prefill:
            self._decider = others.find(decider, PrefillDecider, f"{where}: deciders.prefill", "a decider")
            others.profile(self._prefill, f"{where}: profiles.prefill")

    def pick(
        self,
        request: InferenceRequest,
        profiles: Collection[str],
        results: Mapping[str, ProfileResult | None],
        parent: Span,
    ) -> Collection[str]:
        """The next stage's profile. Each step has a span of its own, as in llm-d."""
        with _child(parent, a.PD_PROFILE_SPAN) as span:
            picked, decision = self._next(request, profiles, results)
            if span.recording:
                span.attributes = {**_about(request), a.PROFILE_DECISION: decision}
                if decision == "complete":
                    span.attributes[a.DECODE_FAILED] = True
        return picked

    def _next(
        self, request: InferenceRequest, profiles: Collection[str], results: Mapping[str, ProfileResult | None]
    ) -> tuple[Collection[str], str]:
        """Profiles to run, and llm-d's word for the step."""
        prefill_is_open = self._prefill in profiles and self._prefill not in results
        if prefill_is_open and self.parameters.stage_order == "prefill-first":
            request.data[self.name] = Verdict(True, Reason.ALWAYS)
            return [self._prefill], "run_prefill"
        if self._decode not in results:
            return [self._decode], "run_decode"
        decode = results[self._decode]
        if decode is None:
            return [], "complete"
        if prefill_is_open and self._decider is not None:
            verdict = request.data[self.name] = self._decider.decide(request, decode.endpoints[0])
            if verdict.split:
                return [self._prefill], "run_prefill"
        used = "prefill-decode" if results.get(self._prefill) else "decode-only"
        self.handle.metrics.disaggregated(self.name, self.type, request.model, used)
        return [], f"complete_{used}"

    def process(self, request: InferenceRequest, results: Mapping[str, ProfileResult | None]) -> SchedulingResult:
        """The decode server gets the request."""
        if results.get(self._decode) is None:
            raise no_result("failed to find available decode workers")
        found = {name: result for name, result in results.items() if result is not None}
        return SchedulingResult(found, self._decode)

    def prepare(self, request: InferenceRequest, result: SchedulingResult, parent: Span) -> Mapping[str, str]:
        """Name the prefill server to the decode server's sidecar."""
        prefill = result.profiles[self._prefill].endpoints[0] if self._prefill in result.profiles else None
        with _child(parent, a.PD_SPAN) as span:
            if span.recording:
                span.attributes = {
                    **_about(request),
                    **_used(prefill),
                    **self._explained(request, result.endpoints[0], prefill),
                }
        return {a.PREFILLER_HEADER: prefill.address} if prefill else {}

    def _explained(self, request: InferenceRequest, decode: Endpoint, prefill: Endpoint | None) -> Attributes:
        """What llm-d leaves out: the decision's reason and inputs."""
        verdict: Verdict = request.data.get(self.name, NO_DECIDER)
        missed = verdict.split and prefill is None
        reason = Reason.NO_PREFILL_ENDPOINT if missed else verdict.reason
        told: dict[str, str | int | None] = {
            a.PD_DECISION: (Decision.SPLIT if prefill else Decision.UNIFIED).value,
            a.PD_REASON: reason.value,
            a.SAMPLING_KEEP: True if reason in self.parameters.keep_traces else None,
            a.PD_DECIDER: self._decider.type if self._decider else None,
            a.PD_PROMPT_TOKENS: verdict.prompt_tokens,
            a.PD_CACHED_TOKENS: verdict.cached_tokens,
            a.PD_THRESHOLD_TOKENS: verdict.threshold_tokens,
            a.PD_MINIMUM_PROMPT_TOKENS: verdict.minimum_prompt_tokens,
            a.PD_DECODE_ENDPOINT: decode.id,
            a.PD_PREFILL_ENDPOINT: prefill.id if prefill else None,
            a.PD_DECODE_WAITING: _waiting(decode),
            a.PD_PREFILL_WAITING: _waiting(prefill) if prefill else None,
        }
        return {key: value for key, value in told.items() if value is not None}


def _child(parent: Span, name: str) -> Span:
    return parent.child(name, tracer=parent.tracer.scoped(SCOPE))


def _about(request: InferenceRequest) -> Attributes:
    about: Attributes = {
        a.REQUEST_ID: request.id,
        a.MM_MODALITY: ",".join(sorted(set(request.modalities))) or "none",
        a.MM_HASH_COUNT: len(request.modalities),
    }
    if request.model:
        about[a.REQUEST_MODEL] = request.model
    return about


def _used(prefill: Endpoint | None) -> Attributes:
    """llm-d's own account."""
    encode: Attributes = {a.EPP_ENCODE_USED: False, a.EPP_ENCODE_REASON: "no_encode_profile_result"}
    if prefill is None:
        return {a.EPP_PD_USED: False, a.EPP_PD_REASON: "no_prefill_profile_result", **encode}
    return {a.EPP_PD_USED: True, a.EPP_PD_ADDRESS: prefill.host, a.EPP_PD_PORT: prefill.port, **encode}


def _waiting(endpoint: Endpoint) -> int | None:
    return endpoint.load.waiting if endpoint.load.waiting_known else None
