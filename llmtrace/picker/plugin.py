"""What a plugin of the picker is: llm-d's extension points, and the registry of plugin types."""

from __future__ import annotations

import builtins
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

if TYPE_CHECKING:
    from llmtrace.picker.endpoints import Endpoint, Pool
    from llmtrace.picker.metrics import Metrics
    from llmtrace.picker.request import InferenceRequest
    from llmtrace.spans import Attributes, Span, Tracer

PREFILL_PROFILE = "prefill"
"""Name of the profile whose endpoint has the prompt as well: llm-d's producers go by it, whatever the handler's is."""


class Parameters(BaseModel):
    """Base of a plugin's parameters: llm-d's names and defaults, nothing else allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, strict=True)


ParametersT = TypeVar("ParametersT", bound=Parameters)


class Handle(Protocol):
    """What the picker offers to its plugins."""

    @property
    def pool(self) -> Pool:
        """The inference pool."""

    @property
    def metrics(self) -> Metrics:
        """The picker's own metrics."""

    @property
    def tracer(self) -> Tracer:
        """The picker's tracer."""


AnyT = TypeVar("AnyT")


class Others(Protocol):
    """The rest of a configuration, as a plugin finds it when every plugin is made."""

    @property
    def profiles(self) -> Collection[str]:
        """Names of the scheduling profiles."""

    def profile(self, name: str, where: str) -> None:
        """See to it that there is a scheduling profile of this name; UserError where there is none."""

    def find(self, name: str, kind: builtins.type[AnyT], where: str, what: str) -> AnyT:
        """The plugin of this name; UserError where there is none, or it is not of ``kind`` (in words: ``what``)."""

    def producer(self, name: str, where: str) -> None:
        """See to it that there is a producer of this name; llm-d's default one is made where it is missing."""

    def of(self, kind: builtins.type[AnyT]) -> list[AnyT]:
        """The plugins of this kind."""

    def add(self, plugin: Plugin[Any]) -> None:
        """One more plugin, under its name."""

    def tokenizer(self, where: str) -> None:
        """See to it that there is a tokenizer; UserError where there is none."""


class Plugin(Generic[ParametersT]):
    """A configured plugin. ``type`` is llm-d's plugin type; ``name`` the configured name.

    ``deprecated_for`` is the type to use instead of one that llm-d deprecates.
    """

    type: ClassVar[str]
    deprecated_for: ClassVar[str] = ""
    parameters_type: ClassVar[builtins.type[Parameters]] = Parameters

    def __init__(self, name: str, parameters: ParametersT, handle: Handle) -> None:
        self.name = name
        self.parameters = parameters
        self.handle = handle

    def connect(self, others: Others) -> None:
        """Look for what this plugin works with; raises UserError where that is missing or does not fit."""

    async def run(self) -> None:
        """What the plugin does beside requests, until cancelled; by default nothing."""


class Filter(Plugin[ParametersT]):
    """Narrows the candidates of a scheduling profile."""

    def filter(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Those of ``endpoints`` that remain, in their order."""
        raise NotImplementedError


class SaturationDetector(Plugin[ParametersT]):
    """Says how saturated endpoints are. ``stale`` counts those whose metrics were too old the last time."""

    stale = 0

    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        """The saturation of the endpoints together: from 1 on, requests wait."""
        raise NotImplementedError


class Scorer(Plugin[ParametersT]):
    """Scores endpoints from 0 (worst) to 1."""

    def score(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[float]:
        """One score for each of ``endpoints``, in their order."""
        raise NotImplementedError

    def span_attributes(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Attributes:
        """Further attributes of the scorer's span."""
        return {}


class Picker(Plugin[ParametersT]):
    """Picks endpoints by their total scores."""

    def pick(self, endpoints: Sequence[Endpoint], totals: Sequence[float]) -> list[Endpoint]:
        """The picked endpoints, the first choice first, the others as fallbacks; never empty."""
        raise NotImplementedError


class Tokenizer(Plugin[ParametersT]):
    """Finds the tokens of a request's prompts before anything else is done with it."""

    async def tokenize(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        """Put the token ids into ``request.prompts``; where they cannot be had, leave its estimate as it is."""
        raise NotImplementedError


class Producer(Plugin[ParametersT]):
    """Prepares data about a request before it is scheduled, and learns where it went."""

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        """Put the data under the plugin's name into ``request.data``."""
        raise NotImplementedError

    def scheduled(self, request: InferenceRequest, result: SchedulingResult) -> None:
        """The request goes where ``result`` says."""
        raise NotImplementedError


@dataclass(frozen=True)
class ProfileResult:
    """Result of one scheduling profile: the picked endpoints, first choice first."""

    endpoints: list[Endpoint]


@dataclass(frozen=True)
class SchedulingResult:
    """Results by profile name; ``primary`` names the profile whose endpoints get the request."""

    profiles: Mapping[str, ProfileResult]
    primary: str

    @property
    def endpoints(self) -> list[Endpoint]:
        """The endpoints that get the request, first choice first."""
        return self.profiles[self.primary].endpoints

    @property
    def holders(self) -> list[Endpoint]:
        """The endpoints that will have the prompt in their KV cache, the one that gets the request first."""
        prefill = self.profiles.get(PREFILL_PROFILE)
        return [self.endpoints[0], *(prefill.endpoints[:1] if prefill else ())]


class ProfileHandler(Plugin[ParametersT]):
    """Chooses the scheduling profiles to run for a request, step by step, and makes one result of theirs.

    ``results`` are those so far by profile; that of a profile which found no endpoint is None. Spans of the handler
    hang under ``parent``.
    """

    def pick(
        self,
        request: InferenceRequest,
        profiles: Collection[str],
        results: Mapping[str, ProfileResult | None],
        parent: Span,
    ) -> Collection[str]:
        """Names of the profiles to run next, out of ``profiles``; none ends the scheduling."""
        raise NotImplementedError

    def process(self, request: InferenceRequest, results: Mapping[str, ProfileResult | None]) -> SchedulingResult:
        """The overall result; raises RequestError where there is none."""
        raise NotImplementedError

    def prepare(self, request: InferenceRequest, result: SchedulingResult, parent: Span) -> Mapping[str, str]:
        """Headers to set on the request before it goes where ``result`` says."""
        return {}


class Discovery(Plugin[ParametersT]):
    """Finds the pool's endpoints."""

    def load(self) -> None:
        """Fill the pool for the first time; raises UserError where that cannot be done."""
        raise NotImplementedError

    async def watch(self) -> None:
        """Keep the pool up to date until cancelled."""
        raise NotImplementedError


PluginT = TypeVar("PluginT", bound=type[Plugin[Any]])


@dataclass
class Registry:
    """Plugin classes by type."""

    types: dict[str, type[Plugin[Any]]] = field(default_factory=dict)

    def register(self, plugin: PluginT) -> PluginT:
        """Class decorator: make the type known to configurations."""
        if plugin.type in self.types:
            raise ValueError(f"plugin type {plugin.type} is registered twice")
        self.types[plugin.type] = plugin
        return plugin


REGISTRY = Registry()
