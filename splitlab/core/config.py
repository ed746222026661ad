"""One frozen dataclass per section of params.yaml, whose annotations say which values a field takes."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, get_type_hints

from splitlab.core.errors import InputError

T = TypeVar("T")

NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", re.ASCII)
"""A decimal number as YAML 1.2 writes it."""


@dataclass(frozen=True)
class Rule:
    """Which values a field takes, as part of its annotation: `steps: Count = 600`.

    Attributes:
        holds: whether a value will do.
        says: the error if not, with places for `{name}` and `{value}`.
    """

    holds: Callable[[Any], bool]
    says: str


Count = Annotated[int, Rule(lambda value: value >= 1, "{name} must be 1 or more, got {value}")]
Natural = Annotated[int, Rule(lambda value: value >= 0, "{name} must be 0 or more, got {value}")]
Level = Annotated[float, Rule(lambda value: 0 <= value < math.inf, "{name} must be 0 or more and finite, got {value}")]
Positive = Annotated[float, Rule(lambda value: 0 < value < math.inf, "{name} must be positive and finite, got {value}")]
Share = Annotated[float, Rule(lambda value: 0 < value <= 1, "{name} must be in (0, 1], got {value}")]


def one_of(known: Collection[str]) -> Rule:
    """Return the rule for `Annotated[str, one_of(NAMES)]`."""
    return Rule(lambda value: value in known, "{name} {value!r} is unknown; choose one of " + ", ".join(known))


class Settings:
    """Refuses, wherever it is made, values that its fields' annotations rule out; further checks follow `super`."""

    def __post_init__(self) -> None:
        """Refuse values that a rule forbids."""
        for name, rule in _rules(type(self)):  # type: ignore[arg-type]
            if not rule.holds(value := getattr(self, name)):
                raise InputError(rule.says.format(name=name, value=value))


@cache
def _rules(kind: type) -> tuple[tuple[str, Rule], ...]:
    hints = get_type_hints(kind, include_extras=True)
    annotated = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return tuple((name, rule) for name, rules in annotated.items() for rule in rules if isinstance(rule, Rule))


def parse(kind: type[T], values: object, *, where: str) -> T:
    """Build the dataclass `kind` from a section of params.yaml, keys and values; `where` names it in errors.

    Raises:
        InputError: a key is unknown, or a value is of the wrong type or not allowed.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected keys and values, got {values!r}")
    hints = get_type_hints(kind)
    unknown = sorted(map(str, set(values) - set(hints)))
    if unknown:
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; known keys: {', '.join(hints)}")
    needed = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)  # type: ignore[arg-type]
    missing = [name for name in needed if name not in values]
    if missing:
        raise InputError(f"{where}: key {', '.join(missing)} is missing; give it a value")
    arguments = {key: _coerce(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return kind(**arguments)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def parse_exactly(kind: type[T], values: object, *, where: str) -> T:
    """Build a dataclass from JSON that a program wrote: as `parse`, but text is never taken for a number.

    Raises:
        InputError: see `parse`.
    """
    result = parse(kind, values, where=where)
    _compare(values, asdict(result), where)  # type: ignore[call-overload]
    return result


def _compare(given: Any, read: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        if isinstance(value, Mapping):
            _compare(value, read[name], f"{where}.{name}")
        elif value != read[name]:
            raise InputError(f"{where}.{name}: expected {type(read[name]).__name__}, got {value!r}; write it again")


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, UnionType):  # `int | None`, as in `published_key`
        return None if value is None else _coerce(hint.__args__[0], value, where)
    if is_dataclass(hint):
        return parse(hint, value, where=where)  # type: ignore[arg-type]
    origin = getattr(hint, "__origin__", None)
    if origin is dict and isinstance(value, Mapping):
        if other := [key for key in value if not isinstance(key, str)]:
            raise InputError(f"{where}: the key {other[0]!r} is no text; put it in quotes")
        return {key: _coerce(hint.__args__[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(hint.__args__[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin in (tuple, dict):
        raise InputError(f"{where}: expected {'a list' if origin is tuple else 'keys and values'}, got {value!r}")
    if hint not in (int, float, bool, str):
        return value
    result = _number(hint, value) if hint in (int, float) else value
    if not isinstance(result, hint):
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}{_advice(hint, value)}")
    return result


def _number(kind: type, value: Any) -> int | float | None:
    """Return `value` as an int or a float if nothing is lost by it, else None. YAML 1.1 reads 1e-4 as text."""
    if isinstance(value, str) and NUMBER.fullmatch(value) and math.isfinite(float(value)):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    if isinstance(value, int):
        return kind(value) if abs(value) < 2**63 else None
    return value if kind is float else int(value) if abs(value) < 2**53 and value.is_integer() else None


def _advice(hint: type, value: Any) -> str:
    """Say how a value is written that YAML takes for something else."""
    if hint is str:
        return '; leave the key out, or write "" for nothing' if value is None else "; put it in quotes"
    if value is None:
        return "; leave the key out for its default"
    if hint is float and str(value).lower().lstrip("+-") in ("inf", "infinity"):
        return "; write .inf for infinity"
    return (
        "; write true or false" if hint is bool else "; write a number such as 0.0001 or 1e-4" if hint is float else ""
    )


def reseeded(config: T, seed: int) -> T:
    """Return a run's configuration with another seed, and with a published key that differs by as much, if any."""
    before: Any = config
    key = before.published_key
    return replace(before, seed=seed, published_key=None if key is None else key + seed - before.seed)
