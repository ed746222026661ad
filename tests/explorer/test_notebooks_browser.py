"""The explorer in a real JupyterLab and a real browser: the notebook as shipped, on a fabricated project."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from world.project import opened

from splitlab.core.paths import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
]

RUN_ALL = """async () => {
  const session = window.jupyterapp.shell.currentWidget.sessionContext;
  await session.ready;
  await session.session.kernel.info;
  await window.jupyterapp.commands.execute('notebook:run-all-cells');
}"""
PICTURES = "Array.from(document.querySelector('.sl-groups').querySelectorAll('img')).map(image => image.src)"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, explored: Path) -> Path:
    root = Path(shutil.copytree(explored, tmp_path_factory.mktemp("browser") / "project"))
    (root / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "explore.ipynb", root / "notebooks")
    shutil.copytree(ROOT / "reports" / "metrics", root / "reports" / "metrics", dirs_exist_ok=True)
    return root


@pytest.fixture(scope="module")
def lab(project: Path) -> Iterator[str]:
    """Start JupyterLab as `make lab` does, in the notebooks' folder; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={project / 'notebooks'}"]
    settings = {"SPLITLAB_ROOT": str(project), "OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(project / "jupyter")}
    log = project / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2)
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail(f"JupyterLab did not come up: {log.read_text()}")
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@dataclass
class Visit:
    """A page with the notebook run, and what the browser said meanwhile."""

    page: "sync_api.Page"
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def visit(lab: str) -> Iterator[Visit]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 3600})  # so high that every cell is rendered
        page.set_default_timeout(120_000)
        visit = Visit(page)
        local = (lab, lab.replace("http:", "ws:"), "data:", "blob:")
        page.on("pageerror", lambda error: visit.errors.append(str(error)))
        page.on("console", lambda said: visit.errors.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: visit.elsewhere.append(asked.url) if not asked.url.startswith(local) else None)
        page.goto(f"{lab}/lab/tree/explore.ipynb")
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext")
        page.evaluate(RUN_ALL)
        page.wait_for_selector(".sl-gallery img")
        page.wait_for_function("document.querySelectorAll('.sl-groups').length == 2")
        yield visit
        browser.close()


def slider(page: "sync_api.Page", name: str) -> "sync_api.Locator":
    return page.locator(f".widget-slider:has(.widget-label:text-is('{name}')) .noUi-handle").first


def wait_for_other(page: "sync_api.Page", before: list[str]) -> list[str]:
    page.wait_for_function(f"before => JSON.stringify({PICTURES}) != JSON.stringify(before)", arg=before)
    return page.evaluate(PICTURES)


def test_no_cell_ended_in_an_error(visit: Visit):
    failed = "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"
    assert visit.page.locator(failed).count() == 0
    assert visit.page.locator(".sl-message").count() == 0


def test_keys_and_drags_on_the_sample_slider_show_other_samples(visit: Visit, project: Path):
    page, view = visit.page, opened(project).view("plain")
    walk = view.within(0, 1000)
    images = view.known.private.images[view.known.truth.indices[walk]]
    assert len(images.flatten(1).unique(dim=0)) > 6, "the samples differ, so the pictures have to"
    first = page.evaluate(PICTURES)
    assert len(first) == 7
    slider(page, "sample").focus()
    page.keyboard.press("ArrowRight")
    second = wait_for_other(page, first)
    assert second[0].startswith("data:image/png;base64,")

    box = slider(page, "sample").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 600, box["y"], steps=4)
    page.mouse.up()
    page.wait_for_selector(f"text={len(walk)} of {len(walk)}")
    last = view.timesteps[walk[-1]]
    assert page.locator(f"text=t = {int(last)}").count() == 1
    assert wait_for_other(page, second) != first


def test_another_attack_shows_another_reconstruction_of_the_same_sample(visit: Visit):
    page, before = visit.page, visit.page.evaluate(PICTURES)
    menu = page.locator(".widget-dropdown:has(.widget-label:text-is('attack')) select").first
    menu.select_option(label="random public image — uses nothing")
    after = wait_for_other(page, before)
    assert after[:5] == before[:5], "private and wire stay"
    assert after[5] != before[5]


def test_a_live_attack_runs_and_joins_the_menu(visit: Visit):
    page = visit.page
    page.get_by_role("button", name="Attack now").click()
    page.wait_for_selector("text=done in")
    menu = page.locator(".widget-dropdown:has(.widget-label:text-is('attack')) select").first
    sync_api.expect(menu).to_have_value(re.compile("live: closed form"))


def test_the_progress_slider_plays_an_inversion(visit: Visit):
    page = visit.page
    picture = page.locator("figure:has-text('below: reconstructed') img").last
    result = picture.get_attribute("src")
    assert result.startswith("data:image/png;base64,")
    slider(page, "progress").focus()
    page.keyboard.press("Home")
    sync_api.expect(picture).not_to_have_attribute("src", result)


def test_hiding_the_label_shows_at_once_in_the_playground(visit: Visit):
    page = visit.page
    page.get_by_label("noise label sent").click()
    page.wait_for_selector(".sl-nothing:has-text('not sent')")


def test_the_browser_met_no_error_and_asked_no_other_host(visit: Visit):
    assert visit.elsewhere == []
    assert visit.errors == []
