"""The registry of names: it loads, what is wrong in it is named, and the code and the picker keep to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from picking import FLOW_CONTROLLED, Picker, chat, request_body, request_headers
from prometheus_client import Metric

from grafana.series import series
from llmtrace.errors import UserError
from llmtrace.picker.disaggregation import Decision, Reason
from llmtrace.scenarios.prefix_cache import EXPECTATION, NAME
from llmtrace.scenarios.required import expectation
from llmtrace.semconv import attributes as a
from llmtrace.semconv.definitions import REGISTRY, load, registry
from llmtrace.semconv.format import MANIFEST, read

ROOT = Path(__file__).parents[2]
CODE = sorted((ROOT / "llmtrace").rglob("*.py"))
OTHERS = [path for folder in ("bench", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
Change = Callable[[dict[str, Any]], None]


def test_every_file_declares_something_and_every_reference_resolves() -> None:
    declared = registry()
    files = {path.name for path in REGISTRY.glob("*.yaml")} - {MANIFEST}
    named = {d.file for d in (*declared.attributes.values(), *declared.spans.values(), *declared.constants)}
    assert files == named
    for file, group in read(REGISTRY):
        for entry in group.attributes:
            assert (entry.ref or entry.id) in declared.attributes, f"{file}: {group.id}"


def test_the_manifest_is_what_weaver_wants() -> None:
    """docs/specs and crates/weaver_semconv/src/manifest.rs: the URL alone names the registry and its version."""
    manifest = yaml.safe_load((REGISTRY / MANIFEST).read_text())
    assert re.fullmatch(r"https://[a-z./]+/llmtrace/\d+\.\d+\.\d+", manifest["schema_url"])
    assert manifest.keys() == {"schema_url", "description", "stability"}


def test_attributes_have_examples() -> None:
    for attribute in registry().attributes.values():
        assert attribute.members or attribute.examples or attribute.type == "boolean", attribute.id


def test_own_names_keep_to_opentelemetrys_rules() -> None:
    """Form, and no name that is a namespace too (opentelemetry-weaver-packages, policies/check/naming_conventions)."""
    declared = registry()
    names = [*declared.attributes, *(m.name for m in declared.metrics.values())]
    own = [name for name in names if name.startswith("llmtrace.")]
    assert own
    for name in own:
        assert re.fullmatch(r"llmtrace(\.[a-z][a-z0-9]*(_[a-z0-9]+)*)+", name), name
        inside = [other for other in declared.attributes if other.startswith(f"{name}.")]
        assert not inside, f"{name} is a name and the namespace of {inside}"


def test_briefs_fit_a_table_and_end_without_a_full_stop() -> None:
    declared = registry()
    for d in (*declared.attributes.values(), *declared.spans.values(), *declared.metrics.values()):
        assert len(d.brief) < 120, d.id
        assert not d.brief.endswith("."), d.id


def test_every_span_has_a_way_up_to_a_root() -> None:
    spans = registry().spans
    rooted = {i for i, span in spans.items() if span.is_root or span.remote_parent}
    while more := {i for i, span in spans.items() if i not in rooted and rooted.intersection(span.parents)}:
        rooted |= more
    assert rooted == set(spans)


def test_a_span_is_found_by_service_name_and_kind() -> None:
    declared = registry()
    found = declared.span("llm-d-epp", "llm_d.epp.scorer.queue-scorer", "INTERNAL")
    assert found is not None
    assert found.id == "span.llm_d.epp.scorer"
    assert declared.span("llm-d-epp", "llm_d.epp.scoring", "INTERNAL") is not found
    assert declared.span("vllm", "llm_d.epp.scorer.queue-scorer", "INTERNAL") is None
    assert declared.span("llmtrace-client", "chat smol", "SERVER") is not None


def test_the_required_edges_of_the_prefix_cache_scenario() -> None:
    edges = {span.key: (span.parents, span.kind, span.service) for span in EXPECTATION.spans}
    assert edges == {
        "client": ((), "CLIENT", a.CLIENT_SERVICE),
        "envoy": (("client",), "SERVER", a.ENVOY_SERVICE),
        "gateway": (("envoy", "client"), "SERVER", a.PICKER_SERVICE),
        "orchestration": (("gateway",), "SERVER", a.PICKER_SERVICE),
        "profile": (("orchestration",), "INTERNAL", a.PICKER_SERVICE),
        "filter": (("profile",), "INTERNAL", a.PICKER_SERVICE),
        "scoring": (("profile",), "INTERNAL", a.PICKER_SERVICE),
        "scorer": (("scoring",), "INTERNAL", a.PICKER_SERVICE),
        "pick": (("profile",), "INTERNAL", a.PICKER_SERVICE),
        "server": (("gateway", "envoy", "client"), "SERVER", a.SERVER_SERVICE),
        "queue": (("server",), "INTERNAL", a.SERVER_SERVICE),
        "prefill": (("server",), "INTERNAL", a.SERVER_SERVICE),
        "decode": (("server",), "INTERNAL", a.SERVER_SERVICE),
    }
    (scorer,) = (span for span in EXPECTATION.spans if span.key == "scorer")
    assert scorer.count_from == ("scoring", a.SCORER_COUNT)
    assert set(EXPECTATION.hints) == {"client", "collector", "engine", "envoy", "picker", "scaler", "sidecar", "vllm"}


def test_the_required_edges_of_the_pd_scenario_below_the_gateway() -> None:
    def edges(form: str) -> dict[str, tuple[str, tuple[str, ...]]]:
        spans = expectation(registry(), "pd-disaggregation", form).spans
        inside = (a.SIDECAR_SERVICE, a.SERVER_SERVICE)
        return {span.key: (span.name, span.parents) for span in spans if span.service in inside}

    both = {
        "sidecar": ("llm_d.pd_proxy.* /*", ("gateway", "envoy", "client")),
        "forward": ("forward_request", ("sidecar",)),
        "decode_queue": ("queue", ("decode_server",)),
        "decode_prefill": ("prefill", ("decode_server",)),
        "decode_decode": ("decode", ("decode_server",)),
    }
    split = both | {
        "prefill_leg": ("prefill", ("forward",)),
        "prefill_server": ("llm_request", ("prefill_leg",)),
        "prefill_queue": ("queue", ("prefill_server",)),
        "prefill_prefill": ("prefill", ("prefill_server",)),
        "decode_leg": ("decode", ("forward", "prefill_leg")),
        "decode_server": ("llm_request", ("decode_leg",)),
    }
    assert edges("unified") == both | {"decode_server": ("llm_request", ("forward",))}
    assert edges("split_without_load") == split
    assert edges("split") == split | {"kv_load": ("kv_load", ("decode_server",))}
    late = {s.key for s in expectation(registry(), "pd-disaggregation", "split").spans if s.may_end_late}
    assert late == {"sidecar", "decode_leg"}


def test_a_span_that_a_scenario_requires_in_two_places(tmp_path: Path) -> None:
    def twice(d: dict[str, Any]) -> None:
        inner = yaml.safe_load(yaml.safe_dump(d["groups"][1])) | {"id": "span.y"}
        inner["annotations"]["llmtrace"] = {
            "name": "y",
            "parents": ["span.x"],
            "scenarios": {
                "s": [{"key": "first", "under": ["x"]}, {"key": "second", "under": ["first"], "forms": ["f"]}]
            },
        }
        d["groups"].append(inner)

    declared = load(write(tmp_path, changed(twice)))
    assert {s.key: s.parents for s in expectation(declared, "s").spans} == {"x": (), "first": ("x",)}
    assert {s.key: s.parents for s in expectation(declared, "s", "f").spans} == {
        "x": (),
        "first": ("x",),
        "second": ("first",),
    }


def test_a_scenario_that_the_registry_does_not_know() -> None:
    with pytest.raises(UserError, match="'prefix-cash'"):
        expectation(registry(), "prefix-cash")
    assert expectation(registry(), NAME) == EXPECTATION


def constants_used(path: Path) -> Iterator[str]:
    """The constants that a module takes from the generated one, whatever it calls that."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    aliases = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "llmtrace.semconv"
        for alias in node.names
        if alias.name == "attributes"
    }
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield node.attr


def test_every_constant_is_used() -> None:
    used = {name for path in (*CODE, *OTHERS) for name in constants_used(path) if name.isupper()}
    unused = {c.name for c in registry().constants} - used
    assert not unused, f"no code uses {unused}; take the constant out of the registry"
    assert used <= set(vars(a)), used - set(vars(a))


def literals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_name_in_the_code_is_declared() -> None:
    declared = registry()
    names = {
        *declared.attributes,
        *(span.name for span in declared.spans.values()),
        *(c.value for c in declared.constants),
        *(metric.name for metric in declared.metrics.values()),
    }
    own = {i.split(".")[1] for i in declared.attributes if i.startswith("llmtrace.")}
    telemetry = re.compile(rf"(gen_ai|llm_d|llmtrace\.({'|'.join(sorted(own))}))\.[a-z0-9_.*-]*")
    for path in CODE:
        for text in literals(path):
            if telemetry.fullmatch(text):
                known = text in names or (text.endswith(".") and any(name.startswith(text) for name in names))
                assert known, f"{path.relative_to(ROOT)}: {text} is not in the registry"


def test_the_constants_need_nothing_but_python() -> None:
    tree = ast.parse(Path(str(a.__file__)).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports if isinstance(node, ast.ImportFrom)] == ["__future__"]
    assert len(imports) == 1


@pytest.mark.parametrize(("attribute", "values"), [(a.PD_DECISION, Decision), (a.PD_REASON, Reason)])
def test_what_the_picker_says_of_a_split_is_declared(attribute: str, values: Iterable[str]) -> None:
    assert set(registry().attributes[attribute].members) == {str(value) for value in values}


TYPES = {"counter": "counter", "histogram": "histogram", "gauge": "gauge", "updowncounter": "gauge"}


def exported(metric: Metric) -> str:
    """The name under which Prometheus shows a metric; the client library cuts _total off."""
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def test_the_pickers_metrics_are_declared_with_their_labels(tmp_path: Path) -> None:
    picker = Picker(tmp_path, FLOW_CONTROLLED)
    metrics = picker.handle.metrics
    exchange = picker.exchange()
    exchange.handle(request_headers())
    exchange.handle(request_body(chat()))
    exchange.close()
    metrics.series("smol", "tenant").error("ServiceUnavailable")
    metrics.attempt(True, "smol", "vllm-0", "default", "8000")
    metrics.disaggregated("disagg", "disagg-profile-handler", "smol", "decode-only")
    metrics.plugin.labels("Scorer", "queue-scorer", "queue-scorer").observe(0.001)
    for family in (metrics.prefix_size, metrics.prefix_hit_ratio):
        family.labels("prefix", "approx-prefix-cache-producer")
    for counter in (metrics.kv_cache.received, metrics.kv_cache.missed, metrics.kv_cache.dropped):
        counter.labels("default/vllm-0")
    metrics.kv_cache.errors.labels("default/vllm-0", "replay")
    metrics.kv_cache.skipped.labels("unknown", "unknown_parent")
    declared = {m.name: m for m in registry().metrics.values() if m.name.startswith(("llm_d_epp_", "llmtrace_kv_"))}
    found = {exported(metric): metric for metric in metrics.registry.collect()}
    assert found.keys() == declared.keys()
    for name, metric in found.items():
        assert metric.type == TYPES[declared[name].instrument], name
        labels = {label for sample in metric.samples for label in sample.labels} - {"le"}
        assert labels == declared[name].attributes.keys(), name


def test_the_collectors_span_metrics_are_declared() -> None:
    connectors = yaml.safe_load((ROOT / "collector" / "span-metrics.yaml").read_text())["connectors"]
    declared = registry().metrics.values()
    always = {"service.name", "span.name", "span.kind", "status.code", "collector.instance.id"}
    for connector in connectors.values():
        space = connector["namespace"]
        found = {m.name: m for m in declared if m.name == space or m.name.startswith(f"{space}.")}
        assert found.keys() in ({"llmtrace.span.calls", "llmtrace.span.duration"}, {space})
        own = {dimension["name"] for dimension in connector["dimensions"]}
        # Prometheus has the service of the resource, too.
        wanted = own | always - {*connector.get("exclude_dimensions", ())} | {"service.name"}
        for metric in found.values():
            assert metric.attributes.keys() == wanted
            assert metric.unit == (connector["histogram"]["unit"] if metric.instrument == "histogram" else "{call}")


def test_the_metrics_of_vllm_that_the_code_reads_are_declared() -> None:
    read_by_code = {text for path in CODE for text in literals(path) if re.fullmatch(r"vllm:\w+", text)}
    assert read_by_code <= {m.name for m in registry().metrics.values() if m.origin == "vllm"}


def test_scraped_metrics_are_read_by_the_code_a_dashboard_or_an_alert() -> None:
    dashboards = [*(ROOT / "grafana/generated").glob("*.json"), ROOT / "grafana/alerts/llmtrace.yaml"]
    read = {text for path in CODE for text in literals(path)}
    read |= {word for path in dashboards for word in re.findall(r"[\w:]+", path.read_text())}
    others = ("vllm", "envoy", "prometheus")
    scraped = [m for m in registry().metrics.values() if m.origin in others or m.name.startswith("otelcol_")]
    assert scraped
    assert [m.name for m in scraped if not series(m) & read] == []


GOOD: dict[str, Any] = {
    "groups": [
        {
            "id": "registry.x",
            "type": "attribute_group",
            "brief": "Attributes",
            "attributes": [
                {"id": "x.name", "type": "string", "brief": "A name", "stability": "stable", "examples": ["n"]},
                {"id": "x.count", "type": "int", "brief": "A count", "stability": "stable"},
            ],
            "annotations": {"llmtrace": {"emitter": {"component": "x", "service": "x", "brief": "X"}}},
        },
        {
            "id": "span.x",
            "type": "span",
            "span_kind": "internal",
            "brief": "A span",
            "stability": "stable",
            "attributes": [{"ref": "x.name", "requirement_level": "required"}, {"ref": "x.count"}],
            "annotations": {
                "llmtrace": {"name": "x", "scenarios": {"s": {"key": "x", "attributes": ["x.name"]}}},
            },
        },
    ]
}


def changed(change: Change) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    change(document)
    return document


def write(folder: Path, document: object) -> Path:
    (folder / "x.yaml").write_text(yaml.safe_dump(document))
    return folder


def test_a_small_registry(tmp_path: Path) -> None:
    declared = load(write(tmp_path, GOOD))
    span = declared.spans["span.x"]
    assert (span.kind, span.emitter.service, span.attributes["x.name"].level) == ("INTERNAL", "x", "required")
    assert [told.key for _, told in declared.required("s")] == ["x"]


def attribute(d: dict[str, Any]) -> dict[str, Any]:
    return d["groups"][0]["attributes"][0]  # type: ignore[no-any-return]


def span_notes(d: dict[str, Any]) -> dict[str, Any]:
    return d["groups"][1]["annotations"]["llmtrace"]  # type: ignore[no-any-return]


METRIC: dict[str, Any] = {
    "id": "metric.x",
    "type": "metric",
    "metric_name": "x.m",
    "instrument": "counter",
    "unit": "1",
    "brief": "M",
    "stability": "stable",
}

CHANGES: list[tuple[Change, str]] = [
    (lambda d: attribute(d).update(type="text"), r"x\.yaml: group registry\.x: .*type"),
    (lambda d: attribute(d).pop("stability"), r"x\.yaml: group registry\.x: .*x\.name needs"),
    (lambda d: attribute(d).pop("examples"), r"x\.yaml: group registry\.x: .*x\.name needs examples"),
    (lambda d: attribute(d).update(examples=[1]), r"group registry\.x: .*example of attribute x\.name .* type string"),
    (lambda d: attribute(d).update(type="string[]"), r"group registry\.x: .*example of .* type string\[\]"),
    (lambda d: attribute(d).update(type="double", examples=[1]), r"group registry\.x: .*example of .* type double"),
    (lambda d: attribute(d).update(deprecated={"reason": "renamed"}), r"group registry\.x: .*renamed_to"),
    (lambda d: attribute(d).update(colour="red"), r"group registry\.x: .*colour"),
    (lambda d: attribute(d).update(requirement_level="always"), r"group registry\.x: .*requirement_level"),
    (lambda d: attribute(d).update(ref="x.count"), "either an id or a ref"),
    (lambda d: d["groups"][0]["attributes"].append(attribute(d)), r"group registry\.x: .*x\.name is there twice"),
    (lambda d: d["groups"][1]["attributes"].append({"ref": "x.name"}), r"group span\.x: .*x\.name is there twice"),
    (
        lambda d: d["groups"][1].update(attributes=[d["groups"][0]["attributes"][1]]),
        r"group span\.x: attribute x\.count is already declared in x\.yaml",
    ),
    (lambda d: d["groups"][1].update(attributes=[]), r"group span\.x: .*needs attributes"),
    (lambda d: d["groups"][0].update(events=["event.x"]), r"group registry\.x: .*only a span"),
    (lambda d: d["groups"][0]["annotations"]["llmtrace"].update(emiter=1), r"annotations\.llmtrace: emiter"),
    (lambda d: d["groups"][0].update(annotations={}), r"group span\.x: .*who sends"),
    (lambda d: d["groups"][1].update(id="registry.x"), r"group registry\.x: this id is already in x\.yaml"),
    (lambda d: d["groups"][1].pop("span_kind"), r"group span\.x: .*span_kind"),
    (lambda d: d["groups"][0].update(extends="nothing"), r"group registry\.x: it extends nothing"),
    (lambda d: d["groups"].extend(2 * [METRIC]), r"group metric\.x: this id is already"),
    (lambda d: d["groups"].extend([METRIC, METRIC | {"id": "y"}]), r"group y: the metric x\.m is already metric\.x"),
    (lambda d: d["groups"][1].update(extends="nothing"), r"group span\.x: it extends nothing"),
    (lambda d: d["groups"][1].update(extends="span.x"), r"group span\.x: it extends span\.x"),
    (lambda d: d["groups"][1].update(events=["event.x"]), r"group span\.x: .*event\.x, which nothing declares"),
    (lambda d: d["groups"][1]["attributes"].append({"ref": "x.no"}), r"group span\.x: .*x\.no, which nothing declares"),
    (lambda d: d["groups"][1]["attributes"][0].update(type="int"), "must not change its type"),
    (lambda d: span_notes(d).pop("name"), r"group span\.x: annotations\.llmtrace: name"),
    (lambda d: span_notes(d).update(parents=["span.y"]), r"group span\.x: .*span\.y, which nothing declares"),
    (lambda d: span_notes(d).update(links=["span.y"]), r"group span\.x: .*span\.y, which nothing declares"),
    (lambda d: span_notes(d)["scenarios"]["s"].update(attributes=["x.no"]), r"group span\.x: s requires x\.no"),
    (
        lambda d: span_notes(d)["scenarios"]["s"].update(count={"span": "y", "attribute": "x.count"}),
        r"group span\.x: s counts by x\.count of y",
    ),
    (
        lambda d: span_notes(d)["scenarios"]["s"].update(under=["nowhere"]),
        r"group span\.x: s has it under nowhere, which nothing declares",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_a_fault_is_named_with_its_file_and_group(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, changed(change)))


def test_what_is_no_registry_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no YAML file"):
        load(tmp_path)
    for document in ({"groups": "none"}, ["groups"], {"groups": [{"brief": "nameless"}]}):
        with pytest.raises(UserError, match=r"x\.yaml"):
            load(write(tmp_path, document))
    (tmp_path / "x.yaml").write_text("groups: [")
    with pytest.raises(UserError, match="not readable as YAML"):
        load(tmp_path)


def test_what_can_have_a_constant(tmp_path: Path) -> None:
    def named(constant: str) -> dict[str, Any]:
        return {"llmtrace": {"constant": constant}}

    def name_all(d: dict[str, Any]) -> None:
        member = {"id": "one", "value": "1st", "stability": "stable", "annotations": named("FIRST")}
        d["groups"][0]["attributes"].append(
            {"id": "x.kind", "type": {"members": [member]}, "brief": "A kind", "stability": "stable"}
        )
        told = {"brief": "B", "stability": "stable"}
        d["groups"] += [
            {"id": "event.x", "type": "event", "name": "x.event", "annotations": named("EVENT"), **told},
            METRIC | {"annotations": named("METRIC")},
        ]
        attribute(d)["annotations"] = named("NAME")
        span_notes(d).update(name="x *", constant="SPAN")
        group = d["groups"][0]["annotations"]["llmtrace"]
        group["emitter"]["constant"] = "SERVICE"
        group["constants"] = [{"name": "HEADER", "value": "x-header", "brief": "A header"}]

    declared = load(write(tmp_path, changed(name_all)))
    assert [(c.name, c.value, c.brief) for c in declared.constants] == [
        ("SERVICE", "x", "X"),
        ("NAME", "x.name", "A name"),
        ("FIRST", "1st", "A value of x.kind"),
        ("HEADER", "x-header", "A header"),
        ("SPAN", "x ", "A span"),
        ("EVENT", "x.event", "B"),
        ("METRIC", "x.m", "M"),
    ]


def test_a_number_has_no_constant(tmp_path: Path) -> None:
    def number(d: dict[str, Any]) -> None:
        member = {"id": "one", "value": 1, "stability": "stable", "annotations": {"llmtrace": {"constant": "ONE"}}}
        attribute(d).update(type={"members": [member]})

    with pytest.raises(UserError, match=r"x\.yaml: group registry\.x: the value 1 of x\.name is no text"):
        load(write(tmp_path, changed(number)))


def test_two_constants_of_one_name(tmp_path: Path) -> None:
    def twice(d: dict[str, Any]) -> None:
        for entry in d["groups"][0]["attributes"]:
            entry["annotations"] = {"llmtrace": {"constant": "X"}}

    with pytest.raises(UserError, match=r"x\.yaml: the constant X is already in x\.yaml"):
        load(write(tmp_path, changed(twice)))
