"""Captions: texts as they are, or refused; those that a text model cannot take whole are cut on demand only."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from splitlab.core.errors import InputError


@runtime_checkable
class Tokenizer(Protocol):
    """Of a text model: texts to token ids, of which the model takes `model_max_length`."""

    model_max_length: int

    def __call__(self, text: Any) -> Any:
        """Return what has the token ids as `input_ids`."""


def caption(value: Any, column: str) -> str:
    """Return a caption as it is.

    Raises:
        InputError: it is no text, empty, or no Unicode; nothing is chosen or converted silently.
    """
    if isinstance(value, list | tuple):
        raise InputError(f"column {column}: a list of {len(value)} captions; choose one, a text is needed")
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(f"column {column}: no caption; write one, or say columns: {{text: ''}} if the set has none")
    if not isinstance(value, str):
        raise InputError(f"column {column}: {value!r} is a {type(value).__name__}; a text is needed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"column {column}: half a surrogate pair, which is no character; mend the text") from None
    if "\0" in value:
        raise InputError(f"column {column}: a NUL character, which is no part of any text; mend the text")
    return value


def shortened(captions: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Cut captions to the tokens that the text model takes, behind the last word that fits; shorter ones stay."""
    lengths = [len(ids) for ids in tokenizer(list(captions)).input_ids]
    longest = tokenizer.model_max_length
    return [_cut(text, tokenizer) if length > longest else text for text, length in zip(captions, lengths, strict=True)]


def _cut(text: str, tokenizer: Tokenizer) -> str:
    def overflow(end: int) -> bool:
        return len(tokenizer(text[:end]).input_ids) > tokenizer.model_max_length

    words = [word.end() for word in re.finditer(r"\S+", text)]
    ends = range(len(text)) if overflow(words[0]) else words  # one word alone may be too long: then within it
    return text[: ends[bisect_right(ends, False, key=overflow) - 1]]
