"""A Kubernetes control plane on loopback: etcd, kube-apiserver, kube-controller-manager, from `make kubernetes`.

In place of nodes there is a stand-in for scheduler and kubelet, which gives pods their conditions.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from deployed import CACHE
from kubernetes_load import NAMESPACE, Sink, served, startup
from loopback import until

from bench.processes import free_ports, process

VERSIONS = Path(__file__).parents[2] / "playbooks" / "vars" / "versions.yml"
ADMIN, WATCHER, AGENT = "admin-token", "watcher-token", "agent-token"
SYNC_S = 5
"""The HPA controller's period; 15 by default."""
READY_S = 60

Object = dict[str, Any]


def program(component: str, name: str) -> str:
    """Path of a program that `make kubernetes` builds."""
    version = yaml.safe_load(VERSIONS.read_text())["versions"][component]
    path = CACHE / component / version / name
    if not path.exists():
        pytest.fail(f"there is no {path}: run `make kubernetes`")
    return str(path)


def stamp(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Nodes(threading.Thread):
    """In place of scheduler, kubelet and vLLM: binds pods, says that images are there, that containers run, that they
    are ready, and ends them; and sends the spans that vLLM would, of its start and of a first request.

    ``seen`` has what it told of each pod by name, in seconds since the epoch.
    """

    def __init__(self, plane: Plane, sink: Sink, step_s: float = 1.2) -> None:
        super().__init__(daemon=True)
        self._plane = plane
        self._sink = sink
        self._step_s = step_s
        self.seen: dict[str, dict[str, float]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            try:
                for pod in self._plane.items("pods"):
                    self._step(pod, time.time())
            except httpx.HTTPError:
                continue

    def close(self) -> None:
        self._ended.set()
        self.join()

    def _step(self, pod: Object, now: float) -> None:
        name = pod["metadata"]["name"]
        told = self.seen.setdefault(name, {})
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{name}"
        last = max(told.values(), default=0.0)
        if now - last < self._step_s:
            return
        if "deletionTimestamp" in pod["metadata"]:
            if "ended" in told:
                self._plane.call("DELETE", path, {"gracePeriodSeconds": 0})
                return
            state = {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": stamp(now)}}
            done = self._status(pod, path, state, now), "ended"
        elif "scheduled" not in told:
            target = {"apiVersion": "v1", "kind": "Node", "name": "node-1"}
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
            done = self._plane.call("POST", f"{path}/binding", binding), "scheduled"
        elif "pulled" not in told:
            done = self._plane.event(pod, "Pulled", 'Container image "vllm" already present on machine', now), "pulled"
        elif "started" not in told:
            done = self._status(pod, path, {"running": {"startedAt": stamp(now)}}, None), "started"
        elif "ready" not in told:
            done = self._status(pod, path, {"running": {"startedAt": stamp(told["started"])}}, now), "ready"
            self._sink.send(startup(name, told["started"]))
        elif "served" not in told:
            self._sink.send(served(name, told["ready"] + 0.2))
            done = {}, "served"
        else:
            return
        answer, what = done
        # What another changed at the same moment is done again.
        if answer.get("status") != "Failure":
            told[what] = now

    def _status(self, pod: Object, path: str, state: Object, ready: float | None) -> Object:
        conditions = [c for c in pod["status"].get("conditions", []) if c["type"] == "PodScheduled"]
        met = ready is not None and "running" in state
        for kind in ("Initialized", "ContainersReady", "Ready"):
            value = "True" if met or kind == "Initialized" else "False"
            conditions.append({"type": kind, "status": value, "lastTransitionTime": stamp(ready or time.time())})
        status = {"name": "vllm", "image": "vllm", "imageID": "", "ready": met, "restartCount": 0, "state": state}
        body = pod | {
            "status": pod["status"] | {"phase": "Running", "conditions": conditions, "containerStatuses": [status]}
        }
        return self._plane.call("PUT", f"{path}/status", body)


@dataclass
class Plane:
    """The control plane that runs, as its administrator sees it."""

    folder: Path
    port: int
    certificate: Path

    def __post_init__(self) -> None:
        self._client = httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}",
            verify=ssl.create_default_context(cafile=str(self.certificate)),
            headers={"Authorization": f"Bearer {ADMIN}"},
            trust_env=False,
            timeout=10,
        )

    def call(self, method: str, path: str, body: Object | None = None) -> Object:
        response = self._client.request(method, path, json=body)
        if response.status_code >= 400 and response.status_code not in (404, 409):
            raise httpx.HTTPError(f"{method} {path}: {response.status_code} {response.text[:300]}")
        return dict(response.json())

    def items(self, plural: str, group: str = "api/v1") -> list[Object]:
        return list(self.call("GET", f"/{group}/namespaces/{NAMESPACE}/{plural}").get("items", []))

    def event(self, pod: Object, reason: str, message: str, now: float) -> Object:
        """An event of a pod's container, as kubelet writes it."""
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        about = {"kind": "Pod", "namespace": NAMESPACE, "name": name, "uid": uid, "fieldPath": "spec.containers{vllm}"}
        body = {
            "metadata": {"name": f"{name}.{reason.lower()}", "namespace": NAMESPACE},
            "involvedObject": about, "reason": reason, "message": message, "type": "Normal", "count": 1,
            "firstTimestamp": stamp(now), "lastTimestamp": stamp(now), "source": {"component": "kubelet"},
        }  # fmt: skip
        return self.call("POST", f"/api/v1/namespaces/{NAMESPACE}/events", body)

    def kubeconfig(self, token: str) -> Path:
        path = self.folder / f"{token}.kubeconfig"
        cluster = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.certificate)}
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(content))
        return path

    def ready(self) -> bool:
        return self.serves("/readyz")

    def serves(self, path: str) -> bool:
        try:
            return self._client.get(path).status_code == 200
        except httpx.HTTPError:
            return False

    @contextmanager
    def api_server(self, etcd_port: int) -> Iterator[None]:
        key = self.folder / "key.pem"
        command = [
            program("kubernetes", "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={self.port}",
            f"--tls-cert-file={self.certificate}", f"--tls-private-key-file={key}",
            f"--token-auth-file={self.folder / 'tokens.csv'}", "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.0.0.0/24",
            "--disable-admission-plugins=ServiceAccount", "--endpoint-reconciler-type=none",
        ]  # fmt: skip
        with process(command, self.folder / "kube-apiserver.log", {}):
            until(self.ready, "kube-apiserver", READY_S)
            yield


def certificate(folder: Path) -> Path:
    """A certificate for loopback, signed by itself, and its key."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1)).add_extension(alternative, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    path = folder / "certificate.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    return path


class Running:
    """A plane with everything in it; the API server can be stopped and started."""

    def __init__(self, plane: Plane, etcd_port: int) -> None:
        self.plane = plane
        self._etcd_port = etcd_port
        self._api = ExitStack()

    def start_api(self) -> None:
        self._api.enter_context(self.plane.api_server(self._etcd_port))

    def stop_api(self) -> None:
        self._api.close()


@contextmanager
def control_plane(folder: Path) -> Iterator[Running]:
    """Run a control plane with the HPA's, the Deployments' and the ReplicaSets' controllers."""
    etcd_port, peer_port, port = free_ports(3)
    cert = certificate(folder)
    (folder / "tokens.csv").write_text(
        f'{ADMIN},admin,admin,"system:masters"\n'
        f'{WATCHER},system:serviceaccount:llmtrace:autoscale,watcher,"system:serviceaccounts"\n'
        f'{AGENT},system:serviceaccount:llmtrace:collector-agent,agent,"system:serviceaccounts"\n'
    )
    plane = Plane(folder, port, cert)
    etcd = [
        program("etcd", "etcd"), f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls=http://127.0.0.1:{etcd_port}", f"--advertise-client-urls=http://127.0.0.1:{etcd_port}",
        f"--listen-peer-urls=http://127.0.0.1:{peer_port}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}",
        f"--initial-cluster=default=http://127.0.0.1:{peer_port}",
    ]  # fmt: skip
    controllers = [
        program("kubernetes", "kube-controller-manager"),
        f"--kubeconfig={plane.kubeconfig(ADMIN)}", "--leader-elect=false",
        "--controllers=horizontal-pod-autoscaler-controller,deployment-controller,replicaset-controller",
        f"--horizontal-pod-autoscaler-sync-period={SYNC_S}s", "--horizontal-pod-autoscaler-downscale-stabilization=5s",
        "--secure-port=0",
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(process(etcd, folder / "etcd.log", {}))
        running = Running(plane, etcd_port)
        running.start_api()
        stack.callback(running.stop_api)
        stack.enter_context(process(controllers, folder / "kube-controller-manager.log", {}))
        yield running
