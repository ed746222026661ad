"""Result tables: what repeats is a file that git keeps; seconds and memory go to a file that it does not."""

from pathlib import Path

import pandas as pd

from splitlab.core import checkpoint, storage
from splitlab.core.errors import InputError

MACHINE = ("cpu_s", "step_s", "client_s_per_sample", "server_s_per_sample", "peak_rss_mb")
"""Columns of seconds and memory, which differ from machine to machine and from run to run."""


def timed_path(path: Path) -> Path:
    """Return where the seconds and memory of the table at `path` are: in `timings` beside it."""
    return path.parent / "timings" / path.name


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a result table without its `MACHINE` columns, and the whole of it to `timed_path(path)`.

    Raises:
        InputError: the disk is full, or the folder cannot be written; an earlier table is still there.
    """
    repeats = table.drop(columns=[name for name in MACHINE if name in table])
    files = {path: repeats} if len(repeats.columns) == len(table.columns) else {path: repeats, timed_path(path): table}
    for file, content in files.items():
        with storage.whole_file(file) as partial:
            content.to_csv(partial, index=False, lineterminator="\n")


def read_timed(path: Path) -> pd.DataFrame:
    """Read a result table with all `MACHINE` columns: NaN where nothing was measured, or for a row that differs since.

    Raises:
        InputError: the table is missing, damaged or empty.
    """
    table, beside = read_table(path), timed_path(path)
    lacking = [name for name in MACHINE if name not in table]
    measured = (read_table(beside) if beside.exists() else table).reindex(columns=[*table.columns, *lacking])
    measured.index = _texts(measured[table.columns])
    measured = measured[~measured.index.duplicated()].reindex(_texts(table))
    return table.assign(**{name: measured[name].to_numpy() for name in lacking})


def _texts(rows: pd.DataFrame) -> pd.Index:
    """Write each row as one text, to find it again."""
    return pd.Index(rows.map(str).agg(",".join, axis=1))


def read_table(path: Path, *columns: str, empty: bool = False) -> pd.DataFrame:
    """Read a result table; `columns`: those it must have; `empty`: one without rows will do.

    Raises:
        InputError: it is missing, damaged or empty, or lacks a column.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])  # the defences "none" are a word
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run `dvc repro` first, which makes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); {checkpoint.REMADE}") from None
    lacking = [name for name in columns if name not in table]
    if lacking:
        raise InputError(f"{path}: it has no column {', '.join(lacking)}; name a folder of splitlab's tables")
    if table.empty and not empty:
        raise InputError(f"{path}: it has no rows; {checkpoint.REMADE}")
    return table
