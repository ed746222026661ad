"""Kill client, server and broker at random, a few hundred times, and compare every bit in the end.

    python benchmarks/remote_faults.py [kills] [seed]

Two clients train a run of the shipped base between processes of this machine (`tests/world/faults.py`). One row per
kill goes to `reports/metrics/remote_faults.csv`, and a last one with the verdict.
"""

import csv
import datetime
import os
import sys
import tempfile
from pathlib import Path

from splitlab.core.paths import ROOT
from splitlab.split.config import TrainConfig
from splitlab.split.train import _processor

sys.path.insert(0, str(ROOT / "tests"))
from world.faults import Scene, storm


def main() -> None:
    """Run the storm on the shipped base and ship its result."""
    kills, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    config = TrainConfig("shapes", n_clients=2, steps=10 * kills, batch_size=4, checkpoint_every=5)
    with tempfile.TemporaryDirectory() as folder:
        rows = storm(Scene(ROOT / "models" / "base", Path(folder), config, 32, pace_s=0.05), kills, seed)
    rows[-1] |= {"date": datetime.date.today().isoformat(), "machine": f"{os.cpu_count()} cores, {_processor()}"}
    path = ROOT / "reports" / "metrics" / "remote_faults.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(rows[-1])


if __name__ == "__main__":
    main()
