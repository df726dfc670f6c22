"""Reads an EndpointPickerConfig (llm-d.ai/v1alpha1) and makes its plugins and scheduling profiles.

Files that this module accepts are loadable by llm-d's EPP as well. What the embedded picker has not is refused by
name, never ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from llmtrace.durations import seconds
from llmtrace.errors import UserError, nearest
from llmtrace.picker import plugins
from llmtrace.picker.flow_control import DEFAULT_MAX_REQUESTS, DEFAULT_TTL_S, FlowSettings
from llmtrace.picker.plugin import (
    REGISTRY,
    Discovery,
    Filter,
    Handle,
    Picker,
    Plugin,
    Producer,
    ProfileHandler,
    SaturationDetector,
    Scorer,
    Tokenizer,
)
from llmtrace.picker.prefix_match import DEFAULT_PRODUCER

DEFAULT_WEIGHT = 1.0
NOT_EMBEDDED = (
    "requestHandler",
    "saturationDetector",
    "parser",
    "peerDiscovery",
    "sources",
    "crossReplicaSyncerPluginRef",
    "crossReplicaSyncInterval",
    "maxBytes",
    "defaultPriorityBand",
    "defaultNegativePriorityBand",
    "priorityBands",
    "usageLimitPolicyPluginRef",
    "enableEviction",
)
"""Sections that llm-d's EPP knows and the embedded picker has not."""
FLOW_CONTROL = "flowControl"
"""The feature gate of flow control."""

_log = logging.getLogger(__name__)

AnyPlugin = Plugin[Any]
KindT = TypeVar("KindT")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class PluginSpec(_Section):
    """A plugin to make; ``name`` defaults to its type."""

    type: str = Field(min_length=1)
    name: str = ""
    parameters: dict[str, Any] | None = None


class PluginRef(_Section):
    """A plugin in a scheduling profile; ``weight`` counts for scorers only."""

    plugin_ref: str = Field(min_length=1)
    weight: float | None = Field(default=None, allow_inf_nan=False)


class SchedulingProfile(_Section):
    """A scheduling profile: its filters, scorers and picker."""

    name: str = Field(min_length=1)
    plugins: list[PluginRef] = Field(default_factory=list)


class PluginOnly(_Section):
    """A reference to a plugin."""

    plugin_ref: str = Field(min_length=1)


class DataLayer(_Section):
    """Where endpoints come from. Metrics are always scraped in the way of llm-d's defaults."""

    discovery: PluginOnly | None = None
    inject_defaults: Literal[True] = True


def _wait(given: object) -> float:
    """A duration that may be 0, which is without end."""
    return 0.0 if given in ("0s", "0") else seconds(given)


class FlowControlSection(_Section):
    """Flow control: how many requests may wait, how long, and what says that the pool is saturated."""

    max_requests: int = Field(default=DEFAULT_MAX_REQUESTS, gt=0)
    default_request_ttl: Annotated[float | None, BeforeValidator(_wait)] = Field(
        default=None, alias="defaultRequestTTL"
    )
    no_endpoint_request_ttl: Annotated[float | None, BeforeValidator(_wait)] = Field(
        default=None, alias="noEndpointRequestTTL"
    )
    saturation_detector: PluginOnly | None = None


class EndpointPickerConfig(_Section):
    """The file."""

    api_version: Literal["llm-d.ai/v1alpha1"]
    kind: Literal["EndpointPickerConfig"]
    feature_gates: list[Literal["flowControl"]] = Field(default_factory=list)
    flow_control: FlowControlSection | None = None
    plugins: list[PluginSpec]
    scheduling_profiles: list[SchedulingProfile] = Field(default_factory=list)
    data_layer: DataLayer


@dataclass(frozen=True)
class WeightedScorer:
    """A scorer and its weight in a profile."""

    scorer: Scorer[Any]
    weight: float


@dataclass(frozen=True)
class Profile:
    """A scheduling profile that is ready to run."""

    name: str
    filters: tuple[Filter[Any], ...]
    scorers: tuple[WeightedScorer, ...]
    picker: Picker[Any]


@dataclass(frozen=True)
class Configuration:
    """What a configuration file amounts to."""

    discovery: Discovery[Any]
    tokenizer: Tokenizer[Any] | None
    producers: tuple[Producer[Any], ...]
    handler: ProfileHandler[Any]
    profiles: dict[str, Profile]
    plugins: tuple[AnyPlugin, ...]
    flow_control: FlowSettings | None


def load(path: Path, handle: Handle) -> Configuration:
    """Read a file and make everything in it; raises UserError with one sentence where that cannot be done."""
    try:
        content: Any = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"the configuration {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the configuration {path} is no YAML: {' '.join(str(error).split())}") from None
    try:
        return _Builder(parse(content), handle).build()
    except UserError as error:
        raise UserError(f"the configuration {path}: {error}") from None


def parse(content: Any) -> EndpointPickerConfig:
    """Check the form of a configuration; raises UserError."""
    if not isinstance(content, dict):
        raise UserError("it must be a mapping with apiVersion llm-d.ai/v1alpha1 and kind EndpointPickerConfig")
    try:
        return EndpointPickerConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(_sentence(error, EndpointPickerConfig)) from None


class _Builder:
    """Makes everything of a configuration; to its plugins it is the Others of :mod:`llmtrace.picker.plugin`."""

    def __init__(self, config: EndpointPickerConfig, handle: Handle) -> None:
        self.profiles: Collection[str] = ()
        self._config = config
        self._handle = handle
        self._plugins: dict[str, AnyPlugin] = {}

    def build(self) -> Configuration:
        for index, spec in enumerate(self._config.plugins):
            self._make(spec, f"plugins[{index}]")
        if self._config.data_layer.discovery is None:
            raise UserError("dataLayer.discovery names no plugin: add {pluginRef: NAME} of a file-discovery")
        discovery = self.find(
            self._config.data_layer.discovery.plugin_ref, Discovery, "dataLayer.discovery", "a discovery"
        )
        profiles = [self._profile(profile) for profile in self._config.scheduling_profiles or [self._all()]]
        by_name = {profile.name: profile for profile in profiles}
        if len(by_name) < len(profiles):
            raise UserError("schedulingProfiles has two profiles of the same name")
        self.profiles = by_name.keys()
        handler = self._handler()
        tokenizer = self._tokenizer()
        flow_control = self._flow_control()
        for plugin in list(self._plugins.values()):
            plugin.connect(self)
        return Configuration(
            discovery,
            tokenizer,
            tuple(self.of(Producer)),
            handler,
            by_name,
            tuple(self._plugins.values()),
            flow_control,
        )

    def _make(self, spec: PluginSpec, where: str) -> AnyPlugin:
        name = spec.name or spec.type
        if name in self._plugins:
            raise UserError(f"{where}: there are two plugins named {name!r}; give one of them another name")
        kind = REGISTRY.types.get(spec.type)
        if kind is None:
            raise UserError(f"{where}: unknown plugin type {spec.type!r}{nearest(spec.type, REGISTRY.types)}")
        try:
            parameters = kind.parameters_type.model_validate(spec.parameters or {})
        except ValidationError as error:
            sentence = _sentence(error, kind.parameters_type, "parameter")
            raise UserError(f"plugin {name!r} ({where}): {sentence}") from None
        if kind.deprecated_for:
            _log.warning("%s: llm-d deprecates the plugin type %s; use %s", where, spec.type, kind.deprecated_for)
        plugin = self._plugins[name] = kind(name, parameters, self._handle)
        return plugin

    def of(self, kind: type[KindT]) -> list[KindT]:
        return [plugin for plugin in self._plugins.values() if isinstance(plugin, kind)]

    def find(self, name: str, kind: type[KindT], where: str, what: str) -> KindT:
        plugin = self._reference(name, where)
        if not isinstance(plugin, kind):
            raise UserError(f"{where}: plugin {name!r} is of type {plugin.type}, which is not {what}")
        return plugin

    def profile(self, name: str, where: str) -> None:
        if name not in self.profiles:
            raise UserError(f"{where}: there is no scheduling profile named {name!r}{nearest(name, self.profiles)}")

    def producer(self, name: str, where: str) -> None:
        if name == DEFAULT_PRODUCER and name not in self._plugins:
            self._make(PluginSpec(type=name), "the default producer")
        self.find(name, Producer, where, "a producer")

    def add(self, plugin: AnyPlugin) -> None:
        if plugin.name in self._plugins:
            raise UserError(f"there are two plugins named {plugin.name!r}; give one of them another name")
        self._plugins[plugin.name] = plugin
        plugin.connect(self)

    def tokenizer(self, where: str) -> None:
        if not self.of(Tokenizer):
            kind = plugins.token_producer.TokenProducer.type
            raise UserError(f"{where} needs the tokens of prompts: add a plugin of type {kind}")

    def _reference(self, name: str, where: str) -> AnyPlugin:
        plugin = self._plugins.get(name)
        if plugin is None:
            raise UserError(f"{where}: there is no plugin named {name!r}{nearest(name, self._plugins)}")
        return plugin

    def _all(self) -> SchedulingProfile:
        """The profile that llm-d makes where the file has none: every filter, scorer and picker."""
        refs = [PluginRef(plugin_ref=n) for n, p in self._plugins.items() if isinstance(p, (Filter, Scorer, Picker))]
        return SchedulingProfile(name="default", plugins=refs)

    def _profile(self, profile: SchedulingProfile) -> Profile:
        where = f"schedulingProfiles[{profile.name}]"
        filters: list[Filter[Any]] = []
        scorers: list[WeightedScorer] = []
        pickers: list[Picker[Any]] = []
        for ref in profile.plugins:
            plugin = self._reference(ref.plugin_ref, where)
            if isinstance(plugin, Filter):
                filters.append(plugin)
            elif isinstance(plugin, Scorer):
                scorers.append(WeightedScorer(plugin, DEFAULT_WEIGHT if ref.weight is None else ref.weight))
            elif isinstance(plugin, Picker):
                pickers.append(plugin)
            else:
                raise UserError(
                    f"{where}: plugin {ref.plugin_ref!r} is of type {plugin.type}, "
                    "which is neither a filter, a scorer nor a picker"
                )
        if len(pickers) > 1:
            names = ", ".join(repr(picker.name) for picker in pickers)
            raise UserError(f"{where}: a profile has one picker; these are {names}")
        picker = pickers[0] if pickers else self._default_picker()
        return Profile(profile.name, tuple(filters), tuple(scorers), picker)

    def _default_picker(self) -> Picker[Any]:
        existing = self.of(Picker)
        if existing:
            return existing[0]
        picker = self._make(PluginSpec(type=plugins.max_score_picker.MaxScorePicker.type), "the default picker")
        assert isinstance(picker, Picker)  # noqa: S101 - tells the type checker what the registry says
        return picker

    def _handler(self) -> ProfileHandler[Any]:
        handlers = self.of(ProfileHandler)
        if len(handlers) > 1:
            raise UserError(f"there are two profile handlers, {handlers[0].name!r} and {handlers[1].name!r}")
        if handlers:
            return handlers[0]
        if len(self.profiles) > 1:
            raise UserError("several scheduling profiles need a profile handler plugin")
        handler = self._make(
            PluginSpec(type=plugins.single_profile_handler.SingleProfileHandler.type), "the default profile handler"
        )
        assert isinstance(handler, ProfileHandler)  # noqa: S101 - tells the type checker what the registry says
        return handler

    def _flow_control(self) -> FlowSettings | None:
        section = self._config.flow_control
        if FLOW_CONTROL not in self._config.feature_gates:
            if section is None:
                return None
            raise UserError("flowControl has no effect without its gate: add featureGates: [flowControl], or remove it")
        section = section or FlowControlSection()
        kind = plugins.utilization_detector.UtilizationDetector.type
        name = section.saturation_detector.plugin_ref if section.saturation_detector else kind
        if name == kind and name not in self._plugins:
            self._make(PluginSpec(type=kind), "the default saturation detector")
        detector = self.find(name, SaturationDetector, "flowControl.saturationDetector", "a saturation detector")
        ttl = section.default_request_ttl
        ttl = DEFAULT_TTL_S if ttl is None else ttl
        other = section.no_endpoint_request_ttl
        return FlowSettings(detector, section.max_requests, ttl, ttl if other is None else other)

    def _tokenizer(self) -> Tokenizer[Any] | None:
        tokenizers = self.of(Tokenizer)
        if len(tokenizers) > 1:
            raise UserError(f"there are two token producers, {tokenizers[0].name!r} and {tokenizers[1].name!r}")
        return tokenizers[0] if tokenizers else None


def _sentence(error: ValidationError, model: type[BaseModel], noun: str = "field") -> str:
    """What is wrong first, in one sentence."""
    details = error.errors()[0]
    loc = details["loc"]
    where = _where(loc[:-1])
    name = str(loc[-1]) if loc else ""
    if details["type"] == "extra_forbidden":
        if name in NOT_EMBEDDED and noun == "field":
            return (
                f"{_where(loc)} is not part of the embedded picker: remove it, or run llm-d's own EPP "
                "with the inventory variable picker_binary"
            )
        known = [field.alias or key for key, field in _model_at(model, loc[:-1]).model_fields.items()]
        return f"unknown {noun} {name!r}{' at ' + where if where else ''}{nearest(name, known)}"
    return f"{_where(loc) or 'it'}: {_reason(details)}"


def _reason(details: ErrorDetails) -> str:
    if details["type"] == "missing":
        return "is missing"
    if details["loc"][:1] == ("featureGates",):
        return "the embedded picker has one, flowControl: remove others, or run llm-d's own EPP by picker_binary"
    given = details["input"]
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool)) else ""
    return f"{details['msg'].removeprefix('Value error, ')}{shown}"


def _model_at(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    """The model that describes the part of the file at ``loc``."""
    for step in loc:
        if isinstance(step, int):
            continue
        field = next(f for key, f in model.model_fields.items() if step in (f.alias, key))
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model


def _where(loc: Sequence[int | str]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return text.removeprefix(".")
