"""The panels beside the explorer: what ControlNets make of hints, inversions played, defences tried and planned."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from markupsafe import Markup

from splitlab.core.labels import UNMEASURED
from splitlab.core.pixels import to_uint8
from splitlab.explorer import markup
from splitlab.explorer.explore import Artefacts, png
from splitlab.explorer.parts import DESCRIBED, WIDE, Panel, checkbox, dropdown, htmls, row, run_rows, slider
from splitlab.explorer.playground import Playground
from splitlab.explorer.update_explore import Inverted, Progress, side_by_side
from splitlab.params import load_split
from splitlab.split.artefacts import read_record, read_samples
from splitlab.split.attacks import attack_label
from splitlab.split.defences import DEFENCES, Defence, Defences
from splitlab.study.planner import Plan, Setting, plan, shipped, usual_norm

TARGETS = (0.05, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0)
"""Shares of images that the strongest attack may identify."""

DELTA = 1e-5
"""δ of the guarantee that is stated beside the measurements."""

TABLES = Markup(
    "The shipped tables are in the repository: <code>git show HEAD:reports/metrics/matched_client.csv</code> "
    "prints one; "
    "<code>PlannerPanel(metrics=...)</code> reads those of another folder."
)

SHOWN = {"symsigmoid": True, "half": True, "fixed_noise": 0.5}
"""The defences that are on at first."""


class Gallery(Panel):
    """What the trained ControlNets make of held-out hints: any run, in pairs of hint and generated image."""

    def __init__(self, artefacts: Artefacts, *, shown: int = 12):
        super().__init__()
        self.artefacts, self.shown = artefacts, shown
        self.run, self.first = dropdown("run"), slider("from", step=shown)
        self.about, self.pictures = htmls(2)
        self._samples: tuple[Any, Any, list[str]] | None = None
        self.when(self._load, self.run)
        self.when(self._show, self.first)
        self.lay_out(self.message)
        self.run_reported(self._start)

    def _start(self) -> None:
        names = self.artefacts.trained()
        self.run.options, self.run.value = names, names[0]
        self.lay_out(self.message, self.run, self.about, self.first, self.pictures)
        self._load()

    def _load(self) -> None:
        folder = self.artefacts.runs / self.run.value
        record, config = read_record(folder / "record.json")
        hints, images, prompts = read_samples(folder / "samples.safetensors")
        self._samples = to_uint8(hints), to_uint8(images), prompts
        overlap, edges = (record.get(f"control_{what}") for what in ("iou", "edges"))
        followed = f"disc overlap {overlap:.2f}, " if overlap is not None else ""
        where = UNMEASURED if edges is None else f"{edges:+.2f} (0: by chance)"
        followed += f"edges where the hints want them {where}"
        self.about.value = markup.rows([*run_rows(config), ("follows the hints", followed)])
        self.first.max = (len(prompts) - 1) // self.shown * self.shown
        self._show()

    def _show(self) -> None:
        if self._samples is not None:
            hints, images, prompts = (part[self.first.value : self.first.value + self.shown] for part in self._samples)
            pairs = zip(hints, images, prompts, strict=True)
            self.pictures.value = markup.gallery([(png(h, side=96), png(i, side=96), p) for h, i, p in pairs])


class InversionPanel(Panel):
    """Play an inversion's history: a federated update, an attack on it, and a slider over its evaluations."""

    def __init__(self, inverted: Inverted):
        super().__init__()
        self.inverted = inverted
        self.cell, self.attack = dropdown("updates"), dropdown("attack")
        self.update, self.frame = slider("update", max=0), slider("progress", max=0, readout=False)
        self.play = widgets.Play(min=0, max=0, interval=400, description="play")
        self.about, self.pictures = htmls(2)
        self.progress: Progress | None = None
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        self.when(self._load_cell, self.cell)
        self.when(self._load, self.attack, self.update)
        self.when(self._show, self.frame)
        self.lay_out(self.message)
        self.run_reported(self._start)

    def _start(self) -> None:
        self._cells = self.inverted.cells
        self.cell.options, self.cell.value = list(self._cells), next(iter(self._cells))
        controls = (self.cell, self.attack, self.update, row([self.play, self.frame]))
        self.lay_out(self.message, *controls, self.about, self.pictures)
        self._load_cell()

    def _load_cell(self) -> None:
        cell = self._cells[self.cell.value]
        self.update.value, self.update.max = 0, self.inverted.n_updates(cell) - 1
        names = self.inverted.attacks(cell)
        self.attack.options = list(names.items())
        self.attack.value = next(iter(names.values()))
        self._load()

    def _load(self) -> None:
        cell = self._cells[self.cell.value]
        self.progress = self.inverted.progress(cell, self.attack.value, self.update.value)
        self.frame.max = self.play.max = len(self.progress.frames) - 1
        self.frame.value = self.frame.max
        self._show()

    def _show(self) -> None:
        progress, frame = self.progress, self.frame.value
        if progress is None:
            return
        picture = png(to_uint8(side_by_side(progress, frame)), side=320)
        rows = [
            ("attack", f"{progress.label}; CPU {progress.saved.cpu_s:.1f} s for all updates"),
            ("evaluations", f"{progress.frames[frame][0]} of {progress.saved.n_evals}"),
            ("SSIM", f"{progress.ssim[frame]:.3f}"),
        ]
        self.about.value = markup.rows(rows)
        self.pictures.value = markup.picture(picture, "above: private, below: reconstructed")


class PlaygroundPanel(Panel):
    """Turn a client's defences on and off and see at once what the server receives and what it makes of it."""

    def __init__(self, artefacts: Artefacts, *, dataset: str = "photos", n_images: int = 640):
        super().__init__()
        self.artefacts, self.n_images = artefacts, n_images
        self.playground: Playground | None = None
        self.image, self.timestep = slider("image", value=1), slider("timestep", value=500, max=999)
        self.defences = {name: _control(defence) for name, defence in DEFENCES.items()}
        for name, value in SHOWN.items():
            self.defences[name].value = value
        self.label, self.messages = checkbox("noise label sent"), _slider("seen so far", (1, 4, 16, 64, 128))
        self.messages.value = 16
        self.pictures, self.scores = htmls(2)
        names = sorted(artefacts.params["datasets"])
        self.dataset = dropdown("data", names)
        if dataset in names:
            self.dataset.value = dataset
        controls = list(self.defences.values())
        self.lay_out(
            *(self.dataset, self.image, self.timestep, row([self.label, self.messages])),
            row([control for control in controls if isinstance(control, widgets.Checkbox)]),
            row([control for control in controls if not isinstance(control, widgets.Checkbox)]),
            *(self.message, self.pictures, self.scores),
        )
        self.when(self._load, self.dataset)
        self.when(self._show, self.image, self.timestep, self.label, self.messages, *controls)
        self.run_reported(self._load)

    def _load(self) -> None:
        self.playground = None
        images = load_split(self.dataset.value or "shapes", "public", self.artefacts.params, limit=self.n_images)
        base, n_client = self.artefacts.base, min(128, len(images) // 2)
        playground = Playground(base, images, n_client=n_client, cache=self.artefacts.cache)
        self.image.max, self.timestep.max = len(playground.images) - 1, base.n_timesteps - 1
        self.playground = playground
        self._show()

    def _show(self) -> None:
        if self.playground is None:
            return
        trial = self.playground.trial(
            self.image.value,
            self.timestep.value,
            Defences(**{name: control.value for name, control in self.defences.items()}),
            send_label=self.label.value,
            n_messages=self.messages.value,
        )
        self.pictures.value = markup.groups(trial.groups)
        numbers = {
            "PSNR": markup.number(trial.psnr_db, 1, " dB"),
            "VAE ceiling": markup.number(trial.ceiling_psnr_db, 1, " dB"),
            "hint PSNR": markup.number(trial.hint_psnr_db, 1, " dB"),
            "on the wire for this sample": f"{trial.size_bytes:,} bytes",
        }
        self.scores.value = markup.chips(numbers) + markup.note(trial.method)


def _control(defence: Defence) -> widgets.Checkbox | widgets.SelectionSlider:
    """Return what sets a defence: a box to tick, or a slider over the values worth trying."""
    name = defence.name.replace("_", " ")
    control = (
        checkbox(name, value=False) if isinstance(defence.off, bool) else _slider(name, (defence.off, *defence.usual))
    )
    control.tooltip = defence.says
    return control


def _slider(name: str, values: Sequence[bool | int | float]) -> widgets.SelectionSlider:
    return widgets.SelectionSlider(description=name, options=values, style=DESCRIBED, continuous_update=False)


class PlannerPanel(Panel):
    """Choose how many may be identified and how often an image is sent; see which setting keeps most control."""

    make_it = TABLES

    def __init__(self, artefacts: Artefacts, *, metrics: str | Path = "reports/metrics", n_images: int = 640):
        super().__init__()
        self.artefacts, self.metrics, self.n_images = artefacts, metrics, n_images
        self.norms: dict[str, float] = {}
        self.dataset = dropdown("data", ("shapes", "photos"))
        self.messages = dropdown("sent", (("once per image", 1), ("29 times per image, a run of 900 steps", 29)))
        self.target = widgets.SelectionSlider(
            description="identified", value=0.1, layout=WIDE, style=DESCRIBED, continuous_update=False,
            options=[(f"at most {share:.0%}", share) for share in TARGETS],
        )  # fmt: skip
        self.proposal, self.settings = htmls(2)
        controls = (self.dataset, self.messages, self.target)
        self.lay_out(*controls, self.message, self.proposal, self.settings)
        self.when(self._show, *controls)
        self.run_reported(self._show)

    def _norm(self) -> float:
        """Return the norm that bounds public latents, worked out once for each data set."""
        name = self.dataset.value
        if name not in self.norms:
            images = load_split(name, "public", self.artefacts.params, limit=self.n_images)
            self.norms[name] = usual_norm(self.artefacts.base, images, cache=self.artefacts.cache)
        return self.norms[name]

    def _show(self) -> None:
        self.proposal.value = self.settings.value = ""
        known = shipped(self.dataset.value, messages=self.messages.value, metrics=self.metrics)
        self.settings.value = table(known, None)
        chosen = plan(
            known,
            self.artefacts.base.alphas_cumprod,
            norm=self._norm(),
            delta=DELTA,
            messages=self.messages.value,
            identification=self.target.value,
        )
        self.proposal.value, self.settings.value = proposal(chosen), table(known, chosen)


def proposal(chosen: Plan) -> str:
    """Show a plan in words, and as it is written into params.yaml."""
    setting = chosen.setting
    numbers = {
        f"identified by the strongest attack (chance {setting.chance:.0%})": f"{setting.identification:.0%}",
        "by who holds the candidates": markup.number(100 * setting.ideal, 0, "%", missing=UNMEASURED),
        "control": markup.number(setting.control_iou, 2, missing=UNMEASURED),
        "ε of one message": epsilon(chosen.epsilon_message),
        "ε of all messages of an image": epsilon(chosen.epsilon_run),
    }
    values = {field.name: getattr(setting.defences, field.name) for field in fields(Defences)}
    lines = ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items() if value)
    words = [
        ("proposed", setting.defences.label),
        ("strongest attack", attack_label(setting.attack)),
        ("params/split.yaml", f"defences: {{{lines}}}"),
    ]
    note = (
        f"ε at δ = {DELTA:g}, for replacing an image and its hint, of a run with secret draws. A large ε proves next "
        "to nothing: below it, only the attacks measured speak for a setting. Public data alone may teach as much: see "
        "the report."
    )
    return markup.chips(numbers) + markup.rows(words) + markup.note(note)


def epsilon(value: float) -> str:
    """Write an ε; where there is none, say so."""
    return "none" if math.isinf(value) else f"{value:,.0f}"


def table(known: list[Setting], chosen: Plan | None) -> str:
    """Show all settings measured, most control first."""
    order = sorted(known, key=lambda each: -1.0 if math.isnan(each.control_iou) else each.control_iou, reverse=True)
    rows = [
        {
            "label": setting.defences.label,
            "share": setting.identification,
            "ideal": setting.ideal,
            "control": setting.control_iou,
            "chosen": chosen is not None and proposes(chosen, setting),
        }
        for setting in order
    ]
    return markup.settings(rows)


def proposes(chosen: Plan, setting: Setting) -> bool:
    """Tell whether a setting is the proposed one, which may have got a norm that it was measured without."""
    proposed = chosen.setting.defences
    return replace(setting.defences, latent_norm=proposed.latent_norm) == proposed
