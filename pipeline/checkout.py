"""What `make` asks before it installs or fetches anything: is there room, and are the shipped files the shipped ones?

`python pipeline/checkout.py room GB` and `python pipeline/checkout.py files` print one error and exit 1 if not. Nothing
is ever changed. `room` needs the standard library only: there is no environment yet.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BYSTANDERS = (".gitignore", ".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that systems and tools leave in any folder."""


def room(gigabytes: float) -> str | None:
    """Return what is wrong with the place: it cannot be written, or is too full; None if nothing is."""
    if not os.access(ROOT, os.W_OK):
        return f"{ROOT} cannot be written by this user; clone into a folder of your own"
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < gigabytes:
        return f"{ROOT}: {free:.1f} GB are free, {gigabytes:g} GB are needed; make room, or clone to another disk"
    return None


def files() -> str | None:
    """Return what lies in `data/` or `models/base` and is not the project's; None if nothing does."""
    from ruamel.yaml import YAML

    reader = YAML(typ="safe")
    outs = reader.load((ROOT / "data.dvc").read_text())["outs"]
    shipped = {Path(out["path"]): out["md5"] for out in outs}
    if strange := list(_strange(Path("data"), shipped)):
        return (
            f"{_some(strange)} in data/, which is for the shipped data sets alone. Nothing was changed, copied or "
            "deleted. Move what is yours to any place outside data/ and name it in the section datasets of params.yaml"
        )
    (base,) = reader.load((ROOT / "dvc.lock").read_text())["stages"]["pretrain"]["outs"]
    if (listed := _listed(base)) is not None and (strange := list(_strange(Path(base["path"]), listed))):
        return (
            f"{_some(strange)} in {base['path']}/, which is for the shipped base model. Nothing was changed, copied or "
            "deleted. Move it to a folder of another name and say so in params.yaml, base.source"
        )
    return None


def _strange(folder: Path, known: Mapping[Path, str]) -> Iterator[str]:
    """Yield the files in `folder` that are unknown, or of another content that DVC has no copy of either."""
    for path in sorted(path for path in (ROOT / folder).rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(ROOT)
        if path.name in BYSTANDERS:
            continue
        if name not in known:
            yield f"{name} is no shipped file"
        elif (content := _md5(path)) != known[name] and not _kept(content):
            yield f"{name} is not as it was shipped"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _kept(md5: str) -> Path | None:
    """Return where DVC, or the store that is shipped, has an object."""
    places = (ROOT / folder / "files" / "md5" / md5[:2] / md5[2:] for folder in (".dvc/cache", "dvcstore"))
    return next((path for path in places if path.exists()), None)


def _listed(out: Mapping[str, Any]) -> dict[Path, str] | None:
    """Return file -> MD5 of a folder that DVC keeps; None if its list is not here yet."""
    listed = _kept(out["md5"])
    if listed is None:
        return None
    return {Path(out["path"]) / entry["relpath"]: entry["md5"] for entry in json.loads(listed.read_text())}


def _some(strange: list[str]) -> str:
    return strange[0] + (f" (and {len(strange) - 1} more)" if len(strange) > 1 else "")


def main(arguments: list[str]) -> int:
    """Do one check; return 1 after saying what is wrong."""
    problem = files() if arguments == ["files"] else room(float(arguments[1]))
    if problem:
        print(f"error: {problem}.", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
