"""The numbers that README and docs/measurements.md state are those of the shipped tables, to the last digit stated.

Shipped is what git tracks: a pipeline run on another processor may have changed last digits in the working copies.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from splitlab.core.labels import percent
from splitlab.core.paths import ROOT
from splitlab.core.tables import read_table
from splitlab.split.attacks import NO_INFORMATION
from splitlab.split.config import Adversary
from splitlab.study.results import by_adversary
from splitlab.study.tradeoff import nominal
from splitlab.study.verdicts import pooled

SCRATCH = tempfile.TemporaryDirectory()  # removed at the end


def shipped(folder: str) -> Path:
    """Return a folder of tables as git tracks it; as it is where there is no git."""
    out = Path(SCRATCH.name)
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        return ROOT / folder
    command = ["git", "checkout-index", f"--prefix={out}/", *listed.stdout.splitlines()]
    subprocess.run(command, cwd=ROOT, check=True)
    return out / folder


METRICS = shipped("reports/metrics")
DOCUMENTS = {name: re.sub(r"\s+", " ", (ROOT / name).read_text()) for name in ("README.md", "docs/measurements.md")}
TABLES = {path.stem: read_table(path) for path in METRICS.glob("*.csv")}
DP = pd.concat([read_table(path) for path in sorted((METRICS / "dp").glob("*.csv"))])
SETTINGS = {
    data: TABLES[name].set_index("setting")
    for data, name in (("shapes", "matched_client"), ("photos", "matched_client_photos"))
}


def share(value: float) -> str:
    return percent(value).replace("\N{NO-BREAK SPACE}", " ")


def setting(name: str, column: str, data: str = "shapes") -> float:
    return float(SETTINGS[data][column][name])


def spread(name: str, data: str = "shapes", column: str = "control_iou_guided") -> str:
    """Write a setting's control as the documents do: mean ± standard deviation over three training seeds."""
    assert setting(name, "n_seeds", data) == 3
    return f"{setting(name, column, data):.3f} ± {setting(name, f'{column}_std', data):.3f}"


def run(name: str, column: str, messages: int = 29) -> float:
    rows = TABLES["whole_run"]
    return float(rows[rows["setting"].eq(name) & rows["messages"].eq(messages)][column].item())


def ideal(rows: pd.DataFrame) -> float:
    return float(rows[["id_image_ideal", "id_hint_ideal", "id_both_ideal"]].max(axis=None))


def verdict(name: str, column: str, data: str = "shapes") -> object:
    rows = TABLES["split_verdicts"]
    return rows[rows["setting"].eq(name) & rows["dataset"].eq(data)][column].item()


def tuned(trainable: str, epsilon: float, column: str = "downstream_acc", data: str = "digits") -> float:
    rows = DP[DP["dataset"].eq(data) & DP["trainable"].eq(trainable)]
    rows = rows[rows["epsilon"].map(nominal).eq(epsilon)]
    assert len(rows) == 3
    return float(rows[column].mean(skipna=False))


def exact(trainable: str, epsilon: float) -> str:
    return f"{100 * tuned(trainable, epsilon):.1f} %"


def by_seed(trainable: str, epsilon: float) -> list[float]:
    rows = DP[DP["dataset"].eq("digits") & DP["trainable"].eq(trainable) & DP["epsilon"].map(nominal).eq(epsilon)]
    return rows.sort_values("seed")["downstream_acc"].tolist()


def attack(run: str, name: str, *denied: str) -> pd.DataFrame:
    rows = TABLES["split_attacks"]
    return by_adversary(rows[rows["run"].eq(run)])[Adversary(name, denied)].sort_values("t_low")


def everywhere(run: str, name: str) -> dict[str, float]:
    """Return an attack's numbers over all timesteps."""
    rows = TABLES["split_attacks"]
    return next(pool for pool in pooled(rows[rows["run"].eq(run)]) if pool["adversary"] == Adversary(name))


def whole(run: str, name: str) -> tuple[str, str]:
    found = everywhere(run, name)
    return f"{found['psnr_db']:.1f}", share(found["id_top1"])


def gain(run: str, name: str, other: str, t_low: int | None = None) -> float:
    if t_low is None:
        return everywhere(run, name)["psnr_db"] - everywhere(run, other)["psnr_db"]
    own, raw = (attack(run, one).set_index("t_low")["psnr_db"][t_low] for one in (name, other))
    return float(own - raw)


def gap(run: str, name: str = "closed_form") -> float:
    rows = attack(run, name)
    return float((rows["ceiling_psnr_db"] - rows["psnr_db"]).max())


def ends(values: pd.Series) -> tuple[str, str]:
    return f"{values.min():.1f}", f"{values.max():.1f}"


def learned(run: str, column: str = "control_iou") -> float:
    return float(TABLES["training"].set_index("run")[column][run])


def inverted(cell: str, name: str, column: str = "ssim") -> float:
    rows = TABLES["gradient_attacks"]
    return float(rows[rows["cell"].eq(cell) & rows["attack"].eq(name)][column].item())


def paired(name: str, data: str, column: str) -> tuple[str, ...]:
    """Write the difference to the undefended client's control, seed by seed."""
    own, plain = (SETTINGS[data][f"{column}_seeds"][which].split() for which in (name, "none"))
    return tuple(f"{float(a) - float(b):+.3f}" for a, b in zip(own, plain, strict=True))


def shares(part: str, trainable: str, noise: str, epsilon: float, attack: str = "holds the candidates") -> pd.Series:
    rows = TABLES["dp_shares"]
    rows = rows[rows["part"].eq(part) & rows["trainable"].eq(trainable) & rows["noise"].eq(noise)]
    (found,) = (row for _, row in rows[rows["epsilon"].eq(epsilon) & rows["attack"].eq(attack)].iterrows())
    return found


INFINITE = float("inf")
STATED: dict[str, list[tuple[str, Callable[[], tuple[str, ...]]]]] = {
    "README.md": [
        (
            r"identifies (\S+ %) of the samples by their image and still all of them by their hint \(chance (\S+ %)\)",
            lambda: (share(verdict("matched-1-floor-800-hidden", "id_worst")), share(setting("none", "id_chance"))),
        ),
        (
            r"the strongest attack identifies (\S+ %) by image, hint or both, and an attacker who is given the 100 "
            r"candidate images identifies (\S+ %)\. The control IoU under guidance is then (\S+ ± \S+), against "
            r"(\S+ ± \S+) for the same training without a defence",
            lambda: (
                share(setting("turned", "id_worst")),
                share(ideal(SETTINGS["shapes"].loc[["turned"]])),
                spread("turned"),
                spread("none"),
            ),
        ),
        (
            r"A run sends (\d+) messages of each image. An attacker who is given the 100 candidate images and all \d+ "
            r"messages identifies (\S+ %)\. Noise that is drawn once per image keeps this at (\S+ %) however many "
            r"messages are sent, at a control IoU under guidance of (\S+ ± \S+) \(without a defence, after as few "
            r"steps, (\S+ ± \S+)\)",
            lambda: (
                str(TABLES["whole_run"]["messages"].max()),
                share(run("turned", "id_both_ideal")),
                share(run("turned-once", "id_both_ideal")),
                spread("turned-once"),
                spread("(none, 600 steps)"),
            ),
        ),
        (
            r"public circles alone reaches a control IoU under guidance of (\S+ ± \S+), one trained on private "
            r"circles without any defence (\S+ ± \d\.\d+)\.",
            lambda: (spread("(public data only)"), spread("none")),
        ),
        (
            r"membership inference has AUC (\S+) at ε = ∞ and (\S+) at 10,",
            lambda: tuple(f"{tuned('attention', e, 'mia_auc'):.2f}" for e in (INFINITE, 10.0)),
        ),
        (
            r"(\S+ %) at ε = ∞, (\S+ %) at 10, (\S+ %) at 1; without private data (\S+ %), guessing (\S+ %)\. Training "
            r"only the attention modules did not beat the full U-Net here: (\S+ %) at ε = 10",
            lambda: (
                *(share(tuned("attention", e)) for e in (INFINITE, 10.0, 1.0)),
                share(tuned("public start", 0.0)),
                "10 %",
                share(tuned("unet", 10.0)),
            ),
        ),
    ],
    "docs/measurements.md": [
        (
            r"distance to the VAE ceiling, every bucket, none and all of S1's defences \| ≤ 0.5 dB \| ≤ (\S+) dB; "
            r"identification (\S+ %) of n = (\d+) per bucket",
            lambda: (
                f"{max(gap(name) for name in ('shapes-split', 'shapes-s1')):.2f}",
                share(min(attack(name, "closed_form")["id_top1"].min() for name in ("shapes-split", "shapes-s1"))),
                f"{attack('shapes-s1', 'closed_form')['n'].min()}",
            ),
        ),
        (
            r"through symsigmoid and unknown fixed noise, shapes \| – \| (\S+) to (\S+) dB, outline IoU ≥ (\S+) "
            r"\((\S+) to (\S+) dB undefended\)",
            lambda: (
                *ends(attack("shapes-s1", "closed_form")["hint_psnr_db"]),
                f"{attack('shapes-s1', 'closed_form')['hint_iou'].min():.3f}",
                *ends(attack("shapes-split", "closed_form")["hint_psnr_db"]),
            ),
        ),
        (
            r"inverse network without the noise, t < 200, shapes, 3 seeds \| [^|]* \| (\S+ ± \S+) dB over seeds "
            r"\(closed form (\S+)\)",
            lambda: (
                "{psnr_db:.1f} ± {psnr_db_seed_std:.1f}".format(
                    **attack("shapes-split", "inverse_network", "noise").iloc[0]
                ),
                f"{attack('shapes-split', 'closed_form')['psnr_db'].iloc[0]:.1f}",
            ),
        ),
        (
            r"S1 whole / with floor 600 / central / no control / VAE \| [^|]* \| (\S+) / (\S+) / (\S+) / (\S+) "
            r"/ (\S+) \|",
            lambda: tuple(
                f"{learned(name):.3f}"
                for name in (
                    *("shapes-s1", "shapes-s1-floor600", "shapes-central"),
                    *("(no control: shapes)", "(VAE ceiling: shapes)"),
                )
            ),
        ),
        (
            r"within 1 dB of the VAE ceiling in every bucket \| (\S+) dB or more above it in every bucket",
            lambda: (f"{-gap('shapes-split', 'likelihood'):.1f}",),
        ),
        (
            r"the same without the noise above one-step denoising at t < 200 \| (\S+) against (\S+) dB",
            lambda: tuple(
                f"{attack('shapes-split', *who)['psnr_db'].iloc[0]:.2f}"
                for who in (("likelihood", "noise"), ("one_step",))
            ),
        ),
        (
            r"better than the raw closed form \| (\S+) dB, (\S+ %) against (\S+) dB, (\S+ %)",
            lambda: (*whole("survey-shapes-mixing", "unmixing"), *whole("survey-shapes-mixing", "closed_form")),
        ),
        (
            r"shuffled by one permutation: the same \| (\S+) dB, (\S+ %) against (\S+) dB, (\S+ %)",
            lambda: (*whole("survey-shapes-patches", "jigsaw"), *whole("survey-shapes-patches", "closed_form")),
        ),
        (
            r"t in \[400, 600\): ≥ 5 dB \| \+(\S+) dB",
            lambda: (f"{gain('survey-shapes-noise-0.3', 'posterior', 'closed_form', t_low=400):.1f}",),
        ),
        (
            r"accumulation over 10 epochs, σ1 = 0.3: ≥ 3 dB over one message \| \+(\S+) dB",
            lambda: (f"{gain('epochs-shapes-noise-0.3', 'accumulation', 'posterior'):.1f}",),
        ),
        (
            r"prompts from sent text embeddings exact in ≥ 99 % \| (\S+ %)",
            lambda: (share(float(attack("shapes-split", "prompt_inversion")["prompt_exact"].mean())),),
        ),
        (
            r"identifies ≥ 50 % by the hint \(chance 1 %\) \| (\S+) %",
            lambda: (f"{100 * everywhere('shapes-hijack', 'hijacking')['hint_id_top1']:.1f}",),
        ),
        (
            r"Timestep floor 600: (\S+) below central\*\*, not within 0.03 \((\S+) against (\S+);",
            lambda: (
                f"{learned('shapes-central') - learned('shapes-s1-floor600'):.3f}",
                f"{learned('shapes-s1-floor600'):.3f}",
                f"{learned('shapes-central'):.3f}",
            ),
        ),
        (
            r"after the pipeline's 300 steps\*\*: agreement of edges (\S+) where the VAE has (\S+) \((\S+) "
            r"after 900 steps;",
            lambda: (
                f"{learned('photos-s1', 'control_edges'):.2f}",
                f"{learned('(VAE ceiling: photos)', 'control_edges'):.2f}",
                f"{setting('none', 'control_edges', 'photos'):.2f}",
            ),
        ),
        (
            r"0.9 at rel ≤ 0.3, < 0.1 at rel ≥ 10 \| (\S+) at 0.1, (\S+) at 0.3, (\S+) at 1, (\S+) at 10, noise known",
            lambda: (
                *(f"{inverted(f'pixel16-photos-t100-b1-noise{level}', 'known_noise'):.3f}" for level in ("0.1", "0.3")),
                *(f"{inverted(f'pixel16-photos-t100-b1-noise{level}', 'known_noise'):.2f}" for level in ("1", "10")),
            ),
        ),
        (
            r"Clipping gives (\S+), a half-pruned output layer \(Soteria\) (\S+), noise of 0.01 and 0.1 (\S+) "
            r"and (\S+); "
            r"8 bits (\S+) \(",
            lambda: tuple(
                f"{inverted(f'pixel16-photos-t100-b1-{name}', 'unknown_noise'):.{digits}f}"
                for name, digits in (
                    *(("clip0.1", 3), ("soteria0.5", 3), ("noise0.01", 3), ("noise0.1", 2)),
                    ("bits8", 2),
                )
            ),
        ),
        (
            r"\*\*The noise unknown, defended updates\*\*: (\S+) at rel 0.3 [^;]*; (\S+) under signs, (\S+) at "
            r"top-10 % "
            r"\([^)]*\)\. Known noise reaches (\S+), (\S+) and (\S+) there",
            lambda: (
                *(
                    f"{inverted(f'pixel16-photos-t100-b1-{name}', 'unknown_noise'):.2f}"
                    for name in ("noise0.3", "sign", "top_k0.1")
                ),
                f"{inverted('pixel16-photos-t100-b1-noise0.3', 'known_noise'):.3f}",
                f"{inverted('pixel16-photos-t100-b1-sign', 'known_noise'):.2f}",
                f"{inverted('pixel16-photos-t100-b1-top_k0.1', 'known_noise'):.3f}",
            ),
        ),
        (
            r"with the noise known \((\S+) and (\S+) after (\d+) evaluations\)",
            lambda: (
                f"{inverted('latent-shapes-t250-b1-attention', 'known_noise'):.2f}",
                f"{inverted('lora-shapes-t250-b1-lora', 'known_noise'):.2f}",
                f"{inverted('lora-shapes-t250-b1-lora', 'known_noise', 'n_evals'):.0f}",
            ),
        ),
        (
            r"Inverting Gradients\*\* get (\d+) evaluations \((\S+) and (\S+)\), GIDM (\d+) on pixels and (\d+) "
            r"on the base",
            lambda: (
                f"{inverted('pixel16-photos-t100-b1', 'dlg', 'n_evals'):.0f}",
                f"{inverted('pixel16-photos-t100-b1', 'dlg'):.2f}",
                f"{inverted('pixel16-photos-t100-b1', 'inverting_gradients'):.2f}",
                f"{inverted('pixel16-photos-t100-b1', 'gidm', 'n_evals'):.0f}",
                f"{inverted('latent-shapes-t250-b1', 'gidm', 'n_evals'):.0f}",
            ),
        ),
        (
            r"trained on the 4,000 public ones without any defence \(three seeds\), control IoU is (\S+ ± \S+) "
            r"where the "
            r"1,000 private ones give (\S+ ± \S+)\.",
            lambda: (spread("(public data only)"), spread("none")),
        ),
        (
            r"identifies (\S+ %) from three messages and (\S+ %) from all 29\. Floor 800 alone goes from (\d+) "
            r"to (\S+ %) by "
            r"image between three messages and 29",
            lambda: (
                share(run("turned", "id_both_ideal", 3)),
                share(run("turned", "id_both_ideal")),
                share(run("floor-800", "id_image", 3)).removesuffix(" %"),
                share(run("floor-800", "id_image")),
            ),
        ),
        (
            r"keeps (\S+ %) for the ideal attacker and (\S+ %) for the strongest attack over the whole run, at "
            r"a control "
            r"IoU of (\S+ ± \S+) \((\S+), (\S+), (\S+)\), a hair below the bar of 0.65; without defence, after as few "
            r"steps, it is (\S+ ± \S+)\.",
            lambda: (
                share(run("turned-once", "id_both_ideal")),
                share(run("turned-once", "id_worst")),
                spread("turned-once"),
                *(
                    f"{float(value):.3f}"
                    for value in SETTINGS["shapes"]["control_iou_guided_seeds"]["turned-once"].split()
                ),
                spread("(none, 600 steps)"),
            ),
        ),
        (
            r"a whole run gives the attack (\S+ %), where one message gives (\S+ %) \(`nearest_public`\)",
            lambda: (share(run("coarse-1.8", "id_worst")), share(setting("coarse-1.8", "id_worst"))),
        ),
        (
            r"then more messages help, (\d+), (\d+) and (\S+ %) by image from 3, 10 and 29",
            lambda: (
                *(share(run("coarse-1.8", "id_image", n)).removesuffix(" %") for n in (3, 10)),
                share(run("coarse-1.8", "id_image")),
            ),
        ),
        (
            r"than one trained on the private ones without any defence \((\S+) against (\S+)\)",
            lambda: tuple(
                f"{setting(n, 'control_edges_guided', 'photos'):.2f}" for n in ("(public data only)", "none")
            ),
        ),
        (
            r"held-out denoising loss is (\S+) with them and (\S+) without, as learned control is (\S+) against "
            r"(\S+)\.",
            lambda: tuple(
                f"{setting(name, column, 'photos'):.3f}"
                for column in ("eval_loss", "control_edges")
                for name in ("none", "(public data only)")
            ),
        ),
        (
            r"paired by seed (\S+), (\S+), (\S+) against none, where naive noise loses (\S+), (\S+), (\S+)\.",
            lambda: (
                *paired("matched-0.3", "photos", "control_edges"),
                *paired("naive-0.3", "photos", "control_edges"),
            ),
        ),
        (
            r"at ε = 10 none of 100 is identified \(95 %: at most (\S+) %\)",
            lambda: (f"{100 * shares('images', 'unet', 'central', 10.0, 'unknown_noise')['high']:.1f}",),
        ),
        (
            r"unknown noise on the whole U-Net identifies (\d+) of 20 \(SSIM (\S+)\), known noise on attention "
            r"(\d+) of 20 \((\S+)\)",
            lambda: tuple(
                said
                for place in (
                    ("unet", "none", INFINITE, "unknown_noise"),
                    ("attention", "none", INFINITE, "known_noise"),
                )
                for found in [shares("images", *place)]
                for said in (f"{20 * found['identified']:.0f}", f"{found['ssim']:.2f}")
            ),
        ),
        (
            r"accuracy (\S+) % against (\S+) % of the base itself",
            lambda: (f"{100 * tuned('public start', 0.0):.0f}", f"{100 * tuned('public base', 0.0):.0f}"),
        ),
        (
            r"digits, ε = ∞ ≥ 90 % \| (\S+ %) \| \| digits, ε = 10 ≥ 75 % \| (\S+ %) \((\S+), (\S+), (\S+)\); "
            r"full U-Net "
            r"(\S+ %), LoRA (\S+ %) \|",
            lambda: (
                exact("attention", INFINITE),
                exact("attention", 10.0),
                *(f"{100 * value:.1f}" for value in by_seed("attention", 10.0)),
                exact("unet", 10.0),
                exact("lora", 10.0),
            ),
        ),
        (
            r"above the public-only model \| (\S+ %) against the public start's (\S+ %), paired by seed (\S+), "
            r"(\S+), (\S+) "
            r"points",
            lambda: (
                exact("attention", 1.0),
                exact("public start", 0.0),
                *(
                    f"{100 * (own - start):+.1f}"
                    for own, start in zip(by_seed("attention", 1.0), by_seed("public start", 0.0), strict=True)
                ),
            ),
        ),
        (
            r"(\S+) against (\S+) %, a tie; at ε = 10 the full U-Net is (\S+) points better",
            lambda: (
                exact("attention", 1.0).removesuffix(" %"),
                exact("unet", 1.0).removesuffix(" %"),
                f"{100 * (tuned('unet', 10.0) - tuned('attention', 10.0)):.1f}",
            ),
        ),
    ],
}


@pytest.mark.parametrize(
    ("document", "pattern", "computed"),
    [(document, *claim) for document, claims in STATED.items() for claim in claims],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_stated_number_is_that_of_the_tables(
    document: str, pattern: str, computed: Callable[[], tuple[str, ...]]
) -> None:
    found = re.findall(pattern, DOCUMENTS[document])
    assert len(found) == 1, f"{document} says it {len(found)} times: {pattern}"
    said = found[0] if isinstance(found[0], tuple) else (found[0],)
    assert tuple(said) == computed()


def test_no_number_of_the_findings_goes_unchecked() -> None:
    section = DOCUMENTS["README.md"].split("## What it found ")[1].split(" ## ")[0]
    for pattern, _ in STATED["README.md"]:
        section = re.sub(pattern, "", section)
    left = re.findall(r"(?<![\w.])\d[\d.,]*", re.sub(r"\[[^]]*\]\([^)]*\)", "", section))
    assert left == ["0.5", "64", "64"], "what guessing gets by AUC, and the hints that control is measured on"


def test_what_the_readme_says_without_numbers_holds_in_the_tables() -> None:
    for name in ("s1", "mixing", "patches", "noise-0.3", "noise-0.3-independent"):
        assert verdict(name, "id_worst") == 1.0, name
    assert (
        setting("turned-once", "id_both_ideal")
        == run("turned-once", "id_both_ideal", 3)
        == run("turned-once", "id_both_ideal")
    )
    assert setting("(public data only)", "control_edges_guided", "photos") > setting(
        "none", "control_edges_guided", "photos"
    )
    assert setting("turned-once", "steps") == 600
    assert tuned("attention", 1.0) > tuned("public start", 0.0)


def cells(heading: str, *, table: int = 0) -> list[list[str]]:
    """Return the cells of a table of docs/measurements.md below its heading, without emphasis."""
    text = (ROOT / "docs/measurements.md").read_text().split(f" {heading}\n")[1]
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    lines = blocks[table].splitlines()[2:]
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines]


def three(row: pd.Series, names: tuple[str, str, str]) -> str:
    return " / ".join(share(row[name]).removesuffix(" %") for name in names)


FOUND = ("id_image", "id_hint", "id_both")
CEILING = ("id_image_ideal", "id_hint_ideal", "id_both_ideal")


def test_the_table_of_whole_runs_is_the_tracked_one() -> None:
    wanted = [
        [row["setting"], str(row["messages"]), row["attack"], three(row, FOUND), three(row, CEILING)]
        for _, row in TABLES["whole_run"].iterrows()
    ]
    assert cells("What a whole run tells") == wanted


def test_the_table_of_photographs_is_the_tracked_one() -> None:
    names = [
        "none",
        "matched-0.3",
        "matched-1",
        "naive-0.3",
        "floor-400",
        "floor-600",
        "hint-0.5",
        "hint-1",
        "coarse-2.5",
    ]
    rows = cells("Photographs")
    assert len(rows) == len(names) + 1 == SETTINGS["photos"]["n_seeds"].notna().sum()
    for name, (_, *said) in zip([*names, "(public data only)"], rows, strict=True):
        row = SETTINGS["photos"].loc[name]
        told = ["nothing is sent", "–"] if pd.isna(row["n"]) else [f"{three(row, kind)} %" for kind in (FOUND, CEILING)]
        assert said == [*told, *(spread(name, "photos", f"control_edges{asked}") for asked in ("", "_guided"))], name


def test_the_table_of_private_fine_tuning_is_the_tracked_one() -> None:
    words = {"attention": "attention (DP-LDM)", "unet": "full U-Net", "lora": "LoRA (rank 8)"}
    order = ["digits", "photos", "shapes"]
    found = []
    kinds = DP.assign(target=DP["epsilon"].map(nominal)).groupby(["dataset", "trainable", "target"], sort=False)
    for (data, trainable, target), own in sorted(kinds, key=lambda kind: order.index(kind[0][0])):
        mean = own.mean(numeric_only=True, skipna=False)
        private = trainable in words
        accuracy = f"{mean['downstream_acc']:.3f} ± {own['downstream_acc'].std():.3f}"
        found.append(
            [
                data,
                words.get(trainable, trainable),
                "–" if trainable == "real images" else f"{target:g}".replace("inf", "∞"),
                f"{mean['noise_multiplier']:.2f}" if private else "–",
                "–" if pd.isna(mean["downstream_acc"]) else accuracy,
                f"{mean['frechet']:.2f}",
                "–" if pd.isna(mean["mia_auc"]) else f"{mean['mia_auc']:.3f}",
                "–" if pd.isna(mean["audit_epsilon_lb"]) else f"{mean['audit_epsilon_lb']:.2f}",
                str(len(own)),
            ]
        )
    assert sorted(cells("Private fine-tuning")) == sorted(found)


def test_the_tables_of_shares_are_the_tracked_one() -> None:
    rows = TABLES["dp_shares"]
    rows = rows[rows["part"].eq("candidates")]
    wanted = [
        (
            f"{row['epsilon']:g}".replace("inf", "∞"),
            row["noise_multiplier"],
            row["epsilon_share"],
            f"{100 * row['identified'] + 1e-9:.1f} % ({100 * row['low'] + 1e-9:.1f}–{100 * row['high'] + 1e-9:.1f})",
        )
        for _, row in rows.iterrows()
    ]
    said = cells("Shares of DP-LDM")
    assert len(said) == len(wanted)
    for (_, epsilon, sigma, of_share, ideal_share), (target, noise, own, identified) in zip(said, wanted, strict=True):
        assert epsilon == target
        assert float(sigma) == pytest.approx(noise, rel=5e-3, abs=1e-9)
        assert float(of_share.replace("∞", "inf")) == pytest.approx(own, rel=1e-2)
        assert ideal_share.replace("100 %", "100.0 %").replace("–100)", "–100.0)") == identified
    for noise, epsilon, one, every in cells("Shares of DP-LDM", table=1):
        single, whole = (shares(part, "attention", noise, float(epsilon)) for part in ("candidates", "run"))
        assert one == f"{100 * single['identified'] + 1e-9:.1f} %"
        interval = f" ({100 * whole['low']:.0f}–{100 * whole['high']:.0f})" if whole["identified"] < 1 else ""
        assert every == f"{share(whole['identified'])}{interval}"


def test_the_table_of_noise_and_floor_is_joined_from_the_tracked_ones() -> None:
    full = read_table(ROOT / "reports/full-grid/split_attacks.csv")
    text = (ROOT / "docs/measurements.md").read_text().split("**How far noise and floor can be pushed**")[1]
    lines = re.findall(r"^\| (.*) \|$", text.split("## Hiding")[0], re.M)[1:]
    assert len(lines) == 9
    for line in lines:
        words, name, control, low, high = line.split(" | ")
        data, attacks = ("photos", TABLES["split_attacks"]) if words.startswith("photos") else ("shapes", full)
        own = attacks[attacks["run"].eq(f"survey-{data}-{name.strip('`')}") & ~attacks["attack"].isin(NO_INFORMATION)]
        most = own.groupby("t_low")["id_top1"].max()
        cost = TABLES["utility"]
        cost = cost[cost["dataset"].eq(data) & cost["setting"].eq(name.strip("`"))].iloc[0]
        assert control == f"{cost['control_iou' if data == 'shapes' else 'control_edges']:.2f}", name
        assert low == share(most.iloc[0]), name
        assert high == (share(most[800]) if 800 in most else "nothing sent there"), name
        assert own["hint_id_top1"].max() == 1.0, name


def test_the_table_of_secret_keys_is_the_tracked_one() -> None:
    rows = TABLES["secret_keys"].set_index(["dataset", "setting", "attack"])

    def told(data: str, settings: tuple[str, str], name: str) -> list[str]:
        found = [rows.loc[(data, one, name)] for one in settings]
        return [f"{row['psnr_db']:.1f}, {share(row['id_top1'])}" for row in found]

    said = cells("The attack catalogue", table=1)
    assert len(said) == 4
    for where, raw, own, guess in said:
        data, _, defence = where.partition(", ")
        what = defence.partition(",")[0]
        pair = tuple(name for name in rows.index.get_level_values(1).unique() if name.startswith(what))
        name, _, numbers = own.partition(" ")
        assert len(pair) == 2
        assert raw == " / ".join(told(data, pair, "closed_form"))
        assert numbers == " / ".join(told(data, pair, name))
        assert {guess} == set(told(data, pair, "mean_public"))


def test_every_section_names_a_command_and_none_speaks_of_trials() -> None:
    text = (ROOT / "docs/measurements.md").read_text()
    assert not re.search(
        r"not kept as a command|by hand|ad-hoc|\ba trial|\(trials?\b|single observation|not a benchmark", text
    )
    sections = re.split(r"^##+ ", text, flags=re.M)
    assert len(sections) > 8
    for section in sections:
        command = re.search(r"`[^`]*\b(python benchmarks/|pytest |make |dvc )[^`]*`|benchmarks/\w+\.py", section)
        assert command or not re.search(r"\d", section), section[:60]


def test_what_goes_between_machines_is_the_tracked_table() -> None:
    rows = TABLES["remote_ingest"].set_index("measure")["value"]
    told = "; ".join(" / ".join(f"{v:.1f}" for v in rows[f"{way}_mb_s"]) + " MB/s" for way in ("publish", "consume"))
    assert told in DOCUMENTS["docs/measurements.md"]
    assert f"| {rows['share']:.3f}×; {rows['restart_s']:.3f} s |" in DOCUMENTS["docs/measurements.md"]


def test_the_kills_that_are_told_of_are_the_tracked_ones() -> None:
    rows = TABLES["remote_faults"]
    verdict, kills = rows.iloc[-1], rows.iloc[:-1]
    assert str(verdict["bit_identical"]) == str(verdict["every_message_once"]) == "True"
    restarts = kills["restart_s"].dropna()
    assert f"server to its first step again, largest of {len(restarts)}" in DOCUMENTS["docs/measurements.md"]
    told = (
        f"{len(kills)} kills: bit-identical, every one of {verdict['steps']:.0f} messages applied once, none refused; "
    )
    assert f"{told}{restarts.max():.2f} s" in DOCUMENTS["docs/measurements.md"]
