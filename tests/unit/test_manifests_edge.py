"""The edge policy of the manifests, in a real Envoy as Istio would put it there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from envoy_process import Gateway, envoy
from loopback import free_ports, receiving
from manifest_renders import PD, find, rendered

from llmtrace.semconv import attributes as a

TRACE_ID = "5" * 32
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-00000000000000aa-01"}
HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


def bootstrap(manager: dict[str, Any], ports: list[int], collector: int) -> dict[str, Any]:
    """An Envoy with one listener, and a cluster for its spans."""
    admin, listener = ports
    address = {"socket_address": {"address": "127.0.0.1", "port_value": collector}}
    http2 = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    return {
        "node": {"id": "gateway", "cluster": "llmtrace"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}},
        "layered_runtime": {
            "layers": [{"name": "static", "static_layer": {"tracing.opentelemetry.flush_interval_ms": 200}}]
        },
        "static_resources": {
            "listeners": [
                {
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": listener}},
                    "filter_chains": [
                        {
                            "filters": [
                                {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
                            ]
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "collector",
                    "type": "STATIC",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
                    },
                    "load_assignment": {
                        "cluster_name": "collector",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
                    },
                }
            ],
        },
    }


def manager(*, patched: bool) -> dict[str, Any]:
    """A connection manager that traces, with the EnvoyFilter's patch and the Telemetry's tags as Istio writes them."""
    found: dict[str, Any] = {
        "@type": HCM,
        "stat_prefix": "gateway",
        "preserve_external_request_id": True,
        "tracing": {
            "provider": {
                "name": "envoy.tracers.opentelemetry",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                    "service_name": "envoy",
                    "grpc_service": {"envoy_grpc": {"cluster_name": "collector"}},
                },
            }
        },
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 503}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                },
            }
        ],
    }
    if patched:
        items = rendered(PD, "gateway-istio", "edge-policy-istio")
        (patch,) = find(items, "EnvoyFilter", "inference-gateway")["spec"]["configPatches"]
        value = patch["patch"]["value"]["typed_config"]
        assert value["@type"] == HCM
        found |= value
        (tracing,) = find(items, "Telemetry", "inference-gateway")["spec"]["tracing"]
        found["tracing"]["custom_tags"] = [
            {"tag": tag, "request_header": told["header"]} for tag, told in tracing["customTags"].items()
        ]
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "edge-policy-istio"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, bool]]:
    folder: Path = tmp_path_factory.mktemp("envoy")
    ports = free_ports(2)
    with receiving() as receiver:
        configuration = folder / "envoy.yaml"
        configuration.write_text(yaml.safe_dump(bootstrap(manager(patched=request.param), ports, receiver.port)))
        with envoy(folder, configuration, ports[0]):
            yield Gateway(f"http://127.0.0.1:{ports[1]}", receiver), request.param


def test_a_callers_trace_is_continued_only_without_the_policy(gateway: tuple[Gateway, bool]) -> None:
    running, patched = gateway
    span = running.ask(TRACEPARENT)
    assert (span.trace_id == TRACE_ID) == (not patched)
    assert span.attributes.get("llmtrace.caller.traceparent") == (TRACEPARENT["traceparent"] if patched else None)


def test_a_client_cannot_say_what_its_context_was(gateway: tuple[Gateway, bool]) -> None:
    running, _ = gateway
    assert "llmtrace.caller.traceparent" not in running.ask({a.CALLER_HEADER: TRACEPARENT["traceparent"]}).attributes


def test_the_tenant_is_told(gateway: tuple[Gateway, bool]) -> None:
    running, patched = gateway
    assert running.ask({a.FAIRNESS_HEADER: "harbour"}).attributes.get(a.TENANT) == ("harbour" if patched else None)
