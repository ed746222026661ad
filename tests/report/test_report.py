"""The report: one file that needs nothing else, verdicts that follow the numbers, clear words where data lack."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from jinja2 import UndefinedError
from world.evidence import attack_at, evidence, verdicts
from world.project import World

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.report import claims, html, layout
from splitlab.report import page as report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def material(world: World) -> report.Material:
    return report.load_material(**world.folders)


@pytest.fixture(scope="module")
def index(world: World) -> Path:
    executed = world.root / "executed" / "report.ipynb"
    return report.write_report(world.page, executed=executed, out=world.root / "index.html")


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.1, claims.HOLDS), (0.6, claims.PARTLY), (0.97, claims.REFUTED), (-0.2, claims.HOLDS)]
)
def test_protection_verdicts_follow_the_strongest_attack(material: report.Material, share: float, verdict: str) -> None:
    found = verdicts(evidence(material, attack_at(share)))
    assert {found[name] for name in ("floor", "activation", "attacks")} == {verdict}
    assert found["prompts"] == (claims.PARTLY if share > 0.95 else claims.HOLDS)


def test_one_bucket_that_holds_out_is_enough_against_refuted(material: report.Material) -> None:
    def change(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        attack_at(1.0)(training, attacks)
        last = attacks[(attacks["run"] == "s1") & (attacks["attack"] == "closed_form")].index[-1]
        attacks.loc[last, "psnr_db"] = 12.0

    assert verdicts(evidence(material, change))["floor"] != claims.REFUTED


@pytest.mark.parametrize(("iou", "verdict"), [(0.8, claims.HOLDS), (0.7, claims.PARTLY), (0.5, claims.REFUTED)])
def test_the_quality_verdict_follows_the_iou(material: report.Material, iou: float, verdict: str) -> None:
    def change(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        training.loc[training["steps"].notna(), "control_iou"] = 0.8
        training.loc[training["run"] == "s1", "control_iou"] = iou

    assert verdicts(evidence(material, change))["quality"] == verdict


def test_a_returned_byte_or_no_gain_refutes_that_no_gradient_need_return(material: report.Material) -> None:
    def works(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        training["control_iou"] = training["scheme"].map(lambda name: 0.2 if name == "no control" else 0.8)

    def returns(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        works(training, attacks)
        training.loc[training["run"] == "s1", "down_bytes_per_sample"] = 1.0

    def learns_nothing(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        works(training, attacks)
        training.loc[training["run"] == "s1", "control_iou"] = 0.25

    assert verdicts(evidence(material, works))["gradient"] == claims.HOLDS
    assert verdicts(evidence(material, returns))["gradient"] == claims.REFUTED
    assert verdicts(evidence(material, learns_nothing))["gradient"] == claims.REFUTED


def test_a_sent_prompt_refutes_prompt_hiding(material: report.Material) -> None:
    assert "encoder_hidden_states" not in material.evidence.sent["s1"]
    shown = replace(material.evidence, sent={"s1": ("timesteps", "encoder_hidden_states")})
    assert verdicts(shown)["prompts"] == claims.REFUTED


def test_claims_without_their_runs_are_not_measured(material: report.Material) -> None:
    def change(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        training.loc[training["scheme"] != "split", ["control_iou", "scheme"]] = None, "other"
        attacks.loc[attacks["run"] == "s1", ["run", "defences"]] = "other", "none"

    assert set(verdicts(evidence(material, change)).values()) == {claims.UNMEASURED}


def test_the_summary_says_what_the_tables_say(material: report.Material) -> None:
    strong, weak = (
        report.summary(replace(material, evidence=evidence(material, attack_at(share)))).data for share in (1.0, 0.1)
    )
    assert "do not keep the images" in strong
    assert "do not keep the images" not in weak


def test_message_sizes_at_stable_diffusions_shapes() -> None:
    sizes = list(dict(claims.message_sizes()).values())
    # S1's released code: 320·64·64·4 + 4·64·64·2 + 4·64·64·4 + 8 + 77·768·4; ours: 3 maps of 4·64·64 in fp16 + 2
    assert sizes[0] == 5_577_736
    assert sizes[-1] == 98_306


def test_percentages_say_100_only_where_nothing_is_missing() -> None:
    assert [claims.percent(x).replace("\u00a0", " ") for x in (1.0, 0.996, 0.994, 0.01, 0.0)] == [
        "100 %",
        "100 %",
        "99 %",
        "1 %",
        "0 %",
    ]


def test_defences_are_said_in_words() -> None:
    words = "timestep_floor=600 symsigmoid fixed_noise=0.5 half hide_prompts"
    assert layout.in_words(words) == "timestep floor 600, symsigmoid, fixed noise 0.5, 16 bits, hidden prompts"


def test_text_from_data_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">'
    (tmp_path / "a.png").write_bytes(b"")
    row = {"run": evil, evil: layout.aside(evil, evil), "reads": layout.code(evil), "stops": layout.badge(evil, evil)}
    claim = claims.Claim(evil, (evil, f"{evil}: {evil}"), evil, evil)
    shown = [
        layout.table({evil: [row], layout.aside(evil, evil): [row]}, notes=[f"*{evil}*"]),
        layout.claims(evil, [claim]),
        layout.section(evil, layout.figure(tmp_path / "a.png", evil), anchor=evil, says=evil),
    ]
    text = layout.together(shown).data
    assert "<img src=x" not in text
    assert "&amp;lt;" not in text  # and none of it twice
    assert text.count("&lt;img src=x") > 20


def test_a_table_has_one_cell_per_title_numbers_to_the_right_and_none_without_rows() -> None:
    rows = [{"run": "a", "words": "b"} | layout.numbers({"psnr_db": 30.04, "id_top1": 0.996}, "psnr_db id_top1")]
    text = layout.table({"shapes": rows}, first="setting", notes=["", "*n*: images"]).data
    assert re.findall(r'<th class="(\w+)" scope="col">(.*?)</th>', text) == [
        ("text", "run"),
        ("text", "words"),
        ("number", "PSNR, dB"),
        ("number", "top-1"),
    ]
    assert re.findall(r'<td class="(\w+)">(.*?)</td>', text) == [
        ("setting", "a"),
        ("text", "b"),
        ("number", "30.0"),
        ("number", "100\u00a0%"),
    ]
    assert '<th colspan="4" scope="rowgroup">shapes</th>' in text
    assert text.count('class="note"') == 1
    assert "<i>n</i>: images" in text
    assert "<table" not in layout.table([], notes=["Not run."]).data
    with pytest.raises(UndefinedError, match="words"):
        layout.table([*rows, {"run": "c"}])


def test_the_page_loads_nothing(index: Path) -> None:
    text = index.read_text()
    loads = re.findall(r'<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)="?([^">\s]*)', text)
    assert loads
    assert all(target.startswith("data:image/png;base64,") for target in loads)
    assert not re.search(r"@import|url\(\s*[\"']?http|<link|<iframe", text)
    assert "default-src 'none'" in text
    assert len(text) < 8e6


def test_the_page_shows_results_and_no_code(index: Path) -> None:
    text = index.read_text()
    assert "What was found" in text
    assert "load_material" not in text
    assert not re.search(r">\s*(nan|None|NaN)\s*<|\bnan\b dB", text)
    assert not re.search(
        r"\d\.\d{5,}", re.sub(r'src="data:[^"]*"|arXiv [0-9.]*|href="[^"]*"', "", text).split("</style>")[1]
    )
    anchors = re.findall(r'<h2 id="([^"]*)"', text)
    assert len(anchors) > 8
    assert all(f'href="#{anchor}"' in text for anchor in anchors)
    assert text.count("<figure>") == text.count("<figcaption>") == 18  # survey: 2, updates: 3, private fine-tuning: 2


def test_interactive_cells_and_widgets_do_not_reach_the_page() -> None:
    cells = [nbformat.v4.new_markdown_cell("# Title & more"), nbformat.v4.new_markdown_cell("a slider")]
    cells[1].metadata["tags"] = ["interactive"]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"state": {}}})
    text = html.page(notebook)
    assert "<title>Title &amp; more</title>" in text
    assert "a slider" not in text


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "report.ipynb", as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_missing_figures_are_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"leakage-split\.png: missing; run `dvc repro` first"):
        report.load_material(**(world.folders | {"figures": tmp_path}))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page_without_any_request_or_error(index: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    requests, errors = [], []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(index.as_uri())
        assert page.locator("nav a").count() >= 8
        image = page.locator("figure img").first
        narrow = image.bounding_box()["width"]
        image.click()
        assert image.bounding_box()["width"] > narrow
        page.keyboard.press("Escape")
        assert image.bounding_box()["width"] == narrow
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert errors == []
