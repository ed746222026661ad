"""Folders in which every file may add to a catalogue: adding an attack or a defence is adding a file."""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def catalogue(package: str, path: Iterable[str], listed: str = "ATTACKS") -> dict[str, Any]:
    """Gather the records that the modules of a package list, by name, lowest rank first.

    Args:
        package: its name.
        path: its `__path__`.
        listed: the name of the modules' tuples of records.
    """
    modules = [import_module(f"{package}.{module.name}") for module in iter_modules(path)]
    records = [record for module in modules for record in getattr(module, listed, ())]
    return {record.name: record for record in sorted(records, key=lambda record: (record.rank, record.name))}
