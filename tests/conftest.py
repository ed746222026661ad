"""Shared fixtures. The import hook comes first: every annotated shape in the package is checked while tests run."""

import os

# One thread per process, also in those that tests start: the models are so small that a second thread only costs.
os.environ["OMP_NUM_THREADS"] = "1"

from jaxtyping import install_import_hook
from world import checks

install_import_hook("splitlab", f"{checks.__name__}.{checks.outermost.__name__}")

import logging  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from world import project, tiny  # noqa: E402
from world.once import once  # noqa: E402

from splitlab.data.image_set import ImageSet  # noqa: E402
from splitlab.diffusion.base import Base, load_base  # noqa: E402

torch.set_num_threads(1)  # numpy's may have been set before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none of them is left over for one process at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def base_path(session_folder: Path) -> Path:
    return once(session_folder / "base", tiny.save_base)


@pytest.fixture(scope="session")
def world(session_folder: Path, base_path: Path) -> project.World:
    """What figures and report are made of; files of one test module may add to it, none may change it."""
    return project.world(session_folder / "world", base_path)


@pytest.fixture(scope="session")
def explored(session_folder: Path, base_path: Path) -> Path:
    """The explorer's project; tests copy it."""
    return project.explored(session_folder / "explored", base_path)


@pytest.fixture(scope="session")
def base(base_path: Path) -> Base:
    return load_base(base_path)


@pytest.fixture(scope="session")
def sd15_base(session_folder: Path) -> Base:
    return load_base(once(session_folder / "sd15", tiny.save_sd15_base))


@pytest.fixture(scope="session")
def private() -> ImageSet:
    return tiny.small_set(12)


@pytest.fixture(scope="session")
def heldout() -> ImageSet:
    return tiny.small_set(4, seed=1)


@pytest.fixture
def diffusers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Let pytest see diffusers' warnings: it keeps them to itself otherwise, and the package silences them."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.enable_propagation()
    diffusers_logging.set_verbosity_warning()
    with caplog.at_level(logging.WARNING):
        yield caplog
    diffusers_logging.set_verbosity(before)
    diffusers_logging.disable_propagation()
