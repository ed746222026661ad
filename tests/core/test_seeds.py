import hashlib
import json
import traceback

import numpy as np
import pytest
import torch

from splitlab.core.seeds import Key, generator, source


def draw(*purpose: object) -> list[float]:
    return torch.randn(4, generator=generator(*purpose)).tolist()


def test_a_purpose_repeats_its_draws():
    assert draw(0, "client", 3) == draw(0, "client", 3)


def test_purposes_that_only_look_alike_differ():
    purposes = [(0, "client", 3), (0, "client", "3"), (0, "client3"), (0, "client", 3, 0), (1, "client", 3), ()]
    assert len({tuple(draw(*purpose)) for purpose in purposes}) == len(purposes)


def test_global_random_state_is_neither_read_nor_written():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw("x")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draw("x") == first


def test_draws_are_the_same_on_every_machine_and_in_every_version():
    # Golden: SHA-256 of repr(purpose), computed apart with `printf "(0, 'client', 3)" | sha256sum`; its first 7 bytes
    # are the seed. A change here would silently change every seeded result of the package.
    assert generator(0, "client", 3).initial_seed() == 0xC45F70E87EAC86


FIXED = Key.secret(bytes(range(32)))
"""A secret key that the tests know, so that their statistics do not vary."""


def stream(entropy: bytes, blocks: int) -> bytes:
    return Key.secret(entropy).stream().bit_generator.random_raw(8 * blocks).astype("<u8").tobytes()


def test_the_stream_of_a_secret_key_is_chacha20s():
    """The key streams of RFC 8439, appendix A.1, test vectors 1, 2 and 3: zero nonce, blocks 0 and 1."""
    zero, one = bytes(32), bytes(31) + b"\x01"
    assert stream(zero, 2).hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert stream(one, 2)[64:].hex() == (
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"
    )


def test_a_purposes_key_is_the_keyed_hash_of_the_rest_of_the_purpose():
    expected = hashlib.blake2b(b"(Ellipsis, 'dp noise', 3)", key=bytes(range(32)), digest_size=32).digest()
    ours = source(FIXED, "dp noise", 3)
    assert isinstance(ours, np.random.Generator)
    assert np.array_equal(ours.bit_generator.random_raw(8), Key.secret(expected).stream().bit_generator.random_raw(8))


def test_a_published_key_draws_what_everybody_can_draw():
    for found in (source(Key.published(3), "dp noise", 0), source("client", Key.published(3), 1, 5)):
        assert isinstance(found, torch.Generator)
    assert source(Key.published(3), "dp noise", 0).initial_seed() == generator(3, "dp noise", 0).initial_seed()
    assert source("client", Key.published(3), 1).initial_seed() == generator("client", 3, 1).initial_seed()
    assert Key.published(3).of_client(2) == Key.published(3002)
    assert (Key.published(3).kind, FIXED.kind) == ("published", "secret")


def test_what_rests_on_a_secret_key_cannot_be_drawn_in_public_by_mistake():
    with pytest.raises(AssertionError, match="come from `source`"):
        generator("client", FIXED, 3)
    with pytest.raises(ValueError, match="unpack"):
        source("client", 0, 3)


def test_secret_keys_differ_and_no_text_shows_them():
    one, other = Key.secret(), Key.secret()
    assert one != other
    for key in (one, FIXED, FIXED.derived("x"), FIXED.of_client(1)):
        texts = [repr(key), str(key), f"{key}", repr([key]), json.dumps({"key": key}, default=str)]
        texts.append("".join(traceback.TracebackException(TypeError, TypeError(key), None).format()))
        assert set(texts[:3]) == {"Key(seed=None)"}
        assert not any(key._secret.hex() in text or str(key._secret) in text for text in texts)


def test_keys_of_purposes_and_clients_all_differ():
    purposes = [(FIXED, "x", 3), (FIXED, "x", "3"), ("x", FIXED, 3), (FIXED, "x3"), (FIXED.of_client(0), "x", 3)]
    purposes += [(FIXED.of_client(1), "x", 3), (FIXED.derived("x"), 3), (FIXED,)]
    drawn = {int(source(*purpose).bit_generator.random_raw()) for purpose in purposes}
    assert len(drawn) == len(purposes)


def test_torchs_generators_keep_32_bits_of_a_seed():
    """Why a published stream hides nothing even from those who are not told its seed: all can be tried."""
    near, far = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(1000, generator=near), torch.randn(1000, generator=far))
