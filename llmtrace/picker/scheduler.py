"""Runs scheduling profiles for a request and traces every decision, in llm-d's span names and attributes.

Beyond llm-d, each scorer's span carries the score of every endpoint, not the maximum and the mean alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any

from prometheus_client import Histogram

from llmtrace.picker.config import Configuration, Profile, WeightedScorer
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.metrics import Metrics
from llmtrace.picker.plugin import Plugin, ProfileResult, SchedulingResult
from llmtrace.picker.request import InferenceRequest, RequestError
from llmtrace.semconv import attributes as a
from llmtrace.spans import Attributes, Span, Tracer

SCOPE = "llm-d-router/pkg/epp/scheduling"
PREPARE, FILTER, SCORER, PICKER = "DataProducer", "Filter", "Scorer", "Picker"
"""llm-d's names of extension points, in the metric plugin_duration_seconds."""
TRACED_ENDPOINTS = 5
"""How many of the best endpoints the span pick_endpoints names, as llm-d does."""


class Scheduler:
    """Finds the endpoints for a request by the configured profiles."""

    def __init__(self, configuration: Configuration, metrics: Metrics, tracer: Tracer) -> None:
        self._configuration = configuration
        self._metrics = metrics
        self._tracer = tracer.scoped(SCOPE)
        self._timers = {
            (point, plugin.name): _Timer(metrics.plugin.labels(point, plugin.type, plugin.name))
            for point, plugin in _extension_points(configuration)
        }

    async def tokenize(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> bool:
        """Find the tokens of the request's prompts, which may take a while; whether there is a plugin that does."""
        tokenizer = self._configuration.tokenizer
        if tokenizer is None:
            return False
        start = perf_counter()
        await tokenizer.tokenize(request, endpoints)
        self._metrics.plugin.labels(PREPARE, tokenizer.type, tokenizer.name).observe(perf_counter() - start)
        return True

    def schedule(self, request: InferenceRequest, endpoints: Sequence[Endpoint], parent: Span) -> SchedulingResult:
        """Choose endpoints for the request among ``endpoints``, of which there must be at least one.

        Raises RequestError where the profiles find none.
        """
        start = perf_counter()
        for producer in self._configuration.producers:
            with self._timers[PREPARE, producer.name]:
                producer.produce(request, endpoints)
        handler, profiles = self._configuration.handler, self._configuration.profiles
        results: dict[str, ProfileResult | None] = {}
        try:
            while names := handler.pick(request, profiles, results, parent):
                for name in names:
                    results[name] = self._run(profiles[name], request, endpoints, parent)
            result = handler.process(request, results)
        except RequestError:
            self._metrics.attempt(False, request.model)
            raise
        finally:
            self._metrics.scheduling.observe(perf_counter() - start)
        chosen = result.endpoints[0]
        self._metrics.attempt(True, request.model, chosen.name, chosen.namespace, chosen.port)
        return result

    def scheduled(self, request: InferenceRequest, result: SchedulingResult, parent: Span) -> Mapping[str, str]:
        """Tell the plugins where the request goes; returns the headers to set on it."""
        for producer in self._configuration.producers:
            producer.scheduled(request, result)
        return self._configuration.handler.prepare(request, result, parent)

    def _run(
        self, profile: Profile, request: InferenceRequest, endpoints: Sequence[Endpoint], parent: Span
    ) -> ProfileResult | None:
        """Run a profile; None where its filters leave no endpoint."""
        with parent.child(a.PROFILE_SPAN, tracer=self._tracer) as span:
            span.attributes[a.PROFILE_NAME] = profile.name
            about: Attributes = {a.REQUEST_ID: request.id}
            if request.model:
                about[a.REQUEST_MODEL] = request.model
            left = self._filter(profile, request, endpoints, span, about)
            if not left:
                return None
            totals = self._score(profile, request, left, span, about)
            return ProfileResult(self._pick(profile, left, totals, span, about))

    def _filter(
        self,
        profile: Profile,
        request: InferenceRequest,
        endpoints: Sequence[Endpoint],
        parent: Span,
        about: Attributes,
    ) -> Sequence[Endpoint]:
        with parent.child(a.FILTER_SPAN) as span:
            left = endpoints
            for each in profile.filters:
                with self._timers[FILTER, each.name]:
                    left = each.filter(request, left)
                if not left:
                    break
            span.attributes = {a.FILTER_CANDIDATES: len(endpoints), **about, a.FILTER_REMAINING: len(left)}
        return left

    def _score(
        self,
        profile: Profile,
        request: InferenceRequest,
        endpoints: Sequence[Endpoint],
        parent: Span,
        about: Attributes,
    ) -> list[float]:
        with parent.child(a.SCORING_SPAN) as span:
            span.attributes = {
                a.SCORER_COUNT: len(profile.scorers),
                a.SCORING_CANDIDATES: len(endpoints),
                **about,
            }
            names = tuple(endpoint.id for endpoint in endpoints)
            totals = [0.0] * len(endpoints)
            for weighted in profile.scorers:
                weight = weighted.weight
                for index, score in enumerate(self._score_one(weighted, request, endpoints, names, span)):
                    totals[index] += min(max(score, 0.0), 1.0) * weight
        return totals

    def _score_one(
        self,
        weighted: WeightedScorer,
        request: InferenceRequest,
        endpoints: Sequence[Endpoint],
        names: tuple[str, ...],
        parent: Span,
    ) -> list[float]:
        scorer = weighted.scorer
        with parent.child(a.SCORER_SPAN_PREFIX + scorer.type) as span:
            with self._timers[SCORER, scorer.name]:
                scores = scorer.score(request, endpoints)
            if span.recording:
                span.attributes = {
                    a.SCORER_TYPE: scorer.type,
                    a.SCORER_NAME: scorer.name,
                    a.SCORER_WEIGHT: weighted.weight,
                    a.SCORER_CANDIDATES: len(endpoints),
                    a.SCORER_MAX: max(scores),
                    a.SCORER_AVG: sum(scores) / len(scores),
                    a.SCORER_SCORED: len(scores),
                    a.SCORER_ENDPOINTS: names,
                    a.SCORER_SCORES: tuple(scores),
                    **scorer.span_attributes(request, endpoints),
                }
        return scores

    def _pick(
        self,
        profile: Profile,
        endpoints: Sequence[Endpoint],
        totals: Sequence[float],
        parent: Span,
        about: Attributes,
    ) -> list[Endpoint]:
        with parent.child(a.PICK_SPAN) as span:
            with self._timers[PICKER, profile.picker.name]:
                picked = profile.picker.pick(endpoints, totals)
            if span.recording:
                ranked = sorted((-total, endpoint.id) for total, endpoint in zip(totals, endpoints, strict=True))
                best = ranked[:TRACED_ENDPOINTS]
                span.attributes = {
                    a.PICKER_CANDIDATES: len(endpoints),
                    a.TOP_ENDPOINTS: tuple(name for _, name in best),
                    a.TOP_SCORES: tuple(-total for total, _ in best),
                    **about,
                }
        return picked


class _Timer:
    """Observes the time of a block; not for nested or concurrent use of the same one."""

    __slots__ = ("_histogram", "_start")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._histogram.observe(perf_counter() - self._start)


def _extension_points(configuration: Configuration) -> Iterator[tuple[str, Plugin[Any]]]:
    for producer in configuration.producers:
        yield PREPARE, producer
    for profile in configuration.profiles.values():
        yield PICKER, profile.picker
        for each in profile.filters:
            yield FILTER, each
        for weighted in profile.scorers:
            yield SCORER, weighted.scorer
