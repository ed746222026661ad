"""Metadata tables as people have them, CSV and JSON lines, to rows; what is ambiguous is refused, naming the line."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from splitlab.core.errors import InputError

SEPARATORS = (",", ";", "\t")

Row = tuple[int, dict[str, Any]]
"""(the line of the file it ends on, counted from 1; values by column)."""


def read_text(content: bytes) -> str:
    """Decode a table: UTF-8, with or without a byte order mark.

    Raises:
        InputError: it is something else. The message is the reason alone, as in all of this module.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("it is UTF-16 or UTF-32; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"line {line}: byte 0x{content[error.start]:02x} is no UTF-8; save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise InputError(
            f"line {text[: text.index(chr(0))].count(chr(10)) + 1}: a NUL character; save it as UTF-8 text"
        )
    return text


def read_csv(text: str, wanted: Iterable[str]) -> list[Row]:
    """Read a table separated by commas, semicolons or tabs: whichever of them makes the header name a `wanted` column.

    Lines that are empty, or have separators only, are passed over.

    Raises:
        InputError: the header names a column twice or none that is wanted, a row has more or fewer fields than the
            header, or quotes are not closed.
    """
    wanted = set(wanted)
    for separator in SEPARATORS:
        rows = _fields(text, separator)
        _, header = next(rows, (0, []))
        names = [name.strip() for name in header]
        if wanted & set(names):
            return list(_named(names, rows))
    first = text.strip().partition("\n")[0].strip()
    raise InputError(f"the first line, {first[:200]!r}, names no column {' or '.join(sorted(wanted))}")


def _fields(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    spaced = f"{separator} " in text.partition("\n")[0]  # "file_name, text": then the space is no part of the values
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=spaced, strict=True
    )  # strict: a quote that is not closed would swallow the rows that follow
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"line {reader.line_num}: {error}; close each quote, and put text that holds quotes in quotes, doubled"
            ) from None
        if fields is None:
            return
        if any(field.strip() for field in fields):
            yield reader.line_num, fields


def _named(names: list[str], rows: Iterable[tuple[int, list[str]]]) -> Iterable[Row]:
    known = max(index for index, name in enumerate(names, start=1) if name)
    _refuse_twice(names[:known], "the header")
    for index, (line, fields) in enumerate(rows):
        if len(fields) > known and not any(fields[known:]) and len(fields) <= len(names):
            fields = fields[:known]  # a spreadsheet's empty columns on the right
        if len(fields) != known:
            more = "more" if len(fields) > known else "fewer"
            advice = "; put text that holds the separator in quotes" if len(fields) > known else ""
            raise InputError(
                f"row {index} (line {line}) has {len(fields)} fields, {more} than the header's {known}{advice}"
            )
        yield line, dict(zip(names, fields, strict=False))


def read_jsonl(text: str) -> list[Row]:
    """Read one JSON object per line; lines end in line feeds only, since captions may hold other separators.

    Raises:
        InputError: a line is no JSON object, or gives a key twice.
    """
    rows = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content, object_pairs_hook=partial(_object, line=line))
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {line} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"line {line} is no JSON object, but {str(row)[:100]!r}")
        rows.append((line, row))
    return rows


def _object(pairs: list[tuple[str, Any]], line: int) -> dict[str, Any]:
    _refuse_twice([key for key, _ in pairs], f"line {line}")
    return dict(pairs)


def _refuse_twice(names: list[str], where: str) -> None:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"{where} gives {', '.join(map(repr, twice))} twice; give each once")
