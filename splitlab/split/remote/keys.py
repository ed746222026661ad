"""Who is who between machines: a certificate authority, certificates for a server and its clients, and their end.

A folder of keys holds the authority (`ca.pem`, `ca.key`), the list of what it issued (`issued.json`), and one folder
per party (`server`, `client-0`, ...) with the files that go to that party's machine: `ca.pem`, `cert.pem`, `key.pem`.
The authority's key stays where it is. Every certificate names its party and its own serial number, and the broker knows
those names alone, so that one certificate can be revoked and another be issued to the same party.
"""

import datetime
import ipaddress
import re
import ssl
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitlab.core import storage
from splitlab.core.checkpoint import load_json, save_json
from splitlab.core.config import parse_exactly
from splitlab.core.errors import InputError, brief

SERVER = "server"
PARTY = re.compile(r"server|client-(0|[1-9][0-9]{0,5})")
FILES = ("ca.pem", "cert.pem", "key.pem")
"""What a party needs: whom to trust, who it is, and its own secret."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Certificate:
    """One certificate of the list.

    Attributes:
        party: "server", or "client-" and the client's number.
        serial: hexadecimal digits.
        expires: the day after which nobody accepts it, ISO 8601.
        revoked: whether the broker has been told not to accept it any more.
    """

    party: str
    serial: str
    expires: str
    revoked: bool = False

    @property
    def user(self) -> str:
        """The name in the certificate by which the broker knows it."""
        return f"{self.party}.{self.serial}.splitlab"

    @property
    def client(self) -> int | None:
        """The client's number; None for a server."""
        return None if self.party == SERVER else int(self.party.removeprefix("client-"))


def make_keys(folder: Path, parties: Sequence[str], *, hosts: Sequence[str] = (), days: int = 365) -> list[Certificate]:
    """Issue a certificate to each party; the authority is made with the first.

    Args:
        folder: the folder of keys; it is made, for its owner alone.
        parties: "server", "client-0", ...; what a party had before stays valid until it is revoked or expires.
        hosts: names and addresses under which clients reach the server, besides this machine's own loopback.
        days: until the certificates expire.

    Raises:
        InputError: a party or host cannot have that name, or the folder cannot be written.
    """
    for party in parties:
        if not PARTY.fullmatch(party):
            raise InputError(f"{party!r:.60} is no party; name 'server', or 'client-' and the client's number")
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with storage.alone(folder, folder / ".lock", "a change of these keys"):
        authority, secret = _authority(folder)
        before = issued(folder) if (folder / "issued.json").exists() else []
        new = [_issue(folder, party, hosts, days, authority, secret) for party in parties]
        save_json(folder / "issued.json", {"certificates": [asdict(certificate) for certificate in before + new]})
    return new


def revoke(folder: Path, party: str) -> list[Certificate]:
    """Revoke all that was issued to a party; a running server's broker drops its connections within seconds.

    Raises:
        InputError: nothing valid was issued to it.
    """
    with storage.alone(folder, folder / ".lock", "a change of these keys"):
        before = issued(folder)
        ended = [replace(each, revoked=True) for each in before if each.party == party and not each.revoked]
        if not ended:
            raise InputError(f"{folder}: {party!r:.60} has no certificate that is valid; see the list in issued.json")
        kept = [replace(each, revoked=True) if each.party == party else each for each in before]
        save_json(folder / "issued.json", {"certificates": [asdict(certificate) for certificate in kept]})
    return ended


def issued(folder: Path) -> list[Certificate]:
    """Read the list of certificates.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "issued.json"
    rows = load_json(path, "certificates")["certificates"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: not a list of certificates; `splitlab keys` makes one")
    return [parse_exactly(Certificate, row, where=str(path)) for row in rows]


def tls(folder: Path) -> ssl.SSLContext:
    """Return how a party connects: it shows its certificate, and accepts a server of its authority's and name alone.

    Args:
        folder: the party's own folder, with `FILES`.

    Raises:
        InputError: a file is missing or not what its name says.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: it lacks {', '.join(missing)}; `splitlab keys` makes this party's folder")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its certificate or key cannot be read ({brief(error)}); issue it again") from None
    return context


def party_of(folder: Path) -> str:
    """Return which party the certificate in a party's folder names.

    Raises:
        InputError: it is no certificate of ours.
    """
    path = folder / "cert.pem"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        name = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a certificate ({brief(error)}); `splitlab keys` issues one") from None
    if not PARTY.fullmatch(name):
        raise InputError(f"{path}: it names {name!r:.60}, no server and no client; `splitlab keys` issues one")
    return name


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Read the authority, or make it: it may sign certificates, and nothing below it may."""
    path = folder / "ca.key"
    if path.exists():
        try:
            secret = serialization.load_pem_private_key(path.read_bytes(), password=None)
            assert isinstance(secret, ec.EllipticCurvePrivateKey)
            return x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()), secret
        except (OSError, ValueError, TypeError, AssertionError) as error:
            raise InputError(f"{path}: this authority cannot be read ({brief(error)}); put its files back") from None
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"splitlab {x509.random_serial_number():x}"[:40])])
    usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    only = {"encipher_only": False, "decipher_only": False, "digital_signature": False}
    builder = _builder(name, name, secret.public_key(), days=3650)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage, **only), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(secret.public_key())
    certificate = builder.add_extension(identifier, critical=False).sign(secret, hashes.SHA256())
    _write(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    _write(path, _pem(secret))
    return certificate, secret


def _issue(
    folder: Path,
    party: str,
    hosts: Sequence[str],
    days: int,
    authority: x509.Certificate,
    secret: ec.EllipticCurvePrivateKey,
) -> Certificate:
    """Sign one certificate, which may serve as a server's only if the party is one, and write the party's folder."""
    own = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, party)])
    builder = _builder(name, authority.subject, own.public_key(), days)
    serial, expires = builder._serial_number, builder._not_valid_after
    assert serial is not None
    assert expires is not None
    certificate = Certificate(party, f"{serial:x}"[:32], expires.date().isoformat())
    names: list[x509.GeneralName] = [x509.DNSName(certificate.user)]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if party == SERVER:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names += [_general_name(host) for host in dict.fromkeys((*LOOPBACK, *hosts))]
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(secret.public_key())
    signed = builder.add_extension(issuer, critical=False).sign(secret, hashes.SHA256())
    place = folder / party
    _write(place / "ca.pem", authority.public_bytes(serialization.Encoding.PEM))
    _write(place / "key.pem", _pem(own))
    _write(place / "cert.pem", signed.public_bytes(serialization.Encoding.PEM))
    return certificate


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    begins = now + datetime.timedelta(days=min(0, days)) - datetime.timedelta(hours=1)  # clocks differ
    return builder.not_valid_before(begins).not_valid_after(now + datetime.timedelta(days=days))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*", host):
        raise InputError(f"host {host!r:.80} is neither a name nor an address; give it as clients reach it")
    return x509.DNSName(host)


def _pem(secret: ec.EllipticCurvePrivateKey) -> bytes:
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return secret.private_bytes(serialization.Encoding.PEM, form, none)


def _write(path: Path, content: bytes) -> None:
    with storage.whole_file(path, private=True) as partial:
        partial.write_bytes(content)
