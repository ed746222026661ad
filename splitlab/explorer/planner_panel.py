"""Name a target and get the most useful setting that met it in measured attacks."""

import math
from dataclasses import fields, replace
from pathlib import Path

import ipywidgets as widgets
from markupsafe import Markup

from splitlab.core.labels import UNMEASURED
from splitlab.explorer import markup
from splitlab.explorer.explore import Artefacts
from splitlab.explorer.parts import DESCRIBED, WIDE, dropdown, htmls, reported
from splitlab.params import load_split
from splitlab.split.attacks import attack_label
from splitlab.split.config import Defences
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


class PlannerPanel(widgets.VBox):
    """Choose how many may be identified and how often an image is sent; see which setting keeps most control."""

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
        self.message, self.proposal, self.settings = htmls(3)
        self.children = [
            *(widgets.HTML(markup.STYLE), self.dataset, self.messages, self.target),
            *(self.message, self.proposal, self.settings),
        ]
        for widget in (self.dataset, self.messages, self.target):
            widget.observe(lambda change: self._show(), "value")
        self._show()

    def _norm(self) -> float:
        """Return the norm that bounds public latents, worked out once for each data set."""
        name = self.dataset.value
        if name not in self.norms:
            images = load_split(name, "public", self.artefacts.params, limit=self.n_images)
            self.norms[name] = usual_norm(self.artefacts.base, images, cache=self.artefacts.cache)
        return self.norms[name]

    def _show(self) -> None:
        self.proposal.value = self.settings.value = ""
        with reported(self.message, make_it=TABLES):
            known = shipped(self.dataset.value, messages=self.messages.value, metrics=self.metrics)
            self.settings.value = table(known, None)
            found = plan(
                known,
                self.artefacts.base.alphas_cumprod,
                norm=self._norm(),
                delta=DELTA,
                messages=self.messages.value,
                identification=self.target.value,
            )
            self.proposal.value, self.settings.value = proposal(found), table(known, found)


def proposal(found: Plan) -> str:
    """Show a plan in words, and as it is written into params.yaml."""
    one = found.setting
    numbers = {
        f"identified by the strongest attack (chance {one.chance:.0%})": f"{one.identification:.0%}",
        "by who holds the candidates": markup.number(100 * one.ideal, 0, "%", missing=UNMEASURED),
        "control": markup.number(one.control_iou, 2, missing=UNMEASURED),
        "ε of one message": epsilon(found.epsilon_message),
        "ε of all messages of an image": epsilon(found.epsilon_run),
    }
    values = {field.name: getattr(one.defences, field.name) for field in fields(Defences)}
    lines = ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items() if value)
    setting = [
        ("proposed", one.defences.label),
        ("strongest attack", attack_label(one.attack)),
        ("params.yaml", f"defences: {{{lines}}}"),
    ]
    note = (
        f"ε at δ = {DELTA:g}, for replacing an image and its hint, of a run with secret draws. A large ε proves next "
        "to nothing: below it, only the attacks measured speak for a setting. Public data alone may teach as much: see "
        "the report."
    )
    return markup.chips(numbers) + markup.rows(setting) + markup.note(note)


def epsilon(value: float) -> str:
    """Write an ε; where there is none, say so."""
    return "none" if math.isinf(value) else f"{value:,.0f}"


def table(known: list[Setting], found: Plan | None) -> str:
    """Show all settings measured, most control first."""
    order = sorted(known, key=lambda one: -1.0 if math.isnan(one.control_iou) else one.control_iou, reverse=True)
    rows = [
        {
            "label": one.defences.label,
            "share": one.identification,
            "ideal": one.ideal,
            "control": one.control_iou,
            "chosen": found is not None and proposes(found, one),
        }
        for one in order
    ]
    return markup.settings(rows)


def proposes(found: Plan, one: Setting) -> bool:
    """Tell whether a setting is the proposed one, which may have got a norm that it was measured without."""
    proposed = found.setting.defences
    return replace(one.defences, latent_norm=proposed.latent_norm) == proposed
