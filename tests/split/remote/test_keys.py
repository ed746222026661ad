"""Who is let in, to say what: wrong credentials are refused, and nothing private is told on the way."""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitlab.core.errors import InputError
from splitlab.core.pixels import to_uint8
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import encoded
from splitlab.split.config import Defences
from splitlab.split.remote import link as link_module
from splitlab.split.remote.broker import Broker, Limits, Names, accounts, make_streams
from splitlab.split.remote.client import join
from splitlab.split.remote.keys import issued, make_keys, party_of, revoke
from splitlab.split.remote.link import Link
from splitlab.split.remote.trainer import Run
from splitlab.split.train import make_clients

LIMITS = Limits(10_000, 100, 2**24)


def connected(broker: Broker, folder: Path, host: str = "") -> dict[str, Any]:
    """Say something harmless that every party may ask, and return the answer."""
    address = broker.address if not host else f"{host}:{broker.port}"
    with Link(address, folder, patience_s=1.0) as link:
        found = link.last(Names("tiny").state_stream, Names("tiny").state)
        return {"state": found}


def log(broker: Broker) -> str:
    return (broker.folder / "broker.log").read_text()


@pytest.fixture
def opened(broker: Broker, keys: Path) -> Broker:
    with Link(broker.address, keys / "server", patience_s=10.0) as link:
        make_streams(link, Names("tiny"), LIMITS)
    return broker


def test_every_party_is_let_in_with_its_own_certificate(opened: Broker, keys: Path):
    for party in ("server", "client-0", "client-1"):
        assert party_of(keys / party) == party
        assert connected(opened, keys / party) == {"state": None}


def test_secrets_are_the_owners_alone(keys: Path):
    for path in [*keys.rglob("*.key"), *keys.rglob("key.pem")]:
        assert path.stat().st_mode & 0o077 == 0
    assert keys.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("party", ["server", "client-0"])
def test_another_authoritys_certificate_is_refused_by_either_side(
    opened: Broker, tmp_path: Path, keys: Path, party: str
):
    make_keys(tmp_path / "other", [party])
    with pytest.raises(InputError, match="no connection for"):
        connected(opened, tmp_path / "other" / party)  # it does not trust this server
    forged = tmp_path / "forged"
    forged.mkdir()
    for name, source in (("ca.pem", keys), ("cert.pem", tmp_path / "other"), ("key.pem", tmp_path / "other")):
        (forged / name).write_bytes((source / party / name).read_bytes())
    with pytest.raises(InputError, match=r"no connection for|no answer for"):
        connected(opened, forged)  # the server does not trust it
    assert "TLS handshake error" in log(opened)


def test_an_expired_certificate_is_refused(opened: Broker, keys: Path, tmp_path: Path):
    place = tmp_path / "keys"
    place.mkdir()
    for name in ("ca.pem", "ca.key"):
        (place / name).write_bytes((keys / name).read_bytes())
    make_keys(place, ["client-0"], days=-1)
    with pytest.raises(InputError, match=r"no connection for|no answer for"):
        connected(opened, place / "client-0")
    assert "expired" in log(opened)


def test_a_server_by_another_name_or_without_the_right_to_be_one_is_not_talked_to(
    nats_server: None, keys: Path, tmp_path: Path
):
    open_to_all = Broker(tmp_path / "open", keys, "tiny", LIMITS, listen="0.0.0.0:0")
    with open_to_all, pytest.raises(InputError, match=r"no connection for client-0: .*mismatch"):
        connected(open_to_all, keys / "client-0", "127.0.0.2")  # this machine, by an address that no certificate names
    impostor = Broker(tmp_path / "impostor", _as_server(keys, tmp_path, "client-1"), "tiny", LIMITS)
    with impostor, pytest.raises(InputError, match="no connection for client-0"):
        connected(impostor, keys / "client-0")


def _as_server(keys: Path, tmp_path: Path, party: str) -> Path:
    """Return keys whose server shows the certificate of a client."""
    place = tmp_path / "as-server"
    (place / "server").mkdir(parents=True)
    (place / "issued.json").write_bytes((keys / "issued.json").read_bytes())
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (place / "server" / name).write_bytes((keys / party / name).read_bytes())
    return place


def test_a_server_that_does_without_tls_is_told_nothing(keys: Path):
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(b'INFO {"server_id":"x","max_payload":1048576,"headers":true,"tls_required":false}\r\n')
                heard.append(client.recv(65536))
                client.sendall(b"PONG\r\n")
                heard.append(client.recv(65536))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with (
            pytest.raises(InputError, match=r"without TLS; nothing was sent"),
            Link(f"127.0.0.1:{listener.getsockname()[1]}", keys / "client-0", patience_s=1.0) as link,
        ):
            link.request("splitlab.tiny.message.0", b"a private message")
        thread.join(5)
    assert b"private" not in b"".join(heard)


def test_a_revoked_certificate_is_shut_out_of_a_running_broker_and_its_successor_is_not(
    nats_server: None, tmp_path: Path
):
    keys = tmp_path / "keys"
    make_keys(keys, ["server", "client-0"])
    with Broker(tmp_path / "broker", keys, "tiny", LIMITS) as broker:
        with Link(broker.address, keys / "server", patience_s=5.0) as link:
            make_streams(link, Names("tiny"), LIMITS)
        with Link(broker.address, keys / "client-0", patience_s=1.0) as link:
            link.last(Names("tiny").state_stream, Names("tiny").state)
            (ended,) = revoke(keys, "client-0")
            broker.ensure()
            with pytest.raises(InputError, match="client-0 is not let in"):
                link.last(Names("tiny").state_stream, Names("tiny").state)
            assert "authentication error" in log(broker)
        with pytest.raises(InputError, match="no certificate that is valid"):
            revoke(keys, "client-0")
        (new,) = make_keys(keys, ["client-0"])
        broker.ensure()
        assert new.serial != ended.serial
        assert connected(broker, keys / "client-0") == {"state": None}
    assert [certificate.revoked for certificate in issued(keys)] == [False, True, False]


def test_a_client_may_say_and_hear_what_is_its_own_alone(opened: Broker, keys: Path, monkeypatch: pytest.MonkeyPatch):
    names = Names("tiny")
    forbidden = [
        names.messages(1),
        names.state,
        f"$JS.API.STREAM.DELETE.{names.stream}",
        f"$JS.API.STREAM.PURGE.{names.stream}",
        f"$JS.API.STREAM.MSG.GET.{names.stream}",
        f"$JS.API.CONSUMER.CREATE.{names.stream}",
        f"$JS.API.DIRECT.GET.{names.stream}",
        f"$JS.API.DIRECT.GET.{names.stream}.{names.messages(1)}",
        f"$JS.API.STREAM.INFO.{names.stream}",
        "_INBOX.client-1.forged",
    ]
    for subject in forbidden:
        with (
            pytest.raises(InputError, match=r"refused to client-0: .*ermissions .iolation"),
            Link(opened.address, keys / "client-0", patience_s=5.0) as link,
        ):
            link.request(subject, b"the content of it")
        assert subject in log(opened)
    monkeypatch.setattr(link_module, "party_of", lambda folder: "client-1")  # it listens for answers to another
    with (
        pytest.raises(InputError, match=r"ermissions .iolation for .ubscription"),
        Link(opened.address, keys / "client-0", patience_s=5.0) as link,
    ):
        link.request(names.messages(0), b"x")
    assert "the content of it" not in log(opened)


def test_an_answer_cannot_be_led_to_where_its_client_may_not_speak(opened: Broker, keys: Path):
    """The broker answers a published message where its sender says: that must not be a command to the broker."""
    names = Names("tiny")
    with Link(opened.address, keys / "client-0", patience_s=5.0) as link:

        async def publish() -> None:
            connection = await link._connected()
            for command in ("DELETE", "PURGE"):
                await connection.publish(names.messages(0), b"x", reply=f"$JS.API.STREAM.{command}.{names.stream}")
            await connection.publish(names.messages(0), b"x", reply=names.messages(1))
            await connection.publish(names.messages(0), b"x", reply=names.state)
            await connection.flush()

        link.wait(link.later(publish()))
    with Link(opened.address, keys / "server", patience_s=5.0) as link:
        state = link.api(f"STREAM.INFO.{names.stream}")["state"]
        subjects = [link.wait(link.later(link.at(names.stream, k))) for k in range(1, state["last_seq"] + 1)]
        assert {found[0] for found in subjects if found} == {names.messages(0)}
        assert state["messages"] == 4
        assert link.last(names.state_stream, names.state) is None


def test_headers_cannot_pass_for_the_brokers_own(opened: Broker, keys: Path):
    names = Names("tiny")
    with Link(opened.address, keys / "client-0", patience_s=5.0) as link:
        link.request(names.messages(0), b"", {"Status": "404", "Nats-Subject": names.messages(1), "Nats-Sequence": "9"})
    with Link(opened.address, keys / "server", patience_s=5.0) as link:
        assert link.wait(link.later(link.at(names.stream, 1))) == (names.messages(0), b"")
        assert link.wait(link.later(link.at(names.stream, 2))) is None


def test_a_message_larger_than_the_runs_is_refused_at_the_broker(opened: Broker, keys: Path):
    with Link(opened.address, keys / "client-0", patience_s=5.0) as link:
        answer = json.loads(link.request(Names("tiny").messages(0), bytes(LIMITS.message_bytes + 1)).data)
    assert "size exceeds" in answer["error"]["description"]


def test_names_that_are_no_party_host_or_run_are_refused(tmp_path: Path):
    for party in ("client--1", "client-01", "root", "client-0\n"):
        with pytest.raises(InputError, match="is no party"):
            make_keys(tmp_path / "keys", [party])
    with pytest.raises(InputError, match="neither a name nor an address"):
        make_keys(tmp_path / "keys", ["server"], hosts=["a b"])
    with pytest.raises(InputError, match="a name of letters"):
        Names("a.b")


def test_accounts_come_from_the_certificates_that_are_not_revoked(keys: Path):
    certificates = issued(keys)
    entries = accounts([*certificates[:2], replace(certificates[2], revoked=True)], Names("tiny"))
    assert list(entries) == ["run", "client-0"]
    (user,) = entries["client-0"]["users"]
    assert user["user"] == certificates[1].user
    assert user["permissions"]["subscribe"] == {"allow": ["_INBOX.client-0.>"]}
    assert all("client-1" not in json.dumps(entry) for entry in entries.values())


def test_a_slow_loris_does_not_keep_others_waiting(opened: Broker, keys: Path):
    silent = [socket.create_connection(("127.0.0.1", opened.port)) for _ in range(100)]
    try:
        began = time.monotonic()
        assert connected(opened, keys / "client-0") == {"state": None}
        assert time.monotonic() - began < 5
    finally:
        for one in silent:
            one.close()


def test_no_pixel_and_no_prompt_is_in_logs_states_or_errors(
    private: ImageSet,
    make_run: Callable[..., Run],
    serving: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    """A canary of private data, as pixels, floats and latents, against all bytes that server and broker keep."""
    run = make_run(defences=Defences(feature_noise=1.0, hide_prompts=True, symsigmoid=True), published_key=None)
    server = serving(run)
    (client,) = make_clients(run.base, private, run.config)
    with caplog.at_level("DEBUG"), server.link("client-0") as link:
        join(run, client, link)
        with pytest.raises(InputError) as refused:
            link.request("splitlab.tiny.message.1", private.images[0].numpy().tobytes()[:5000])
    out = server.end()
    kept = [path for folder in (tmp_path / "remote", out) for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".blk" for path in kept)
    stored = b"\0".join(path.read_bytes() for path in kept)
    told = " ".join([caplog.text, str(refused.value), *capfd.readouterr()])
    data = encoded(run.base, private, cache=None)
    pieces = [to_uint8(private.images).numpy(), private.images.numpy(), data.latents.numpy(), data.hint_latents.numpy()]
    pieces += [data.latents.half().numpy(), data.text.numpy()]
    for piece in pieces:
        for sample in piece:
            for canary in _canaries(sample):
                assert canary not in stored
    for prompt in private.prompts:
        assert prompt.encode() not in stored
        assert prompt not in told
    assert not any(character in told for character in "\0\x01\x02")


def _canaries(sample: np.ndarray) -> list[bytes]:
    """Return runs of 24 bytes of one sample, in steps, those that say something."""
    content = np.ascontiguousarray(sample).tobytes()
    runs = [content[start : start + 24] for start in range(0, len(content) - 24, max(24, len(content) // 20))]
    return [run for run in runs if len(set(run)) > 8]
