"""What a plugin of the picker is: llm-d's extension points, and the registry of plugin types."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

if TYPE_CHECKING:
    from llmtrace.picker.endpoints import Endpoint, Pool
    from llmtrace.picker.metrics import Metrics
    from llmtrace.picker.request import InferenceRequest
    from llmtrace.picker.spans import Attributes, Tracer


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


class Plugin(Generic[ParametersT]):
    """A configured plugin. ``type`` is llm-d's plugin type; ``name`` the configured name."""

    type: ClassVar[str]
    parameters_type: ClassVar[builtins.type[Parameters]] = Parameters

    def __init__(self, name: str, parameters: ParametersT, handle: Handle) -> None:
        self.name = name
        self.parameters = parameters
        self.handle = handle

    async def run(self) -> None:
        """What the plugin does beside requests, until cancelled; by default nothing."""


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

    needs_tokens: ClassVar[bool] = False
    """Whether it can do nothing without a tokenizer."""

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        """Put the data under the plugin's name into ``request.data``."""
        raise NotImplementedError

    def scheduled(self, request: InferenceRequest, endpoint: Endpoint) -> None:
        """The request goes to ``endpoint``."""
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


class ProfileHandler(Plugin[ParametersT]):
    """Chooses the scheduling profiles to run for a request, and makes one result of theirs."""

    def pick(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, ProfileResult | None]
    ) -> list[str]:
        """Names of the profiles to run next; none ends the scheduling. A failed profile's result is None."""
        raise NotImplementedError

    def process(self, request: InferenceRequest, results: Mapping[str, ProfileResult | None]) -> SchedulingResult:
        """The overall result; raises NoEndpoint where there is none."""
        raise NotImplementedError


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
