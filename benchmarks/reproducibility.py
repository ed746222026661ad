"""Run the stages of split training anew and compare every tensor, table and figure with those that are there, by hash.

`python benchmarks/reproducibility.py` prints what differs, and exits 1 if anything does.
Seconds and memory (`*timing.json`, `timings/`) do not repeat, and are left out, as are the digests of a run's files.
"""

import hashlib
import shutil
import subprocess
import sys

from splitlab import CACHE, ROOT
from splitlab.core.storage import MARKER


def fingerprints():
    """File -> SHA-256 of every tensor, record, table and figure of the pipeline."""
    found = {}
    for folder in ("runs", "reconstructions", "scores", "reports/figures", "reports/metrics"):
        for path in sorted((ROOT / folder).rglob("*")):
            varies = path.name.endswith("timing.json") or path.parent.name == "timings" or path.name == MARKER
            if path.is_file() and not varies:
                found[str(path.relative_to(ROOT))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main():
    before = fingerprints()
    for kept in ("runs", "attacks"):  # what was computed before would be handed out again
        shutil.rmtree(CACHE / kept, ignore_errors=True)
    stages = ["record-split", "attack-split", "evaluate-split", "figures"]
    subprocess.run(["dvc", "repro", "--force", "--single-item", *stages], cwd=ROOT, check=True)
    after = fingerprints()
    differing = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    print(f"{len(after)} files compared after running {len(stages)} stages again; {len(differing)} differ")
    print("\n".join(differing))
    return 1 if differing or not after else 0


if __name__ == "__main__":
    sys.exit(main())
