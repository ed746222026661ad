"""Where a base model is: a folder, or an id on the Hugging Face hub."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from splitlab.core.errors import InputError, brief
from splitlab.core.paths import ROOT
from splitlab.diffusion.base_files import PICKLES, choose_weights
from splitlab.diffusion.base_kinds import PARTS, check_kind, load_scheduler, single_file

WEIGHTS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
"""The parts that have weights, and how their files are called."""

HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*(?:@[\w./-]+)?", re.ASCII)
"""<owner>/<name> or <name>, with @<revision> if need be."""


def locate(source: str | Path) -> Path:
    """Return the folder of a base model, fetched from the hub if `source` is no folder but may be a hub id.

    Args:
        source: a folder, as seen from here or from the project root (`~` is the home), or a hub id, with or without
            `hub:` in front; `<id>@<revision>` for another revision than the newest. What is in the hub's cache needs
            no network.

    Raises:
        InputError: there is no such folder, or the hub has no such model, asks for terms, or cannot be reached.
    """
    if not str(source).strip() or "://" in str(source):
        raise InputError("it is named by a folder or a hub id such as owner/name, not by an address or nothing")
    path = Path(os.path.expanduser(source))
    for place in (path, ROOT / path):
        if place.is_dir():
            return place
        if place.exists():
            raise InputError(single_file(place))
    name = Path(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).removeprefix("hub:"))
    if not may_be_hub_id(str(source), name):
        raise InputError(
            f"there is no folder {ROOT / path}; `dvc pull` fetches the shipped one, and base.source in params.yaml "
            "takes any Stable Diffusion 1.x folder or hub id"
        )
    repository, _, revision = name.as_posix().partition("@")
    try:
        return _from_hub(repository, revision or None)
    except _Unreachable as reason:
        meant = "" if str(source).startswith("hub:") else f"there is no folder {ROOT / name}, and for "
        raise InputError(f"{meant}the hub id {repository}: {reason}") from None


def may_be_hub_id(source: str, name: Path) -> bool:
    """Tell a hub id from a path to a folder that is not there."""
    if source.startswith((".", "~")) or name.is_absolute() or name.suffix in (".safetensors", ".zip", ".tar", *PICKLES):
        return False
    inside = len(name.parts) > 1 and any((place / name.parts[0]).is_dir() for place in (Path(), ROOT))
    return HUB_ID.fullmatch(name.as_posix()) is not None and not inside


class _Unreachable(Exception):
    """The hub gives no such model; says why."""


def _from_hub(repository: str, revision: str | None) -> Path:
    """Fetch configuration first, and weights only of a model that serves."""
    try:
        with _asking(repository, revision):
            found = huggingface_hub.HfApi().model_info(repository, revision=revision)
    except _Unreachable:
        cached = huggingface_hub.try_to_load_from_cache(repository, "unet/config.json", revision=revision)
        if not isinstance(cached, str):
            raise
        return Path(cached).parent.parent
    names = [file.rfilename for file in found.siblings or ()]
    folders = tuple(f"{part}/" for part in PARTS)
    small = [name for name in names if name.endswith((".json", ".txt")) and name.startswith((*folders, "model_index"))]
    if "unet/config.json" not in small:
        raise _Unreachable(f"{repository} holds no Stable Diffusion 1.x folder ({', '.join(names[:6])})")
    with _asking(repository, revision):
        folder = Path(huggingface_hub.snapshot_download(repository, revision=found.sha, allow_patterns=small))
    check_kind(folder)
    load_scheduler(folder)
    for part, name in WEIGHTS.items():
        there = [file.removeprefix(f"{part}/") for file in names if file.startswith(f"{part}/")]
        small += [f"{part}/{file}" for file in choose_weights(there, name, f"{repository}/{part}")[1]]
    with _asking(repository, revision):
        return Path(huggingface_hub.snapshot_download(repository, revision=found.sha, allow_patterns=small))


@contextlib.contextmanager
def _asking(repository: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence why the hub did not give what was asked for."""
    try:
        yield
    except GatedRepoError:
        reason = "its owner asks for terms to be accepted: do so on the model's page, then `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or a private one: check the name, or `hf auth login`"
    except RevisionNotFoundError:
        reason = f"{repository} has no revision {revision!r}"
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set, and the model is not in the hub's cache"
    except Exception as error:  # of sockets, of HTTP, of the disk
        reason = f"the hub cannot be reached or the download failed ({brief(error)})"
    else:
        return
    raise _Unreachable(reason)
