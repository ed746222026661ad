"""Change messages and files at random, and count what becomes of them: reports/metrics/fuzz.csv.

`python benchmarks/fuzz.py` tries 100,000 messages, transcripts, updates, images and tables each, and a fifth as many of
what only splitlab writes (half an hour on one core); `--n`, `--only` and `--seed` choose others, and then nothing is
written. A crash is any error but InputError. Out of range is what was accepted and does not pass the checks that
`tests/world/fuzz/checks.py` makes apart from the package. Either prints the try's number, which with the seed makes it
again; a run that has one exits with 1.
"""

import argparse
import resource
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from splitlab import ROOT
from splitlab.core.tables import write_table

sys.path.insert(0, str(ROOT / "tests"))
from world.fuzz.changes import Kind, Outcome, attempt
from world.fuzz.kinds import kinds

TABLE = ROOT / "reports/metrics/fuzz.csv"
N, PART = 100_000, 1000
BROUGHT = ("message", "transcript", "update", "image", "metadata")
"""Kinds that people bring; of the others, which splitlab writes for itself, fewer are tried."""

MEMORY = Path("/dev/shm")  # files of a few hundred bytes, written 100,000 times


def main() -> int:
    """Try every kind, print the counts, and write them if every kind was tried in full."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, help="of every kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="kinds")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    try:
        known = kinds(folder)
        if unknown := sorted(set(given.only or ()) - set(known)):
            parser.error(f"no kind is called {', '.join(unknown)}; there: {', '.join(known)}")
        rows = [
            {"kind": name, **_tried(name, kind, given.n or (N if name in BROUGHT else N // 5), given.seed)}
            for name, kind in known.items()
            if not given.only or name in given.only
        ]
    finally:
        shutil.rmtree(folder)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if (given.n, given.seed, given.only) == (None, 0, None):
        write_table(table, TABLE)
    return int(table[["crashes", "out_of_range"]].to_numpy().sum() > 0)


def _tried(name: str, kind: Kind, n: int, seed: int) -> dict[str, float]:
    """Try one kind in parts; return its counts, and the most memory that the process has had so far."""
    total = Outcome()
    for start in tqdm(range(0, n, PART), desc=name, mininterval=5):
        part = attempt(kind, min(PART, n - start), seed=seed, start=start)
        for word in part.first:
            tqdm.write(f"{name}: {word}")
        for count in ("accepted", "refused", "crashes", "out_of_range"):
            setattr(total, count, getattr(total, count) + getattr(part, count))
    counts = {count: value for count, value in asdict(total).items() if count != "first"}
    return {"n": n} | counts | {"peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


if __name__ == "__main__":
    sys.exit(main())
