"""Reads an EndpointPickerConfig (llm-d.ai/v1alpha1) and makes its plugins and scheduling profiles.

Files that this module accepts are loadable by llm-d's EPP as well. What the embedded picker has not is refused by
name, never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from llmtrace.errors import UserError
from llmtrace.picker import plugins
from llmtrace.picker.plugin import (
    REGISTRY,
    Discovery,
    Handle,
    Picker,
    Plugin,
    Producer,
    ProfileHandler,
    Scorer,
    Tokenizer,
)

DEFAULT_WEIGHT = 1.0
NOT_EMBEDDED = (
    "flowControl",
    "requestHandler",
    "saturationDetector",
    "parser",
    "peerDiscovery",
    "sources",
    "crossReplicaSyncerPluginRef",
    "crossReplicaSyncInterval",
)
"""Sections that llm-d's EPP knows and the embedded picker has not."""

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


class DiscoveryRef(_Section):
    """The plugin that finds the endpoints."""

    plugin_ref: str = Field(min_length=1)


class DataLayer(_Section):
    """Where endpoints come from. Metrics are always scraped in the way of llm-d's defaults."""

    discovery: DiscoveryRef | None = None
    inject_defaults: Literal[True] = True


class EndpointPickerConfig(_Section):
    """The file."""

    api_version: Literal["llm-d.ai/v1alpha1"]
    kind: Literal["EndpointPickerConfig"]
    feature_gates: list[str] = Field(default_factory=list, max_length=0)
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
    def __init__(self, config: EndpointPickerConfig, handle: Handle) -> None:
        self._config = config
        self._handle = handle
        self._plugins: dict[str, AnyPlugin] = {}

    def build(self) -> Configuration:
        for index, spec in enumerate(self._config.plugins):
            self._make(spec, f"plugins[{index}]")
        if self._config.data_layer.discovery is None:
            raise UserError("dataLayer.discovery names no plugin: add {pluginRef: NAME} of a file-discovery")
        discovery = self._find(
            self._config.data_layer.discovery.plugin_ref, Discovery, "dataLayer.discovery", "a discovery"
        )
        profiles = [self._profile(profile) for profile in self._config.scheduling_profiles or [self._all()]]
        by_name = {profile.name: profile for profile in profiles}
        if len(by_name) < len(profiles):
            raise UserError("schedulingProfiles has two profiles of the same name")
        handler = self._handler(profiles)
        self._default_producers(profiles)
        producers = tuple(self._of(Producer))
        tokenizer = self._tokenizer(producers)
        return Configuration(discovery, tokenizer, producers, handler, by_name, tuple(self._plugins.values()))

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
        plugin = self._plugins[name] = kind(name, parameters, self._handle)
        return plugin

    def _of(self, kind: type[KindT]) -> list[KindT]:
        return [plugin for plugin in self._plugins.values() if isinstance(plugin, kind)]

    def _find(self, name: str, kind: type[KindT], where: str, what: str) -> KindT:
        plugin = self._reference(name, where)
        if not isinstance(plugin, kind):
            raise UserError(f"{where}: plugin {name!r} is of type {plugin.type}, which is not {what}")
        return plugin

    def _reference(self, name: str, where: str) -> AnyPlugin:
        plugin = self._plugins.get(name)
        if plugin is None:
            raise UserError(f"{where}: there is no plugin named {name!r}{nearest(name, self._plugins)}")
        return plugin

    def _all(self) -> SchedulingProfile:
        """The profile that llm-d makes where the file has none: every scorer and picker."""
        refs = [PluginRef(plugin_ref=n) for n, p in self._plugins.items() if isinstance(p, (Scorer, Picker))]
        return SchedulingProfile(name="default", plugins=refs)

    def _profile(self, profile: SchedulingProfile) -> Profile:
        where = f"schedulingProfiles[{profile.name}]"
        scorers: list[WeightedScorer] = []
        pickers: list[Picker[Any]] = []
        for ref in profile.plugins:
            plugin = self._reference(ref.plugin_ref, where)
            if isinstance(plugin, Scorer):
                scorers.append(WeightedScorer(plugin, DEFAULT_WEIGHT if ref.weight is None else ref.weight))
            elif isinstance(plugin, Picker):
                pickers.append(plugin)
            else:
                raise UserError(
                    f"{where}: plugin {ref.plugin_ref!r} is of type {plugin.type}, "
                    "which is neither a scorer nor a picker"
                )
        if len(pickers) > 1:
            names = ", ".join(repr(picker.name) for picker in pickers)
            raise UserError(f"{where}: a profile has one picker; these are {names}")
        return Profile(profile.name, tuple(scorers), pickers[0] if pickers else self._default_picker())

    def _default_picker(self) -> Picker[Any]:
        existing = self._of(Picker)
        if existing:
            return existing[0]
        picker = self._make(PluginSpec(type=plugins.max_score_picker.MaxScorePicker.type), "the default picker")
        assert isinstance(picker, Picker)  # noqa: S101 - tells the type checker what the registry says
        return picker

    def _handler(self, profiles: Sequence[Profile]) -> ProfileHandler[Any]:
        handlers = self._of(ProfileHandler)
        if len(handlers) > 1:
            raise UserError(f"there are two profile handlers, {handlers[0].name!r} and {handlers[1].name!r}")
        single = plugins.single_profile_handler.SingleProfileHandler
        if not handlers:
            if len(profiles) > 1:
                raise UserError("several scheduling profiles need a profile handler plugin")
            self._make(PluginSpec(type=single.type), "the default profile handler")
            handlers = self._of(ProfileHandler)
        if isinstance(handlers[0], single) and len(profiles) != 1:
            raise UserError(f"{single.type} takes one scheduling profile; there are {len(profiles)}")
        return handlers[0]

    def _tokenizer(self, producers: Iterable[Producer[Any]]) -> Tokenizer[Any] | None:
        tokenizers = self._of(Tokenizer)
        if len(tokenizers) > 1:
            raise UserError(f"there are two token producers, {tokenizers[0].name!r} and {tokenizers[1].name!r}")
        needy = next((producer for producer in producers if producer.needs_tokens), None)
        if needy is not None and not tokenizers:
            raise UserError(
                f"plugin {needy.name!r} needs the tokens of prompts: "
                f"add a plugin of type {plugins.token_producer.TokenProducer.type}"
            )
        return tokenizers[0] if tokenizers else None

    def _default_producers(self, profiles: Sequence[Profile]) -> None:
        """As llm-d does, make the producer of what a scorer reads, where the file has none."""
        for profile in profiles:
            for weighted in profile.scorers:
                if not isinstance(weighted.scorer, plugins.prefix_cache_scorer.PrefixCacheScorer):
                    continue
                name = weighted.scorer.parameters.producer
                if name == plugins.approx_prefix_cache_producer.ApproxPrefixCacheProducer.type:
                    if name not in self._plugins:
                        self._make(PluginSpec(type=name), "the default producer")
                else:
                    where = f"plugin {weighted.scorer.name!r}: prefixMatchInfoProducerName"
                    self._find(name, Producer, where, "a producer")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if close:
        return f"; the nearest known one is {close[0]!r}"
    return f"; known: {', '.join(names)}" if names else "; none is known here"


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
    if details["loc"] == ("featureGates",):
        return "the embedded picker has no feature gates: remove them, or run llm-d's own EPP by picker_binary"
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
