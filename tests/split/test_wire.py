import json
import random
import struct
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_bytes
from world import tiny

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.split.config import Defences
from splitlab.split.messages import OBSERVATION_FIELDS, Observation, Truth, stack
from splitlab.split.wire import (
    Header,
    from_bytes,
    read_server,
    read_transcript,
    read_truth,
    to_bytes,
    write_transcript,
    write_truth,
)

HEADER = Header(
    run="r",
    dataset="tiny",
    scheme="split",
    defences=Defences(timestep_floor=600),
    size=16,
    base="ab" * 32,
    n_clients=2,
)


def message(client: int = 1, sequence: int = 5, *, batch: int = 2, seed: int = 0) -> Observation:
    draw = tiny.draw(seed)
    latents = [torch.randn(batch, 4, 2, 2, generator=draw) for _ in range(3)]
    text = torch.randn(batch, 3, 6, generator=draw)
    return Observation(client, sequence, torch.randint(600, 1000, (batch,), generator=draw), *latents, text)


def same(one: Observation, other: Observation) -> bool:
    return (
        (one.client, one.sequence) == (other.client, other.sequence)
        and set(one.tensors) == set(other.tensors)
        and all(torch.equal(v, other.need(k)) and v.dtype == other.need(k).dtype for k, v in one.tensors.items())
    )


def envelope(**changes: str) -> dict[str, str]:
    return {"v": "1", "c": "1", "s": "5"} | changes


def raw(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize("seed", range(3))
def test_a_message_crosses_the_wire_bit_for_bit(seed: int):
    sent = message(seed, 10 + seed, batch=seed + 1, seed=seed)
    assert same(from_bytes(to_bytes(sent)), sent)


def test_equal_messages_have_equal_bytes():
    # what is sent again after a crash is recognised by its bytes; the library's own order of entries is random
    assert len({to_bytes(message()) for _ in range(30)}) == 1


def test_fp16_and_fields_not_sent_cross_the_wire_too():
    sent = message().without("encoder_hidden_states")
    sent = sent.map(lambda t: t.half() if t.is_floating_point() else t.to(torch.int16))
    received = from_bytes(to_bytes(sent))
    assert same(received, sent)
    assert received.encoder_hidden_states is None


def test_special_floats_survive():
    # negative zero, the smallest subnormal and the largest float32 are where careless conversions show
    odd = torch.tensor([-0.0, 1.401298464324817e-45, 3.4028234663852886e38, -1.0]).reshape(1, 1, 2, 2)
    received = from_bytes(to_bytes(Observation(0, 0, noise=odd))).need("noise")
    assert torch.equal(received.view(torch.int32), odd.view(torch.int32))


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, 100, -1])
def test_a_truncated_message_is_refused(keep: int):
    with pytest.raises(InputError, match=r"corrupt message .*; ask the client to send it again"):
        from_bytes(to_bytes(message())[:keep])


def test_a_message_with_bytes_appended_is_refused():
    with pytest.raises(InputError, match="corrupt message"):
        from_bytes(to_bytes(message()) + b"\0")


def test_no_flip_of_a_header_byte_gets_anything_but_an_input_error():
    good = to_bytes(message())
    refused = 0
    for position in range(8 + int.from_bytes(good[:8], "little")):
        bad = bytearray(good)
        bad[position] ^= 0x5A
        try:
            from_bytes(bytes(bad))
        except InputError:
            refused += 1
    # a flipped digit of `client` or `sequence` may be another digit; nearly everything else is noticed
    assert refused > position - 8


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_refused(seed: int):
    source = random.Random(seed)
    with pytest.raises(InputError, match="corrupt message"):
        from_bytes(source.randbytes(source.randrange(400)))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b"{}",
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"v": "1"}}',
        b'{"__metadata__": {"v": "1", "c": "one", "s": "5"}}',
        b'{"__metadata__": {"v": "1", "c": "%s", "s": "5"}}' % (b"9" * 5000),
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"__metadata__": {"v":"1","c":"0","s":"0"}, "noise": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"v":"1","c":"0","s":"0"}, "noise": {"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"v":"1","c":"0","s":"0"},"noise":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}',
    ],
)
def test_hostile_headers_are_refused(header: bytes):
    with pytest.raises(InputError, match="corrupt message"):
        from_bytes(raw(header, b"\0" * 4))


def test_a_message_over_the_limit_is_refused_before_it_is_parsed():
    sent = to_bytes(message())
    assert same(from_bytes(sent, max_bytes=len(sent)), message())
    with pytest.raises(InputError, match=f"of {len(sent)} bytes refused: the limit is {len(sent) - 1}; send smaller"):
        from_bytes(sent, max_bytes=len(sent) - 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["noisy_latents", "smashed", "noise", "encoder_hidden_states"])
def test_a_value_that_is_not_finite_is_refused_by_field(field: str, bad: float):
    sent = message()
    sent.need(field)[1, -1] = bad
    with pytest.raises(InputError, match=f"message 5 of client 1: {field} holds NaN or infinity"):
        from_bytes(to_bytes(sent))


def test_an_unknown_field_is_refused_by_name():
    sent = save_bytes({"noise": torch.zeros(1, 4, 2, 2), "labels": torch.zeros(1)}, metadata=envelope())
    with pytest.raises(InputError, match="message 5 of client 1: unknown field labels; known: timesteps, "):
        from_bytes(sent)


def test_another_protocol_version_is_refused():
    sent = save_bytes({"noise": torch.zeros(1, 4, 2, 2)}, metadata=envelope(v="2"))
    with pytest.raises(InputError, match="protocol version 2, expected 1; update the older side"):
        from_bytes(sent)


def test_fields_of_different_batch_sizes_are_refused():
    sent = save_bytes({"noise": torch.zeros(2, 4, 2, 2), "timesteps": torch.zeros(3).long()}, metadata=envelope())
    with pytest.raises(InputError, match=r"fields of different batch sizes .*'timesteps': \(3,\)"):
        from_bytes(sent)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timesteps", torch.zeros(2, 1, dtype=torch.int64)),
        ("timesteps", torch.zeros(2)),
        ("timesteps", torch.zeros(2, dtype=torch.bool)),
        ("noise", torch.zeros(2, 4, 4)),
        ("noise", torch.zeros(2, 4, 2, 2, dtype=torch.int64)),
        ("noise", torch.zeros(2, 4, 2, 2, dtype=torch.float64)),
        ("smashed", torch.zeros(2, 4, 2, 2, dtype=torch.complex64)),
        ("noisy_latents", torch.tensor(0.0)),
        ("encoder_hidden_states", torch.zeros(2, 4, 2, 2)),
    ],
)
def test_a_field_of_the_wrong_shape_or_type_is_refused(field: str, value: torch.Tensor):
    says = f"message 5 of client 1: {field} is {value.dtype} of shape .*; expected . axes of torch"
    with pytest.raises(InputError, match=says):
        from_bytes(save_bytes({field: value}, metadata=envelope()))


def test_transcript_observations_are_the_decoded_messages(tmp_path: Path):
    wired = [to_bytes(message(i % 2, i // 2, seed=i)) for i in range(12)]
    wired[3] = to_bytes(message(1, 1, seed=3).without("encoder_hidden_states"))
    write_transcript(tmp_path / "t", HEADER, wired)
    read = read_transcript(tmp_path / "t", base_digest=HEADER.base)
    assert read.header == HEADER
    assert len(read.observations) == 12
    assert all(same(one, from_bytes(other)) for one, other in zip(read.observations, wired, strict=True))


def test_an_empty_transcript_can_be_kept(tmp_path: Path):
    write_transcript(tmp_path / "t", HEADER, [])
    write_truth(tmp_path / "truth", [])
    assert read_transcript(tmp_path / "t").observations == ()
    assert len(read_truth(tmp_path / "truth").indices) == 0


def rewrite(path: Path, *, tensors: dict | None = None, drop: list[str] | None = None, **meta: object) -> None:
    old_tensors, old_meta = checkpoint.load(path)
    kept = {key: value for key, value in old_tensors.items() if key not in (drop or [])}
    checkpoint.save(path, kept | (tensors or {}), old_meta | meta)


@pytest.fixture
def transcript(tmp_path: Path) -> Path:
    write_transcript(tmp_path / "transcript.safetensors", HEADER, [to_bytes(message())])
    return tmp_path / "transcript.safetensors"


def test_a_transcript_of_another_version_is_refused(transcript: Path):
    rewrite(transcript, header=asdict(HEADER) | {"version": 7})
    with pytest.raises(InputError, match=r"transcript\.safetensors: transcript version 7, expected 1; record it again"):
        read_transcript(transcript)


def test_a_header_with_fields_missing_is_refused_by_name(transcript: Path):
    header = asdict(HEADER)
    del header["scheme"], header["base"]
    rewrite(transcript, header=header)
    with pytest.raises(InputError, match=r"transcript\.safetensors: its header lacks base, scheme; record it again"):
        read_transcript(transcript)


def test_a_header_with_a_field_too_many_or_ill_typed_is_refused(transcript: Path):
    rewrite(transcript, header=asdict(HEADER) | {"key": 3})
    with pytest.raises(InputError, match=r"header: unknown key key"):
        read_transcript(transcript)
    rewrite(transcript, header=asdict(HEADER) | {"size": "16"})
    with pytest.raises(InputError, match=r"header\.size: expected int, got '16'"):
        read_transcript(transcript)


def test_a_transcript_of_another_base_model_is_refused(transcript: Path):
    with pytest.raises(InputError, match=f"recorded with base model {'ab' * 6}, not with {'cd' * 6}; load the model"):
        read_transcript(transcript, base_digest="cd" * 32)
    assert read_transcript(transcript).header.base == HEADER.base  # without a digest that check is skipped


def test_a_missing_transcript_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.safetensors: no such file"):
        read_transcript(tmp_path / "gone.safetensors")


def test_a_safetensors_file_that_is_no_transcript_is_refused(tmp_path: Path):
    checkpoint.save(tmp_path / "weights", {"w": torch.zeros(2)}, {})
    with pytest.raises(InputError, match="weights: not a splitlab transcript"):
        read_transcript(tmp_path / "weights")
    with pytest.raises(InputError, match="weights: not a truth file"):
        read_truth(tmp_path / "weights")


def test_a_transcript_is_checked_as_strictly_as_a_message(transcript: Path):
    rewrite(transcript, tensors={"000000/noise": torch.full((2, 4, 2, 2), float("nan"))})
    with pytest.raises(InputError, match=r"transcript\.safetensors: message 5 of client 1: noise holds NaN"):
        read_transcript(transcript)


@pytest.mark.parametrize("key", ["000001/noise", "stray", "x/noise"])
def test_a_tensor_that_belongs_to_no_message_is_refused(transcript: Path, key: str):
    rewrite(transcript, tensors={key: torch.zeros(2, 4, 2, 2)})
    with pytest.raises(InputError, match=f"tensor {key} belongs to no message"):
        read_transcript(transcript)


@pytest.mark.parametrize("envelopes", [[[1]], [3], [["a", "b"]], [[1, 2, 3]]])
def test_envelopes_that_name_no_sender_are_refused(transcript: Path, envelopes: list):
    rewrite(transcript, envelopes=envelopes)
    with pytest.raises(InputError, match=r"transcript\.safetensors: not a splitlab transcript"):
        read_transcript(transcript)


def sent(**changes: torch.Tensor) -> bytes:
    """Return a message of one sample with some fields changed, as whoever builds one by hand would."""
    return to_bytes(message(batch=1).changed(**changes))


@pytest.mark.parametrize("timestep", [-1, 1000, 5000, -(2**62), 2**62])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_timesteps_that_no_schedule_has_are_refused(timestep: int, dtype: torch.dtype):
    if dtype == torch.int16 and not -(2**15) <= timestep < 2**15:
        pytest.skip("no such number in 16 bits")
    with pytest.raises(InputError, match=rf"timesteps from {timestep} to {timestep}; they must lie in \[0, 1000\)"):
        from_bytes(sent(timesteps=torch.tensor([timestep], dtype=dtype)))


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("noise", (1, 4, 2, 3)),
        ("noise", (1, 3, 2, 2)),
        ("noise_pred", (1, 4, 4, 4)),
        ("smashed", (1, 4, 1, 2)),
        ("smashed", (1, 9, 4, 4)),
    ],
)
def test_fields_of_different_shapes_are_refused(field: str, shape: tuple[int, ...]):
    with pytest.raises(InputError, match=r"message 5 of client 1: fields of different shapes .*latents' size"):
        from_bytes(sent(**{field: torch.zeros(shape)}))
    wide = from_bytes(sent(smashed=torch.zeros(1, 9, 2, 2)))  # a trained hint encoder has channels of its own
    assert wide.need("smashed").shape == (1, 9, 2, 2)


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (1, 0, 2, 2), (1, 4, 0, 2)])
def test_a_message_without_content_is_refused(shape: tuple[int, ...]):
    with pytest.raises(InputError, match="message 5 of client 1: it is empty"):
        from_bytes(save_bytes({"noise": torch.zeros(shape)}, metadata=envelope()))
    with pytest.raises(InputError, match="message 5 of client 1: it is empty"):
        from_bytes(save_bytes({}, metadata=envelope()))


@pytest.mark.parametrize("number", ["-1", "+1", " 1", "1 ", "01", "1_0", "1.0", "1e3", "", "９", "9" * 19, "0x1"])
@pytest.mark.parametrize("name", ["c", "s"])
def test_numbers_that_are_negative_huge_or_written_in_another_way_are_refused(number: str, name: str):
    with pytest.raises(InputError, match=r"corrupt message .* is no number from 0 on"):
        from_bytes(save_bytes({"noise": torch.zeros(1, 4, 2, 2)}, metadata=envelope(**{name: number})))


@pytest.mark.parametrize(
    "metadata", [{}, {"v": "1", "c": "1"}, {"v": "1", "c": "1", "s": "1", "key": "secret"}], ids=["none", "few", "more"]
)
def test_an_envelope_of_other_entries_is_refused(metadata: dict):
    with pytest.raises(InputError, match="corrupt message"):
        from_bytes(save_bytes({"noise": torch.zeros(1, 4, 2, 2)}, metadata=metadata))


def test_a_name_given_twice_is_refused():
    entry = b'"noise":{"dtype":"F32","shape":[1,1,1,1],"data_offsets":[0,4]}'
    meta = b'"__metadata__":{"v":"1","c":"1","s":"5"}'
    assert from_bytes(raw(b"{%s,%s}" % (meta, entry), b"\0" * 4)).client == 1
    for header in (b"{%s,%s,%s}" % (meta, entry, entry), b"{%s,%s,%s}" % (meta, meta.replace(b'"1"', b'"0"'), entry)):
        with pytest.raises(InputError, match="corrupt message"):
            from_bytes(raw(header, b"\0" * 4))


def test_a_header_larger_than_any_message_needs_is_refused_unparsed():
    header = b'{"__metadata__":{"v":"1","c":"1","s":"5"},"pad":[' + b"[]," * 10_000 + b"[]]}"
    with pytest.raises(InputError, match=f"corrupt message .a header of {len(header)} bytes"):
        from_bytes(raw(header))
    with pytest.raises(InputError, match="corrupt message"):
        from_bytes((2**63).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (to_bytes(message(2, 5)), "the run has clients 0 to 1; ask who sent it"),
        (sent(timesteps=torch.tensor([599])), r"timesteps from 599 to 599; they must lie in \[600, 1000\)"),
        (sent(noise_pred=torch.zeros(1, 4, 2, 2)), "carries noise_pred, which this run withholds"),
        (
            sent(**{name: torch.zeros(1, 4, 3, 3) for name in ("noisy_latents", "noise", "smashed")}),
            "no map of images of 16 pixels",
        ),
    ],
)
def test_what_the_runs_header_rules_out_is_refused(tmp_path: Path, transcript: Path, bad: bytes, says: str):
    observation = from_bytes(bad)
    rewrite(
        transcript,
        drop=[key for key in checkpoint.load(transcript)[0]],
        tensors={f"000000/{name}": value for name, value in observation.tensors.items()},
        envelopes=[[observation.client, observation.sequence]],
    )
    with pytest.raises(InputError, match=rf"transcript\.safetensors: message 5 of client .: .*{says}"):
        read_transcript(transcript)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (
            replace(HEADER, defences=Defences(hide_prompts=True)),
            "carries encoder_hidden_states, which this run withholds",
        ),
        (replace(HEADER, scheme="u_shaped"), "carries noise, which this run withholds"),
        (replace(HEADER, defences=Defences(half=True)), "is torch.int64, and this run sends 16 bits"),
        (replace(HEADER, scheme="central", defences=Defences()), "scheme 'central' sends no messages, here are 1"),
    ],
)
def test_a_message_that_the_runs_scheme_or_defences_rule_out_is_refused(transcript: Path, header: Header, says: str):
    if header.scheme != "central":
        with pytest.raises(InputError, match=says):
            write_transcript(transcript, header, [to_bytes(message())])
    rewrite(transcript, header=asdict(header))
    with pytest.raises(InputError, match=rf"transcript\.safetensors: .*{says}"):
        read_transcript(transcript)


@pytest.mark.parametrize(
    "change",
    [
        {"n_clients": 0},
        {"n_clients": -1},
        {"size": 0},
        {"size": 2**40},
        {"scheme": "none"},
        {"n_clients": True},
        {"n_clients": "2"},
        {"size": None},
        {"defences": {"timestep_floor": "600"}},
        {"defences": {"timestep_floor": -1}},
        {"defences": {"feature_noise": float("nan")}},
        {"defences": {"feature_noise": float("inf")}},
        {"defences": {"feature_noise": "1e0"}},
        {"defences": {"unknown": 1}},
        {"defences": []},
        {"run": 3},
    ],
)
def test_a_header_of_values_that_no_run_has_is_refused(transcript: Path, change: dict):
    rewrite(transcript, header=asdict(HEADER) | change)
    with pytest.raises(InputError, match=r"transcript\.safetensors: header"):
        read_transcript(transcript)


def test_the_base_model_at_hand_says_what_shapes_a_run_has(base: Base, private: ImageSet, tmp_path: Path):
    text = torch.zeros(1, *base.text_shape)
    noisy, smashed, noise = (torch.zeros(1, *base.latent_shape(private.size)) for _ in range(3))
    header = replace(HEADER, size=private.size, base=base.digest)
    good = Observation(0, 0, torch.tensor([700]), noisy, smashed, noise, text)
    bad = {
        "noisy_latents": good.map(lambda value: value[:, :3] if value.ndim == 4 else value),
        "encoder_hidden_states": good.changed(encoder_hidden_states=text[:, 1:]),
        "smashed": good.changed(smashed=smashed[:, :3]),
    }
    write_transcript(tmp_path / "good", header, [to_bytes(good)])
    assert len(read_transcript(tmp_path / "good", base=base).observations) == 1
    for name, observation in bad.items():
        write_transcript(tmp_path / name, header, [to_bytes(observation)])
        with pytest.raises(InputError, match=f"message 0 of client 0: {name} of .* per sample, in this run"):
            read_transcript(tmp_path / name, base=base)


def test_messages_that_do_not_go_together_are_refused(tmp_path: Path):
    twice = [to_bytes(message(1, 5, seed=seed)) for seed in range(2)]
    write_transcript(tmp_path / "twice", HEADER, twice)
    with pytest.raises(InputError, match="message 5 of client 1 is there twice"):
        read_transcript(tmp_path / "twice")
    other = message(1, 6).map(lambda value: value.repeat(1, 1, 2, 2) if value.ndim == 4 else value)
    write_transcript(tmp_path / "shapes", HEADER, [twice[0], to_bytes(other)])
    with pytest.raises(InputError, match=r"message 6 of client 1: .* has another shape than before"):
        read_transcript(tmp_path / "shapes")


@pytest.mark.parametrize("key", ["0/noise", "0000000/noise", "00000²/noise", "+00000/noise", "000000/noise/x"])
def test_a_key_written_in_another_way_is_refused(transcript: Path, key: str):
    rewrite(transcript, tensors={key: torch.zeros(2, 4, 2, 2)})
    with pytest.raises(InputError, match=r"transcript\.safetensors: .*(belongs to no message|unknown field)"):
        read_transcript(transcript)


@pytest.mark.parametrize("envelopes", [[[-1, 0]], [[0, -1]], [[2**63, 0]], [[True, 0]], [[0.0, 0]], [], [[0, 0]] * 2])
def test_envelopes_out_of_range_or_number_are_refused(transcript: Path, envelopes: list):
    rewrite(transcript, envelopes=envelopes)
    with pytest.raises(InputError, match=r"transcript\.safetensors"):
        read_transcript(transcript)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"000000/timesteps": torch.tensor([1000, 0])}, r"a timestep outside \[0, 1000\)"),
        ({"000000/timesteps": torch.tensor([-1, 0])}, "a timestep outside"),
        ({"000000/indices": torch.tensor([-1, 0])}, "an index below 0"),
        ({"000000/indices": torch.tensor([1.0, 0.0])}, "indices is torch.float32"),
        ({"000000/indices": torch.tensor([0])}, "differ in size or shape"),
        ({"000000/noise": torch.zeros(2, 4, 2)}, "noise is torch.float32 of shape"),
        ({"000000/noise": torch.full((2, 4, 2, 2), torch.nan)}, "noise holds NaN"),
        ({"000001/noise": torch.zeros(2, 4, 2, 2)}, "not a truth file"),
        ({"000000/images": torch.zeros(2, 3, 2, 2)}, "not a truth file"),
    ],
)
def test_a_truth_that_no_client_had_is_refused(tmp_path: Path, change: dict, says: str):
    sent = message()
    write_truth(tmp_path / "truth", [Truth(torch.arange(2), sent.need("timesteps"), sent.need("noise"))])
    rewrite(tmp_path / "truth", tensors=change)
    with pytest.raises(InputError, match=f"truth: .*{says}"):
        read_truth(tmp_path / "truth")


def test_truths_of_different_shapes_are_refused(tmp_path: Path):
    truths = [Truth(torch.arange(1), torch.arange(1), torch.zeros(1, 4, side, side)) for side in (2, 3)]
    write_truth(tmp_path / "truth", truths)
    with pytest.raises(InputError, match="differ in size or shape"):
        read_truth(tmp_path / "truth")


def test_a_server_that_is_not_finite_is_refused(tmp_path: Path):
    checkpoint.save(tmp_path / "server", {"decoder.weight": torch.tensor([1.0, torch.inf])}, {})
    with pytest.raises(InputError, match=r"decoder\.weight holds NaN or infinity"):
        read_server(tmp_path / "server")


def test_truth_is_aligned_with_the_stacked_messages(tmp_path: Path):
    messages = [message(0, i, batch=2 + i, seed=i) for i in range(3)]
    truths = [Truth(torch.arange(m.batch_size), m.need("timesteps"), m.need("noise")) for m in messages]
    write_truth(tmp_path / "truth", truths)
    read, whole = read_truth(tmp_path / "truth"), stack(messages)
    assert torch.equal(read.timesteps, whole.need("timesteps"))
    assert torch.equal(read.noise, whole.need("noise"))
    assert read.indices.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]


def test_a_transcript_holds_no_field_beyond_the_observation(transcript: Path):
    tensors, meta = checkpoint.load(transcript)
    assert {key.partition("/")[2] for key in tensors} <= set(OBSERVATION_FIELDS)
    assert set(meta) == {"header", "envelopes"}
    assert set(json.loads(json.dumps(meta["header"]))) == set(asdict(HEADER))


def test_what_a_malicious_server_trained_is_read_by_name_and_an_honest_ones_is_empty(tmp_path: Path):
    checkpoint.save(tmp_path / "a.safetensors", {"decoder.weight": torch.ones(2)}, {})
    checkpoint.save(tmp_path / "b.safetensors", {}, {})
    assert read_server(tmp_path / "a.safetensors")["decoder.weight"].tolist() == [1.0, 1.0]
    assert read_server(tmp_path / "b.safetensors") == {}
    with pytest.raises(InputError, match="no such file"):
        read_server(tmp_path / "c.safetensors")
