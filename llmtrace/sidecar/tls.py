"""TLS of the sidecar: its own certificate, and how it checks that of a model server."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llmtrace.errors import UserError
from llmtrace.watch import watch

CERTIFICATE, KEY = "tls.crt", "tls.key"
VALID_DAYS = 3650


class ServerTls:
    """TLS for those who call the sidecar, with the certificate in ``folder``, or with one that nobody vouches for."""

    def __init__(self, folder: Path | None) -> None:
        self.context = _server_context()
        self._folder = folder
        self._raw: tuple[bytes, bytes] | None = None
        if folder is not None:
            self.load()
            return
        with tempfile.TemporaryDirectory() as temporary:
            write_self_signed(Path(temporary))
            _use(self.context, Path(temporary))

    def load(self) -> None:
        """Use what the folder holds for the next connections, if it changed; raises UserError where it is unusable."""
        folder = self._folder
        if folder is None:
            return
        try:
            raw = (folder / CERTIFICATE).read_bytes(), (folder / KEY).read_bytes()
            if raw == self._raw:
                return
            # Tried apart first: half of a wrong pair would stay in the context.
            _use(_server_context(), folder)
            _use(self.context, folder)
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--cert-path: {CERTIFICATE} and {KEY} in {folder} cannot be used ({reason})") from None
        self._raw = raw

    async def watch(self) -> None:
        """Take up a new certificate."""
        if self._folder is not None:
            await watch(self._folder, self.load, "the certificate stays as it was")


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _use(context: ssl.SSLContext, folder: Path) -> None:
    # With a password, a key that has one is an error and no question at the terminal.
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password="none")  # noqa: S106


def client_context(*, verify: bool) -> ssl.SSLContext:
    """TLS towards model servers; without ``verify`` their certificates are not checked."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def write_self_signed(folder: Path) -> None:
    """Write a new key and a certificate for localhost that is signed with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "llmtrace sidecar")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / KEY).touch(mode=0o600)
    (folder / KEY).write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
