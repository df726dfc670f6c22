"""What runs on the test cluster: the kit's manifests, with stand-ins for what this machine cannot run.

Real: the Collector's agents and gateway, Prometheus, Envoy, vLLM with the plugin from its ConfigMap, NIXL between the
pods of prefill and decode servers, all but Envoy by the kit's own manifests. Stand-ins: the embedded store for Tempo,
Envoy with the embedded picker for a Gateway and llm-d's router, the embedded sidecar for llm-d's, vLLM for CPUs for
vLLM for GPUs (its environment and the kit's are mounted from this machine), and volumes of pods for volumes that last.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from deployed import installed, render
from machines import CACHE, NETWORK, SUBNETS

from llmtrace.deploy.playbook import CHECKOUT, default_variables

LOCAL = default_variables()
VLLM = CACHE / "vllm" / LOCAL["vllm_version"]
MODEL = CACHE / "model" / f"SmolLM2-135M-Instruct-{LOCAL['model_package_version']}"
COLLECTOR = installed(f"collector/{LOCAL['collector_version']}-*/otelcol")
PROMETHEUS = CACHE / "prometheus" / LOCAL["prometheus_version"] / "prometheus"
ENVOY = CACHE / "envoy" / LOCAL["envoy_version"] / "envoy/_bin/envoy"
NIXL = CACHE / "nixl" / LOCAL["nixl_version"]
PYTHON = Path(sys.base_prefix)
KIT = [CHECKOUT, PYTHON, *([] if Path(sys.prefix).is_relative_to(CHECKOUT) else [Path(sys.prefix)])]
SHARED = [*KIT, VLLM, MODEL, NIXL]
"""Folders of this machine that the machines, and pods on them, see at the same path."""
LIBC = ["libc6", "libgcc-s1", "gcc-12-base"]
SYSTEM = [
    *(*LIBC, "libstdc++6", "libnuma1", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5"),
    *("libsqlite3-0", "libreadline8", "libncursesw6", "libtinfo6", "libuuid1", "libcrypt1", "libbsd0", "libmd0"),
    *(
        "python3-minimal",
        "python3.11-minimal",
        "libpython3.11-minimal",
        "libpython3.11-stdlib",
        "dash",
        "util-linux",
        "libsmartcols1",
    ),
]
IMAGES: list[dict[str, Any]] = [
    {
        "name": f"docker.io/otel/opentelemetry-collector-contrib:{LOCAL['collector_version']}",
        "program": str(COLLECTOR),
        "entrypoint": True,
    },
    {
        "name": f"quay.io/prometheus/prometheus:v{LOCAL['prometheus_version']}",
        "program": str(PROMETHEUS),
        "entrypoint": True,
    },
    {"name": "llmtrace.test/envoy:1", "program": str(ENVOY), "packages": LIBC, "entrypoint": True},
    {"name": "llmtrace.test/system:1", "packages": SYSTEM},
]
STAND_INS = "stand-ins"
PICKER = "llm-d-epp"
MODEL_NAME = "smollm2-135m"
KV_BLOCK_SIZE: int = LOCAL["vllm_block_size"]
GATEWAY_ADDRESS = "10.96.0.80"
"""Of the gateway's service: among those that Kubernetes does not choose itself."""
STORE_PORT = 3200

Object = dict[str, Any]


def missing() -> list[Path]:
    """What `make demo` installs and is not there."""
    return [path for path in (VLLM, MODEL, NIXL, COLLECTOR, PROMETHEUS, ENVOY) if not path.exists()]


def ports(scenario: str) -> Mapping[str, int]:
    """Port of the gateway by the scenario's arms."""
    found: Mapping[str, int] = LOCAL["gateway_ports"][scenario]
    return found


def write(folder: Path, kustomization: Object, objects: Sequence[Object] = ()) -> Path:
    """A folder for kustomize with ``objects``."""
    folder.mkdir(parents=True, exist_ok=True)
    resources = list(kustomization.get("resources", []))
    if objects:
        (folder / "objects.yaml").write_text(yaml.safe_dump_all(objects))
        resources.append("objects.yaml")
    whole = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **kustomization,
        "resources": resources,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return folder


def _base(folder: Path, name: str) -> str:
    return os.path.relpath(CHECKOUT / "manifests" / name, folder)


def _patch(kind: str, name: str, *operations: Object) -> Object:
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(list(operations))}


def _in_the_pod(name: str, volume: str) -> Object:
    """The patch by which a StatefulSet keeps its data as long as its pod: there is no storage class."""
    return _patch(
        "StatefulSet",
        name,
        {"op": "remove", "path": "/spec/volumeClaimTemplates"},
        {"op": "add", "path": "/spec/template/spec/volumes/-", "value": {"name": volume, "emptyDir": {}}},
    )


def _env(*pairs: tuple[str, str]) -> list[Object]:
    return [{"name": name, "value": value} for name, value in pairs]


def _volume(path: Path) -> str:
    """Name of the volume of a folder of the host."""
    return f"host-{SHARED.index(path)}"


def _mounts(paths: Sequence[Path]) -> dict[str, list[Object]]:
    return {
        "volumes": [{"name": _volume(path), "hostPath": {"path": str(path), "type": "Directory"}} for path in paths],
        "volumeMounts": [{"name": _volume(path), "mountPath": str(path), "readOnly": True} for path in paths],
    }


def observability(folder: Path) -> Path:
    """The Collector and Prometheus as the kit has them, every trace kept, and the store under Tempo's name."""
    kit = _mounts(KIT)
    labels = {"app.kubernetes.io/name": "store"}
    store: list[Object] = [
        _namespace(STAND_INS),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "tempo", "namespace": "llmtrace"},
            "spec": {"type": "ExternalName", "externalName": f"store.{STAND_INS}.svc.cluster.local"},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "store", "namespace": STAND_INS},
            "spec": {
                "selector": labels,
                "ports": [
                    {"name": "http", "port": STORE_PORT, "targetPort": STORE_PORT},
                    {"name": "otlp-http", "port": 4318, "targetPort": STORE_PORT},
                ],
            },
        },
        _deployment(
            "store",
            labels,
            [
                {
                    "name": "store",
                    "image": "llmtrace.test/system:1",
                    "command": [
                        *(f"{sys.prefix}/bin/python", "-m", "llmtrace.traces.store", "--host=0.0.0.0"),
                        *(f"--port={STORE_PORT}", "--db=/data/traces.duckdb"),
                    ],
                    "workingDir": str(CHECKOUT),
                    "env": _env(("HOME", "/data")),
                    "readinessProbe": {"httpGet": {"path": "/ready", "port": STORE_PORT}, "periodSeconds": 2},
                    "volumeMounts": [*kit["volumeMounts"], {"name": "data", "mountPath": "/data"}],
                }
            ],
            [*kit["volumes"], {"name": "data", "emptyDir": {}}],
        ),
    ]
    return write(
        folder,
        {
            "resources": [_base(folder, f"base/{name}") for name in ("observability", "collector", "prometheus")],
            "components": [_base(folder, "components/images")],
            "patches": [
                _in_the_pod("collector-gateway", "queue"),
                _in_the_pod("prometheus", "data"),
                _patch(
                    "StatefulSet",
                    "collector-gateway",
                    {
                        "op": "add",
                        "path": "/spec/template/spec/containers/0/env/-",
                        "value": {"name": "SAMPLED_PERCENT", "value": "100"},
                    },
                    {
                        "op": "add",
                        "path": "/spec/template/spec/containers/0/env/-",
                        "value": {"name": "DECISION_WAIT_AFTER_ROOT", "value": "3s"},
                    },
                    {
                        "op": "replace",
                        "path": "/spec/template/spec/containers/0/resources/requests/cpu",
                        "value": "100m",
                    },
                ),
            ],
            # kustomize wants the configuration that the gateway has for Tempo's rules too.
            "configMapGenerator": [
                {
                    "name": "prometheus-rules",
                    "namespace": "llmtrace",
                    "files": [os.path.relpath(CHECKOUT / "grafana/alerts/llmtrace.yaml", folder)],
                }
            ],
        },
        store,
    )


def model_servers(folder: Path, replicas: int) -> Path:
    """The kit's model servers, each for whole requests."""
    return write(
        folder,
        {
            "resources": [_base(folder, "base/serving"), _base(folder, "base/model-server")],
            "images": [_image("vllm")],
            "patches": [{"patch": yaml.safe_dump(_vllm("model-server", 8000, replicas=replicas))}, _privileged()],
        },
    )


def disaggregated_servers(folder: Path) -> Path:
    """The kit's prefill server and its decode server behind the sidecar, on different machines."""
    scenario = "scenarios/pd-disaggregation"
    decode = _vllm("model-server-decode", 8200, node="gpu-2", kv_role="kv_both")
    mounts = _mounts(KIT)
    pod = decode["spec"]["template"]["spec"]
    pod["volumes"] += [each for each in mounts["volumes"] if each not in pod["volumes"]]
    pod["initContainers"] = [
        {
            "name": "disagg-sidecar",
            "command": [f"{sys.prefix}/bin/python", "-m", "llmtrace.sidecar"],
            "args": [
                *("--bind-address=0.0.0.0", "--port=8000", "--model-server-port=8200", "--kv-connector=nixlv2"),
                *("--secure-proxy=false", "--tracing=true"),
            ],
            "workingDir": str(CHECKOUT),
            "env": _env(("OTEL_EXPORTER_OTLP_INSECURE", "true"), ("OTEL_BSP_SCHEDULE_DELAY", "500")),
            "resources": {"requests": {"cpu": "100m"}},
            "volumeMounts": mounts["volumeMounts"],
        }
    ]
    prefill = _vllm("model-server-prefill", 8000, node="gpu-1", kv_role="kv_producer")
    return write(
        folder,
        {
            "resources": [_base(folder, f"{scenario}/{role}") for role in ("prefill", "decode")]
            + [_base(folder, "base/serving")],
            "images": [_image("vllm"), _image("disagg-sidecar")],
            "patches": [*({"patch": yaml.safe_dump(each)} for each in (prefill, decode)), _privileged()],
        },
    )


def _image(name: str) -> Object:
    """What kustomize puts in place of the image that the kit's manifests call ``name``."""
    return {"name": name, "newName": "llmtrace.test/system", "newTag": "1"}


def _privileged() -> Object:
    """The patch for folders of the host, which are not `restricted`."""
    enforce = "/metadata/labels/pod-security.kubernetes.io~1enforce"
    return _patch("Namespace", "llm-d", {"op": "replace", "path": enforce, "value": "privileged"})


def _vllm(name: str, port: int, *, replicas: int = 1, node: str = "", kv_role: str = "") -> Object:
    """The patch by which a Deployment of the kit has vLLM's environment of this machine in place of its image."""
    mounts = _mounts([VLLM, MODEL, NIXL, PYTHON])
    transfer = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_buffer_device": "cpu"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "llm-d"},
        "spec": {
            "replicas": replicas,
            "template": {
                "metadata": {"labels": {"llm-d.ai/model": MODEL_NAME}},
                "spec": {
                    # The mounted folders are root's own.
                    "securityContext": {"runAsNonRoot": False, "runAsUser": 0, "runAsGroup": 0},
                    **({"nodeSelector": {"kubernetes.io/hostname": node}} if node else {}),
                    "containers": [
                        {
                            "name": "vllm",
                            "command": [str(VLLM / "bin/python"), "-m", "vllm.entrypoints.openai.api_server"],
                            "args": [
                                *(f"--model={MODEL}", f"--served-model-name={MODEL_NAME}", f"--port={port}"),
                                *("--dtype=bfloat16", "--max-model-len=4096", "--enforce-eager"),
                                *(f"--block-size={KV_BLOCK_SIZE}", "--gpu-memory-utilization=0.15"),
                                f"--kv-cache-memory-bytes={LOCAL['vllm_kv_cache_bytes']}",
                                "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor",
                                *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
                                "--otlp-traces-endpoint=http://collector-agent.llmtrace:4317",
                                *([f"--kv-transfer-config={json.dumps(transfer)}"] if kv_role else []),
                            ],
                            "env": _env(
                                ("PYTHONPATH", f"/plugins:{NIXL}"),
                                ("HF_HUB_OFFLINE", "1"),
                                ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
                                ("OMP_NUM_THREADS", "1"),
                                ("TOKENIZERS_PARALLELISM", "false"),
                                ("OTEL_BSP_SCHEDULE_DELAY", "500"),
                                # One kernel lies beneath all machines, and UCX would take it for shared memory.
                                ("UCX_TLS", "tcp"),
                                ("UCX_NET_DEVICES", "eth0"),
                            ),
                            "resources": {
                                "requests": {"cpu": "500m", "memory": "2Gi", "nvidia.com/gpu": "1"},
                                "limits": {"memory": "6Gi", "nvidia.com/gpu": "1"},
                            },
                            "volumeMounts": mounts["volumeMounts"],
                        }
                    ],
                    "volumes": mounts["volumes"],
                },
            },
        },
    }


@dataclass(frozen=True)
class Endpoint:
    """A model server's pod as the picker knows it."""

    name: str
    address: str
    role: str

    @property
    def entry(self) -> Object:
        """Its entry in the endpoints file."""
        labels = {"llm-d.ai/inference-serving": "true", "llm-d.ai/model": MODEL_NAME}
        role = {} if self.role == "both" else {"llm-d.ai/role": self.role}
        return {
            "name": self.name,
            "namespace": "llm-d",
            "address": self.address,
            "port": "8000",
            "labels": {**labels, **role},
        }


def gateway(folder: Path, scratch: Path, scenario: str, endpoints: Sequence[Endpoint]) -> Path:
    """Envoy and a picker for each arm of a scenario, in one pod, configured as in the local stack."""
    etc = render(scratch, {"scenario": scenario, "trace_context_networks": [NETWORK, SUBNETS[0]]})
    envoy = yaml.safe_load((etc / "envoy.yaml").read_text())
    for listener in envoy["static_resources"]["listeners"]:
        listener["address"]["socket_address"]["address"] = "0.0.0.0"
    agent = {"address": "collector-agent.llmtrace.svc.cluster.local", "port_value": 4317}
    for found in envoy["static_resources"]["clusters"]:
        if found["name"] == "collector":
            found["type"] = "STRICT_DNS"
            found["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"] = agent
    arms = ports(scenario)
    pods = [endpoint.entry for endpoint in endpoints]
    files = {"envoy.yaml": yaml.safe_dump(envoy), "endpoints.yaml": yaml.safe_dump({"endpoints": pods})}
    for arm in arms:
        files[picker_file(arm)] = (etc / f"picker-{arm}.yaml").read_text().replace(str(etc), "/config")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    kit = _mounts(KIT)
    config = {"name": "config", "mountPath": "/config", "readOnly": True}
    labels = {"app.kubernetes.io/name": "gateway"}
    containers: list[Object] = [
        {
            "name": "envoy",
            "image": "llmtrace.test/envoy:1",
            "args": ["--config-path", "/config/envoy.yaml", "--concurrency", "1", "--disable-hot-restart"],
            "env": _env(("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=gateway")),
            "readinessProbe": {"tcpSocket": {"port": min(arms.values())}, "periodSeconds": 2},
            "volumeMounts": [config],
        },
        *(_picker(scenario, arm, [*kit["volumeMounts"], config]) for arm in arms),
    ]
    objects: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "gateway", "namespace": STAND_INS},
            "spec": {
                "selector": labels,
                "clusterIP": GATEWAY_ADDRESS,
                "ports": [{"name": arm, "port": port, "targetPort": port} for arm, port in arms.items()],
            },
        },
        _deployment(
            "gateway", labels, containers, [*kit["volumes"], {"name": "config", "configMap": {"name": "gateway"}}]
        ),
    ]
    return write(
        folder,
        {"configMapGenerator": [{"name": "gateway", "namespace": STAND_INS, "files": sorted(files)}]},
        objects,
    )


def picker_file(arm: str) -> str:
    """Name of an arm's EndpointPickerConfig in the folder of :func:`gateway`."""
    return f"picker-{arm}.yaml"


def _picker(scenario: str, arm: str, mounts: Sequence[Object]) -> Object:
    found = LOCAL["picker_ports"][scenario][arm]
    return {
        "name": f"picker-{arm}",
        "image": "llmtrace.test/system:1",
        "command": [
            *(f"{sys.prefix}/bin/python", "-m", "llmtrace.picker", "--pool-name=llm-d", "--pool-namespace=llm-d"),
            *(f"--config-file=/config/{picker_file(arm)}", f"--grpc-port={found['grpc']}"),
            *(f"--grpc-health-port={found['health']}", f"--metrics-port={found['metrics']}"),
        ],
        "workingDir": str(CHECKOUT),
        "env": _env(
            ("OTEL_SERVICE_NAME", PICKER),
            ("OTEL_RESOURCE_ATTRIBUTES", f"service.instance.id={arm}"),
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector-agent.llmtrace:4317"),
            ("OTEL_EXPORTER_OTLP_INSECURE", "true"),
            ("OTEL_BSP_SCHEDULE_DELAY", "500"),
        ),
        "volumeMounts": list(mounts),
    }


def _namespace(name: str) -> Object:
    labels = {"llmtrace.traced": "true", "pod-security.kubernetes.io/enforce": "privileged"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def _deployment(
    name: str, labels: Mapping[str, str], containers: Sequence[Object], volumes: Sequence[Object]
) -> Object:
    # vLLM's thread for NIXL is never idle, and takes all time from who asks for none.
    asking = [{**each, "resources": {"requests": {"cpu": "200m"}}} for each in containers]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": STAND_INS},
        "spec": {
            "selector": {"matchLabels": dict(labels)},
            "strategy": {"type": "Recreate"},
            "template": {
                "metadata": {"labels": dict(labels)},
                "spec": {"containers": asking, "volumes": list(volumes), "terminationGracePeriodSeconds": 5},
            },
        },
    }
