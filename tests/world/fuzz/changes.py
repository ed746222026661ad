"""Files and messages changed at random, and what becomes of them: accepted, refused by one InputError, or a mistake.

A kind says what to change, who reads it, and what an accepted one must be (`kinds`, `checks`).
`benchmarks/fuzz.py` counts; the suite tries a few thousand.
"""

import json
import math
import random
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from splitlab.core.errors import InputError
from world.fuzz import mutations

NAMES = ("timesteps", "noisy_latents", "smashed", "noise", "encoder_hidden_states", "noise_pred", "noise_pred_gradient")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1, "BOOL": 1, "U64": 8, "U32": 4}
SIZES |= {"U16": 2, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F4": 1, "C64": 8, "F99": 4}
ODD: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 599, 999, 1000, 5000, 2**15, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, True, False, None),
    *(0.5, -0.0, 1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf, "", "x", "-1", "1", "٣", "1e3", "nan", "9" * 5000),
    *(
        [],
        {},
        [[]],
        [0],
        [1, 1],
        [-1, -1],
        {"a": 1},
        ["x"] * 3,
        "none",
        "split",
        "central",
        "\0",
        "\ud800",
        "a/b",
        "../x",
    ),
)
PATTERNS = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\x00\x00\x80\xff",
    b"\x00\x7e",
)


@dataclass
class Kind:
    """One kind of input.

    Attributes:
        originals: good ones.
        read: returns what the package makes of the bytes, or raises an InputError.
        check: returns what is wrong with what was accepted; nothing where it is in range.
        changed: the mutation.
    """

    originals: list[bytes]
    read: Callable[[bytes], Any]
    check: Callable[[Any, bytes], list[str]]
    changed: Callable[[bytes, random.Random], bytes]


@dataclass
class Outcome:
    """What became of the tries of a kind: counts, and the first few that went wrong, to be tried again by number."""

    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    out_of_range: int = 0
    first: list[str] = field(default_factory=list)


def attempt(kind: Kind, n: int, *, seed: int = 0, start: int = 0) -> Outcome:
    """Try `n` mutations of a kind's originals in turn."""
    outcome = Outcome()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(start, start + n):
            original = kind.originals[number % len(kind.originals)]
            _one(kind, kind.changed(original, random.Random(f"{seed}/{number}")), number, outcome)
    return outcome


def _one(kind: Kind, content: bytes, number: int, outcome: Outcome) -> None:
    try:
        read = kind.read(content)
    except InputError:
        outcome.refused += 1
        return
    except Exception:
        outcome.crashes += 1
        _keep(outcome, f"try {number}: {traceback.format_exc(limit=-4)}")
        return
    outcome.accepted += 1
    problems = kind.check(read, content)
    if problems:
        outcome.out_of_range += 1
        _keep(outcome, f"try {number}: {'; '.join(problems)}")


def _keep(outcome: Outcome, words: str) -> None:
    if len(outcome.first) < 5:
        outcome.first.append(words)


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a safetensors buffer's header and body."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(header: Any, body: bytes) -> bytes:
    """Return a safetensors buffer whose header is valid JSON, whatever it says."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed_tensors(content: bytes, draw: random.Random) -> bytes:
    """Return a safetensors buffer with bytes, header, metadata or values changed."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        try:
            header, body = parts(content)
        except (ValueError, struct.error, RecursionError):
            return mutations.mutated(content, draw)
        change = draw.choice((_bytes, _entry, _entry, _leaf, _metadata, _metadata, _values, _values))
        try:
            content = change(header, body, content, draw)
        except (TypeError, KeyError, ValueError, AttributeError, IndexError):  # a header that is none any more
            content = mutations.mutated(content, draw)
    return content


def _bytes(header: dict[str, Any], body: bytes, content: bytes, draw: random.Random) -> bytes:
    return mutations.mutated(content, draw)


def _entry(header: dict[str, Any], body: bytes, content: bytes, draw: random.Random) -> bytes:
    """Change one tensor's entry so that the buffer often stays consistent."""
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return content
    name = draw.choice(names)
    entry = header[name]
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return content
    what = draw.randrange(6)
    if what == 0:
        width = SIZES.get(str(entry.get("dtype")), 4)
        entry["dtype"] = draw.choice([d for d, size in SIZES.items() if size == width or draw.random() < 0.1])
    elif what == 1:
        draw.shuffle(entry["shape"])
    elif what == 2:
        entry["shape"] = draw.choice(([math.prod(entry["shape"])], [1, *entry["shape"]], [*entry["shape"], 1], [0, 9]))
    elif what == 3:
        header[draw.choice((*NAMES, "x", "000000/noise", "000001/noise", "clean", "images"))] = header.pop(name)
    elif what == 4:
        other = draw.choice(names)
        entry["data_offsets"], header[other]["data_offsets"] = header[other].get("data_offsets"), entry["data_offsets"]
    else:
        del header[name]
        if draw.random() < 0.8:  # and its bytes, so that the rest stays consistent
            return _without(header, body, entry)
    return put_together(header, body)


def _without(header: dict[str, Any], body: bytes, entry: dict[str, Any]) -> bytes:
    first, last = entry["data_offsets"]
    for name, other in header.items():
        if name != "__metadata__" and other["data_offsets"][0] >= last:
            other["data_offsets"] = [place - (last - first) for place in other["data_offsets"]]
    return put_together(header, body[:first] + body[last:])


def _leaf(header: dict[str, Any], body: bytes, content: bytes, draw: random.Random) -> bytes:
    return put_together(changed_json(header, draw), body)


def _metadata(header: dict[str, Any], body: bytes, content: bytes, draw: random.Random) -> bytes:
    """Change what a file says of itself: JSON in the entry `meta`, or a message's envelope."""
    told = header.get("__metadata__")
    if isinstance(told, dict) and isinstance(told.get("meta"), str):
        try:
            told["meta"] = json.dumps(changed_json(json.loads(told["meta"]), draw))
        except (ValueError, RecursionError):
            told["meta"] += draw.choice(("[", "}", "\0"))
    elif isinstance(told, dict) and told:
        value = draw.choice(ODD)
        told[draw.choice(list(told))] = value if draw.random() < 0.2 else str(value)
    return put_together(header, body)


def _values(header: dict[str, Any], body: bytes, content: bytes, draw: random.Random) -> bytes:
    """Put odd bit patterns, NaN and infinity among them, into the values."""
    changed = bytearray(body)
    for _ in range(draw.choice((1, 1, 4))):
        pattern = draw.choice(PATTERNS)
        width = draw.choice((2, 4, 8))
        place = draw.randrange(max(1, len(changed) // width)) * width
        changed[place : place + width] = (pattern * width)[:width]
    return put_together(header, bytes(changed[: len(body)]))


def changed_json(content: Any, draw: random.Random) -> Any:
    """Return JSON with one value replaced by an odd one, left out, doubled, renamed or wrapped."""
    places = list(_places(content))
    if not places:
        return draw.choice(ODD)
    parent, key = draw.choice(places)
    what = draw.randrange(5)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[draw.choice((*NAMES, "x", "", "version", "meta"))] = parent.pop(key)
    elif what == 2 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif what == 3:
        parent[key] = draw.choice(([parent[key]], {"x": parent[key]}, str(parent[key])))
    else:
        parent[key] = draw.choice(ODD)
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


def changed_text(content: bytes, draw: random.Random) -> bytes:
    """Return a JSON file with bytes or values changed."""
    if draw.random() < 0.4:
        return mutations.mutated(content, draw)
    return json.dumps(changed_json(json.loads(content), draw)).encode()
