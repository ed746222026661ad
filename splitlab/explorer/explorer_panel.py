"""Browse the attacked runs."""

import math

import ipywidgets as widgets
from markupsafe import Markup

from splitlab.explorer import markup
from splitlab.explorer.explore import Artefacts, attack_title, sample_groups
from splitlab.explorer.parts import DESCRIBED, WIDE, Panel, dropdown, htmls, row, run_rows, slider
from splitlab.explorer.run_view import Attempt, RunView, comparison, sample_scores


class Explorer(Panel):
    """Browse the attacked runs: run, attack, timestep range, sample; pictures and scores of that sample."""

    def __init__(self, artefacts: Artefacts):
        super().__init__()
        self.artefacts = artefacts
        self.run = dropdown("run")
        self.attack = dropdown("attack")
        self.seed = dropdown("seed", width="170px")
        self.timesteps = widgets.IntRangeSlider(
            description="timesteps", min=0, max=1000, step=50, value=(0, 1000), layout=WIDE, style=DESCRIBED
        )
        self.sample = slider("sample", max=0, readout=False)
        self.about, self.caption, self.pictures, self.scores, self.comparison, self.threats = htmls(6)
        threats = widgets.Accordion(children=[self.threats], titles=("Threat model of this attack",))
        self._body = widgets.VBox(
            [
                *(self.about, row([self.attack, self.seed]), self.timesteps),
                *(row([self.sample, self.caption]), self.pictures, self.scores, self.comparison, threats),
            ]
        )
        self.lay_out(self.message, self.run, self._body)
        self.view: RunView | None = None
        self._samples: list[int] = []
        self.when(self._load_run, self.run)
        self.when(self._list_seeds, self.attack)
        self.when(self._list_samples, self.timesteps)
        self.when(self._show, self.seed, self.sample)
        self.run.layout.display = self._body.layout.display = "none"
        self.run_reported(self._start)

    @property
    def current(self) -> Attempt | None:
        """The attempt that is shown."""
        tries = self.view.attempts.get(self.attack.value, {}) if self.view else {}
        return tries.get(self.seed.value)

    @property
    def position(self) -> int | None:
        """The transcript's sample that is shown; None if no sample is in the timestep range."""
        return self._samples[self.sample.value] if self._samples else None

    def _start(self) -> None:
        names = self.artefacts.attacked()
        self.run.options, self.run.value = names, names[0]
        self.run.layout.display = ""
        self._load_run()

    def _load_run(self) -> None:
        self.view, self._body.layout.display = None, "none"  # until it is loaded there is nothing to show
        self.view = self.artefacts.view(self.run.value)
        self._body.layout.display = ""
        self._describe(self.view)
        self._set_samples(None)
        self._list_attacks(self.attack.value)

    def _describe(self, view: RunView) -> None:
        recorded = f"{len(view.timesteps)} samples in {len(view.transcript.observations)} messages"
        rows = [("recorded", recorded), ("strongest attack", view.compared())]
        self.about.value = markup.rows([*run_rows(view.known.config), *rows])

    def _list_attacks(self, wanted: str | None) -> None:
        assert self.view is not None, "a run is loaded first"
        attempts = self.view.attempts
        self.attack.options = [(attack_title(next(iter(tries.values()))), name) for name, tries in attempts.items()]
        self.attack.value = wanted if wanted in attempts else self.view.strongest
        self._list_seeds()

    def _list_seeds(self) -> None:
        assert self.view is not None, "a run is loaded first"
        seeds = list(self.view.attempts[self.attack.value])
        before = self.seed.value
        self.seed.options = seeds
        self.seed.value = before if before in seeds else seeds[0]
        self.seed.disabled = len(seeds) == 1
        self._show()

    def _list_samples(self) -> None:
        self._set_samples(self.position)
        self._show()

    def _set_samples(self, kept: int | None) -> None:
        """Walk through the samples in the timestep range, from `kept` on if it is one of them."""
        assert self.view is not None, "a run is loaded first"
        self._samples = self.view.within(*self.timesteps.value)
        self.sample.max = max(0, len(self._samples) - 1)
        self.sample.value = self._samples.index(kept) if kept in self._samples else self._middle()
        self.sample.disabled = not self._samples

    def _middle(self) -> int:
        """Return the place in the slider nearest to its middle whose sample was scored; the middle where none was."""
        assert self.view is not None, "a run is loaded first"
        middle, scored = len(self._samples) // 2, self.view.scored_samples
        places = [place for place, sample in enumerate(self._samples) if scored[sample]]
        return min(places, key=lambda place: abs(place - middle), default=middle)

    def add(self, attempt: Attempt, view: RunView) -> None:
        """Take in a live attempt and show it, if its run is still the one shown."""
        view.add(attempt)
        if view is self.view:
            with self.quietly():
                self._describe(view)
                self._list_attacks(attempt.attack)

    def _show(self) -> None:
        view, attempt, sample = self.view, self.current, self.position
        if view is None or attempt is None:
            return
        self.threats.value = markup.rows(attempt.threat_model)
        if sample is None:
            (low, high), floor = self.timesteps.value, int(view.timesteps.min())
            text = (
                f"No recorded sample has a timestep from {low} to {high}; this run's begin at {floor}. Widen the range."
            )
            self.pictures.value = markup.message(text)
            self.caption.value = self.scores.value = self.comparison.value = ""
            return
        place = f"{self.sample.value + 1} of {len(self._samples)}"
        self.caption.value = markup.caption(int(view.timesteps[sample]), view.prompt(sample), place)
        self.pictures.value = markup.groups(sample_groups(view, attempt, sample, self.artefacts.base))
        self.scores.value, self.comparison.value = self._numbers(view, attempt, sample)

    def _numbers(self, view: RunView, attempt: Attempt, sample: int) -> tuple[str, str]:
        if not attempt.scores:
            text = "There are no scores of this reconstruction yet."
            return markup.message(text, hint=Markup("<code>dvc repro evaluate</code> makes them.")), ""
        scores = sample_scores(view, attempt, sample)
        candidates = min(self.artefacts.config.candidates, len(view.known.private))
        shown = {}
        if "psnr_db" in scores:
            shown = {
                "PSNR": markup.number(scores["psnr_db"], 1, " dB"),
                "SSIM": markup.number(scores["ssim"], 2),
                f"identified among {candidates}": markup.verdict([scores["identified"]]),
                "VAE ceiling": markup.number(scores["ceiling_psnr_db"], 1, " dB"),
                "no information": markup.number(scores["no_info_psnr_db"], 1, " dB"),
            }
        if "hint_psnr_db" in scores:
            shown["hint PSNR"] = markup.number(scores["hint_psnr_db"], 1, " dB")
            shown["identified by the hint"] = markup.verdict([scores["hint_identified"]])
        if "both_identified" in scores:
            shown["identified by both"] = markup.verdict([scores["both_identified"]])
        if "prompt_exact" in scores:
            shown["prompt exact"] = markup.verdict([scores["prompt_exact"]])
        reference = {"guess": scores["no_info_psnr_db"], "ceiling": scores["ceiling_psnr_db"]}
        chips = markup.chips(shown)
        if all(math.isnan(scores[name]) for name in attempt.scores):
            first = self.artefacts.config.samples
            chips += markup.message(
                f"This sample was not scored: the evaluation scores the first {first} of each timestep bucket."
            )
        return chips, markup.bars(comparison(view, sample), chosen=attempt.attack, **reference)
