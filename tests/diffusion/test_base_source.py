"""The hub is played by a server on this machine, so that the real client is tested."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from splitlab.core.errors import InputError
from splitlab.core.paths import resolve
from splitlab.diffusion import base_source
from splitlab.diffusion.base import Base, load_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves `server.folders`, name -> folder, as the hub does; keeps what was fetched in `server.fetched`."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        folder = self.server.folders.get(name)
        if name == "org/gated" and parts[0] != "api":
            self.answer(b"", 403, {"X-Error-Code": "GatedRepo"})
        elif folder is None:
            self.answer(b"", 401, {"X-Error-Code": "RepoNotFound"})
        elif "other" in parts:
            self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        elif parts[0] == "api":
            self.answer(json.dumps(self.listing(folder, tree="tree" in parts)).encode())
        else:
            file = folder.joinpath(*parts[4:])
            if self.command == "GET":
                self.server.fetched.append("/".join(parts[4:]))
            self.answer(file.read_bytes(), 200, {"X-Repo-Commit": COMMIT})

    def listing(self, folder: Path, *, tree: bool) -> object:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if tree:
            ids = [hashlib.sha1(path.read_bytes()).hexdigest() for path in files]
            sizes = [path.stat().st_size for path in files]
            return [{"type": "file", "path": n, "size": s, "oid": i} for n, s, i in zip(names, sizes, ids, strict=True)]
        return {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = hashlib.sha1(content).hexdigest()
        for key, value in {"ETag": f'"{etag}"', "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Serve a copy of the tiny base as org/name."""
    served = Path(shutil.copytree(base_path, tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folders, server.fetched = {"org/name": served, "org/gated": served}, []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_source, "ROOT", tmp_path / "project")
    (tmp_path / "project" / "models").mkdir(parents=True)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections, as a machine without a network does, and start from an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def cached(base_path: Path, cache: Path, repository: str) -> Path:
    """Put a base into a hub cache, as an earlier download would."""
    entry = cache / f"models--{repository.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(base_path, entry / "snapshots" / COMMIT))


def test_what_is_no_folder_is_fetched_from_the_hub(base: Base, hub: ThreadingHTTPServer):
    for source in ("org/name", "hub:org/name", base_source.ROOT / "org/name", f"org/name@{COMMIT}"):
        assert load_base(source).digest == base.digest
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched
    assert len(hub.fetched) == len(set(hub.fetched))  # the cache serves the second time


def test_the_line_of_the_notebooks_reaches_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    monkeypatch.setattr(base_source, "_from_hub", lambda *which: asked.append(which) or Path())
    base_source.locate(resolve("stable-diffusion-v1-5/stable-diffusion-v1-5"))
    base_source.locate(resolve("org/name@fp16"))
    assert asked == [("stable-diffusion-v1-5/stable-diffusion-v1-5", None), ("org/name", "fp16")]


def test_only_what_a_base_needs_is_fetched(hub: ThreadingHTTPServer):
    served = hub.folders["org/name"]
    for part in ("unet", "vae", "text_encoder"):
        for file in list((served / part).glob("*.safetensors")):
            for variant in ("fp16", "non_ema"):
                shutil.copy(file, file.with_name(f"{file.stem}.{variant}.safetensors"))
            file.with_suffix(".bin").write_bytes(b"pickled")
    (served / "v1-5-pruned.safetensors").write_bytes(b"everything again")
    (served / "safety_checker").mkdir()
    (served / "safety_checker" / "model.safetensors").write_bytes(b"not asked for")
    load_base("org/name")
    weights = [name for name in hub.fetched if not name.endswith((".json", ".txt"))]
    assert sorted(weights) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_variant_is_fetched_where_there_is_nothing_else(base: Base, hub: ThreadingHTTPServer):
    for file in list(hub.folders["org/name"].rglob("*.safetensors")):
        save_file({n: tensor.half() for n, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    with pytest.warns(UserWarning, match="weights of the variant 'fp16' only"):
        assert load_base("org/name").digest != base.digest


@pytest.mark.parametrize(
    ("name", "entry", "reason"),
    [
        ("unet/config.json", {"in_channels": 9}, "unet: it takes 9 channels"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "it predicts 'v_prediction'"),
    ],
)
def test_weights_of_another_kind_are_not_even_fetched(
    hub: ThreadingHTTPServer, name: str, entry: dict[str, object], reason: str
):
    file = hub.folders["org/name"] / name
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(InputError, match=f"base model org/name: cannot be loaded: .*{reason}"):
        load_base("org/name")
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_pickles_of_the_hub_are_not_even_fetched(hub: ThreadingHTTPServer):
    for file in list(hub.folders["org/name"].rglob("*.safetensors")):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"org/name/vae: only pickled weights \(diffusion_pytorch_model.bin\)"):
        load_base("org/name")
    assert not any(name.endswith(".bin") for name in hub.fetched)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("org/nothing", r"the hub has no such model, or a private one: check the name, or `hf auth login`"),
        ("nothing", r"the hub has no such model, .*"),
        ("org/gated", r"its owner asks for terms to be accepted: do so on the model's page, then `hf auth login`"),
        ("org/name@other", r"org/name has no revision 'other'"),
    ],
)
def test_the_hubs_refusals_are_one_sentence(hub: ThreadingHTTPServer, source: str, reason: str):
    with pytest.raises(InputError, match=rf"there is no folder .*{source}, and for the hub id .*: {reason}$"):
        load_base(source)


def test_a_repository_without_the_folders_says_what_it_has(hub: ThreadingHTTPServer):
    shutil.rmtree(hub.folders["org/name"])
    hub.folders["org/name"].mkdir()
    (hub.folders["org/name"] / "v1-5-pruned.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"org/name holds no Stable Diffusion 1.x folder \(v1-5-pruned.safetensors\)"):
        load_base("org/name")


@pytest.mark.usefixtures("no_hub")
def test_without_a_network_the_cache_serves(base: Base, base_path: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"no folder .*org/name, and for the hub id .*: the hub cannot be reached"):
        load_base("org/name")
    folder = cached(base_path, tmp_path / "cache", "org/name")
    loaded = load_base("org/name")
    assert loaded.digest == base.digest
    assert Path(loaded.pipeline.name_or_path) == folder  # so that other processes load the very same files


def test_offline_mode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and the model is not in the hub's cache"):
        load_base("org/name")
    with pytest.raises(InputError, match="cannot be loaded: the hub id org/name: HF_HUB_OFFLINE"):  # no word of folders
        load_base("hub:org/name")


@pytest.mark.parametrize(
    "source",
    ["./org/name", "../org/name", "~/org/name", "/nowhere/name", "a/b/c", "models/bsae", "x.safetensors", "org/na me"],
)
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(hub: ThreadingHTTPServer, source: str):
    with pytest.raises(InputError, match=rf"^base model {source}: cannot be loaded: there is no folder .*`dvc pull`"):
        load_base(source)
    with pytest.raises(InputError, match="there is no folder"):
        load_base(base_source.ROOT / "models" / "bsae")
    assert not hub.fetched


@pytest.mark.parametrize("source", ["", " ", "https://example.org/org/name"])
def test_an_address_or_nothing_is_no_base(source: str):
    with pytest.raises(InputError, match="cannot be loaded: it is named by a folder or a hub id such as owner/name"):
        load_base(source)


def test_a_folder_comes_before_a_hub_id(base: Base, base_path: Path, hub: ThreadingHTTPServer):
    shutil.copytree(base_path, base_source.ROOT / "org" / "name")
    assert load_base("org/name").digest == base.digest
    assert not hub.fetched
