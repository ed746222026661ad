"""The one long table of results, and the table of settings beside it.

A row of `results.csv` is one number: of which system and setting, by which attack, denied and granted what, over which
timesteps, images and seeds. A row of `settings.csv` says all there is to say of a setting; an id only joins the two.
The wide tables that people read are views of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from splitlab.core.errors import InputError
from splitlab.core.tables import MACHINE, read_table, timed_path, write_table
from splitlab.split.config import Adversary, Defences

SYSTEMS = ("split", "federated", "dp")

KEY = (
    *("system", "setting", "dataset", "attack", "denied", "granted", "used"),
    *("t_low", "t_high", "n", "seeds", "seed", "note"),
)
"""What all numbers of one line of a wide table share.

`denied`: facts that the attack is kept from; `granted`: facts it is given besides what is sent; `used`: sent fields
that it read; each a list separated by spaces. Timesteps are t_low <= t < t_high; empty: all that are drawn. `n`:
images; `seeds`: how many the number is the mean of; `seed`: the one that it is of. `note`: why there is no result.
"""

RESULTS = (*KEY, "metric", "value", "low", "high")
"""Columns of the results; `low` and `high` are the ends of a confidence interval, where one was computed."""

DEFENCES = tuple(field.name for field in fields(Defences))

SETTINGS = (
    *("system", "setting", "name", "kind", "dataset", "scheme", "server", "n_clients", "steps", "randomness"),
    *("defences", *DEFENCES, "epsilon_message", "why_no_epsilon"),
    *("model", "trained", "size", "objective", "update", "defence", "level", "t", "batch", "trainable", "dtype"),
    *("n_trainable", "epsilon", "delta", "noise_multiplier", "max_grad_norm", "sample_rate", "multiplicity"),
    *("features", "conditioning", "n_test", "n_samples"),
)
"""Columns of the settings. `kind`: a "trained" run or a "yardstick" beside it, a transcript of the "survey" of defences
or of many "epochs", the training that shows what a defence "cost"; an "update"; a private "fine-tuning" or what it is
set in "contrast" with. `name`: how a survey calls its setting, whatever the data. `defences`: those that are on, in
words, which the columns behind it hold one by one."""

WHOLE = ("t_low", "t_high", "n", "seeds", "seed", "n_evals", "size", "batch", "n_test", "n_samples")
"""Columns of whole numbers, where none is missing."""

ALIASES = {"run": "setting", "cell": "setting", "n_seeds": "seeds", "refused": "note"}
"""How views call columns."""


@dataclass(frozen=True)
class View:
    """A wide table computed from the long one.

    Attributes:
        system: whose.
        kinds: of settings.
        attacked: of an attack's rows, or of those without one.
        columns: in this order.
    """

    system: str
    kinds: tuple[str, ...]
    attacked: bool
    columns: tuple[str, ...]


VIEWS = {
    "training": View(
        "split",
        ("trained", "yardstick"),
        False,
        (
            *("run", "dataset", "scheme", "defences", "n_clients", "steps", "eval_loss", "control_iou"),
            *("control_edges", "up_bytes_per_sample", "down_bytes_per_sample", "client_s_per_sample"),
            *("server_s_per_sample", "peak_rss_mb", "server"),
        ),
    ),
    "costs": View(
        "split",
        ("cost",),
        False,
        ("dataset", "name", "defences", "steps", "seed", "eval_loss", "control_iou", "control_edges"),
    ),
    "split_attacks": View(
        "split",
        ("trained", "survey", "epochs"),
        True,
        (
            *("run", "kind", "name", "dataset", "defences", "attack", "denied", "used", "t_low", "t_high", "n"),
            *("n_seeds", "psnr_db", "psnr_db_std", "ssim", "mse", "id_top1", "id_chance", "ceiling_psnr_db"),
            *("no_info_psnr_db", "psnr_db_seed_std", "hint_psnr_db", "hint_iou", "hint_id_top1", "prompt_exact"),
            *("n_evals", "cpu_s", "both_id_top1", "randomness"),
        ),
    ),
    "gradient_attacks": View(
        "federated",
        ("update",),
        True,
        (
            *("model", "trained", "dataset", "size", "objective", "update", "defence", "level", "attack", "granted"),
            *("t", "batch", "n", "n_seeds", "ssim", "ssim_std", "psnr_db", "mse", "timestep_exact", "prompt_exact"),
            *("n_evals", "cpu_s", "id_top1", "id_chance", "trainable", "dtype", "ceiling_ssim", "cell", "refused"),
        ),
    ),
    "dp": View(
        "dp",
        ("fine-tuning", "contrast"),
        False,
        (
            *("dataset", "trainable", "n_trainable", "epsilon", "randomness", "delta", "noise_multiplier"),
            *("max_grad_norm", "sample_rate", "steps", "multiplicity", "seed", "downstream_acc", "frechet", "features"),
            *("mia_auc", "audit_epsilon_lb", "step_s", "peak_rss_mb", "conditioning", "n", "n_test", "n_samples"),
        ),
    ),
}
"""`reports/metrics/<name>.csv` -> what it shows; t is empty where each image draws its own, and cpu_s of an attack on
updates is per image; costs are shipped as `utility.csv`."""


@dataclass(frozen=True)
class Results:
    """Both tables, of one system or of all."""

    results: pd.DataFrame
    settings: pd.DataFrame

    def view(self, name: str) -> pd.DataFrame:
        """Return a wide table: one of `VIEWS`, its lines in the order in which they were measured."""
        view = VIEWS[name]
        chosen = self.settings[self.settings["system"].eq(view.system) & self.settings["kind"].isin(view.kinds)]
        rows = self.results.merge(chosen[["system", "setting"]], on=["system", "setting"])
        rows = rows[rows["attack"].notna() == view.attacked]
        lines: dict[tuple[object, ...], dict[str, object]] = {}
        for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
            line = lines.setdefault(tuple(row[name] for name in KEY), {name: row[name] for name in KEY})
            if row["metric"] is not None:
                line[row["metric"]] = row["value"]
        facts = {(row["system"], row["setting"]): row for row in chosen.to_dict("records")}
        sources = {name: ALIASES.get(name, name) for name in view.columns}
        content = [facts[line["system"], line["setting"]] | line for line in lines.values()]
        table = pd.DataFrame(content, columns=list(sources.values())).set_axis(list(sources), axis=1)
        counts = [name for name, source in sources.items() if source in WHOLE and table[name].notna().all()]
        return table.astype(dict.fromkeys(counts, int)).infer_objects()


def words(cell: object) -> tuple[str, ...]:
    """Read a cell that holds a list."""
    return tuple(cell.split()) if isinstance(cell, str) else ()


def adversaries(rows: pd.DataFrame) -> pd.Series:
    """Say of every line of the attack table who attacked."""
    denied = rows["denied"] if "denied" in rows else [None] * len(rows)
    who = [Adversary(str(attack), words(cell)) for attack, cell in zip(rows["attack"], denied, strict=True)]
    return pd.Series(who, index=rows.index, dtype=object)


def by_adversary(rows: pd.DataFrame) -> dict[Adversary, pd.DataFrame]:
    """Divide lines of the attack table by who attacked, in their order."""
    return {who: lines for who, lines in rows.groupby(adversaries(rows), sort=False)}


def by_run(rows: pd.DataFrame) -> dict[tuple[str, Adversary], pd.DataFrame]:
    """Divide lines of the attack table by run and who attacked, in their order."""
    return dict(list(rows.groupby([rows["run"], adversaries(rows)], sort=False)))  # type: ignore[arg-type]


def settings_table(system: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return the settings that a wide table speaks of: of its columns, those of `SETTINGS`.

    Raises:
        InputError: two lines say different things of one setting.
    """
    facts = [name for name in SETTINGS if name in table]
    settings = table[facts].assign(system=system).reindex(columns=list(SETTINGS)).astype(object).drop_duplicates()
    if clash := sorted(settings["setting"][settings["setting"].duplicated()].astype(str)):
        raise InputError(f"{system}: two different settings are both called {', '.join(clash)}; give each its own name")
    return settings.where(settings.notna(), None)


def long_table(system: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return a wide table with a row per number.

    Args:
        system: one of `SYSTEMS`.
        table: a line per setting, attack and timestep bucket, or seed. Columns are those of `KEY` and of `SETTINGS`,
            any others are metrics. Lists are tuples. Numbers are rounded already.
    """
    results: list[dict[str, object]] = []
    for row in table.to_dict("records"):
        cells = {name: " ".join(value) or None if isinstance(value, tuple) else value for name, value in row.items()}
        key = {name: cells[name] for name in KEY if name in cells} | {"system": system}
        metrics = [name for name in cells if name not in KEY and name not in SETTINGS and pd.notna(cells[name])]
        results += [key | {"metric": name, "value": cells[name]} for name in metrics] or [key]
    long = pd.DataFrame(results, columns=list(RESULTS)).astype(object)
    return long.where(long.notna(), None)


def write_dp(grids: Sequence[pd.DataFrame], metrics: Path) -> Results:
    """Write private fine-tuning's part of the results, from the tables of `splitlab.study.dp_survey`; and `dp.csv`."""
    table = pd.concat(grids, ignore_index=True)
    tuned = table["steps"].notna()  # what it is set in contrast with takes none
    names = table["trainable"].where(~tuned, table["trainable"] + table["epsilon"].map(" at {:.2g}".format))
    table = table.assign(name=names, setting=table["dataset"] + ", " + names)
    table = table.assign(kind=tuned.map({True: "fine-tuning", False: "contrast"}))
    found = Results(long_table("dp", table), settings_table("dp", table))
    write_part(found, metrics, "dp")
    return found


def joined(parts: Sequence[Results]) -> Results:
    """Return one table of results and one of settings."""
    results, settings = (pd.concat(tables) for tables in zip(*((p.results, p.settings) for p in parts), strict=True))
    return Results(results.reset_index(drop=True), settings.reset_index(drop=True))


def write_results(found: Results, results: Path, settings: Path) -> None:
    """Write both tables; seconds and memory, which do not repeat, go to `timed_path(results)` only.

    Raises:
        InputError: the disk is full, or the folder cannot be written; earlier tables are still there.
    """
    machine = found.results["metric"].isin(MACHINE)
    tables = {results: found.results[~machine], timed_path(results): found.results[machine], settings: found.settings}
    for path, table in tables.items():
        table = table.infer_objects()
        whole = [name for name in table.select_dtypes("float") if (table[name].dropna() % 1 == 0).all()]
        write_table(table.astype(dict.fromkeys(whole, "Int64")), path)


def read_results(results: Path, settings: Path) -> Results:
    """Read what `write_results` wrote, with the seconds and memory of lines that are as they were then.

    Raises:
        InputError: a table is missing or damaged.
    """
    rows = read_table(results, *RESULTS, empty=True)
    if timed_path(results).exists():
        timed = read_table(timed_path(results), *RESULTS, empty=True)
        every = pd.concat([rows, timed], ignore_index=True)
        keys = every[list(KEY)].map(str).agg(",".join, axis=1)
        rows = every[keys.isin(keys[: len(rows)])]
    return Results(rows, read_table(settings, "system", "setting", "kind", empty=True))


def part(metrics: Path, system: str) -> tuple[Path, Path]:
    """Return where one system's results and settings are before `join_results` puts them together."""
    return metrics / "results" / f"{system}.csv", metrics / "settings" / f"{system}.csv"


def write_part(found: Results, metrics: Path, system: str) -> None:
    """Write one system's results and settings, and those of `VIEWS` that show them."""
    write_results(found, *part(metrics, system))
    for name, view in VIEWS.items():
        if view.system == system and name != "costs":
            write_table(found.view(name), metrics / f"{name}.csv")


def join_results(parts: Path, metrics: Path) -> Results:
    """Write `results.csv` and `settings.csv` below `metrics`: those of all systems, which `write_part` left in `parts`.

    Raises:
        InputError: a system's part is missing or damaged.
    """
    found = joined([read_results(*part(parts, system)) for system in SYSTEMS])
    write_results(found, metrics / "results.csv", metrics / "settings.csv")
    return found
