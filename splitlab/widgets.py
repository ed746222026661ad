"""Widgets to look at reconstructions with, to attack live and to try defences: the package's only ipywidgets import.

A thin layer: what is shown comes from `splitlab.explore`, how it looks from `splitlab.markup`.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets as widgets

from splitlab import checkpoint, markup
from splitlab.artefacts import to_uint8
from splitlab.attacks import ATTACKS
from splitlab.config import Defences, TrainConfig, parse
from splitlab.data import ImageSet, load, locate
from splitlab.errors import InputError
from splitlab.explore import (
    Artefacts,
    Attempt,
    RunView,
    attack_title,
    comparison,
    defences_label,
    png,
    run_label,
    sample_groups,
    sample_scores,
)
from splitlab.paths import resolve
from splitlab.playground import Playground
from splitlab.update_explore import Inverted, side_by_side
from splitlab.words import FIELD_WORDS, attack_label

WIDE = widgets.Layout(width="min(640px, 100%)")
DESCRIBED = {"description_width": "84px"}
MAKE_IT = "<code>dvc repro</code> makes what is missing."


class Explorer(widgets.VBox):
    """Browse the attacked runs: run, attack, timestep range, sample; pictures and scores of that sample."""

    def __init__(self, artefacts: Artefacts):
        super().__init__()
        self.artefacts = artefacts
        self.run = _dropdown("run")
        self.attack = _dropdown("attack")
        self.seed = _dropdown("seed", width="170px")
        self.timesteps = widgets.IntRangeSlider(
            description="timesteps", min=0, max=1000, step=50, value=(0, 1000), layout=WIDE, style=DESCRIBED
        )
        self.sample = widgets.IntSlider(description="sample", max=0, readout=False, layout=WIDE, style=DESCRIBED)
        self.about, self.caption, self.pictures, self.scores, self.comparison, self.threats, self.message = _htmls(7)
        threats = widgets.Accordion(children=[self.threats], titles=("Threat model of this attack",))
        self._body = widgets.VBox(
            [
                *(self.about, _row([self.attack, self.seed]), self.timesteps),
                *(_row([self.sample, self.caption]), self.pictures, self.scores, self.comparison, threats),
            ]
        )
        self.children = [widgets.HTML(markup.STYLE), self.message, self.run, self._body]
        self.view: RunView | None = None
        self._samples: list[int] = []
        self._quiet = False
        for widget, handler in (
            *((self.run, self._load_run), (self.attack, self._list_seeds), (self.timesteps, self._list_samples)),
            *((self.seed, self._show), (self.sample, self._show)),
        ):
            widget.observe(self._when_loud(handler), "value")
        self._start()

    def _when_loud(self, handler: Callable[[], None]) -> Callable[[object], None]:
        """Call `handler` when the user changes something, not when a handler does; report bad input where it shows."""

        def handle(change: object) -> None:
            if not self._quiet:
                with _reported(self.message):
                    handler()

        return handle

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

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
        self.run.layout.display = self._body.layout.display = "none"
        with _reported(self.message):
            names = self.artefacts.attacked()
            with self._quietly():
                self.run.options, self.run.value = names, names[0]
            self.run.layout.display = ""
            self._load_run()

    def _load_run(self) -> None:
        self.view, self._body.layout.display = None, "none"  # until it is loaded there is nothing to show
        self.view = self.artefacts.view(self.run.value)
        self._body.layout.display = ""
        config = self.view.known.config
        self.about.value = markup.rows(
            [
                ("run", run_label(config)),
                ("defences", defences_label(config.defences)),
                (
                    "recorded",
                    f"{len(self.view.timesteps)} samples in {len(self.view.transcript.observations)} messages",
                ),
            ]
        )
        self._set_samples(None)
        self._list_attacks(self.attack.value)

    def _list_attacks(self, wanted: str | None) -> None:
        assert self.view is not None, "a run is loaded first"
        attempts = self.view.attempts
        with self._quietly():
            self.attack.options = [(attack_title(next(iter(tries.values()))), name) for name, tries in attempts.items()]
            self.attack.value = wanted if wanted in attempts else list(attempts)[-1]
        self._list_seeds()

    def _list_seeds(self) -> None:
        assert self.view is not None, "a run is loaded first"
        seeds = list(self.view.attempts[self.attack.value])
        with self._quietly():
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
        with self._quietly():
            self.sample.max = max(0, len(self._samples) - 1)
            self.sample.value = self._samples.index(kept) if kept in self._samples else len(self._samples) // 2
            self.sample.disabled = not self._samples

    def add(self, attempt: Attempt, view: RunView) -> None:
        """Take in a live attempt and show it, if its run is still the one shown."""
        view.add(attempt)
        if view is self.view:
            self._list_attacks(attempt.attack)

    def _show(self) -> None:
        view, one, sample = self.view, self.current, self.position
        if view is None or one is None:
            return
        self.threats.value = markup.rows(one.threat_model)
        if sample is None:
            (low, high), floor = self.timesteps.value, int(view.timesteps.min())
            text = (
                f"No recorded sample has a timestep from {low} to {high}; this run's begin at {floor}. Widen the range."
            )
            self.pictures.value = markup.message(text)
            self.caption.value = self.scores.value = self.comparison.value = ""
            return
        place = f"{self.sample.value + 1} of {len(self._samples)}"
        caption = f"<b>t = {int(view.timesteps[sample])}</b> · “{markup.escape(view.prompt(sample))}” · {place}"
        self.caption.value = markup.block(caption)
        self.pictures.value = markup.groups(sample_groups(view, one, sample, self.artefacts.base))
        self.scores.value, self.comparison.value = self._numbers(view, one, sample)

    def _numbers(self, view: RunView, one: Attempt, sample: int) -> tuple[str, str]:
        if not one.scores:
            text = "There are no scores of this reconstruction yet."
            return markup.message(text, hint="<code>dvc repro evaluate</code> makes them."), ""
        scores = sample_scores(view, one, sample)
        candidates = min(self.artefacts.config.candidates, len(view.known.private))
        shown = {}
        if "psnr_db" in scores:
            shown = {
                "PSNR": markup.number(scores["psnr_db"], 1, " dB"),
                "SSIM": markup.number(scores["ssim"], 2),
                f"identified among {candidates}": "yes" if scores["identified"] > 0.5 else "no",
                "VAE ceiling": markup.number(scores["ceiling_psnr_db"], 1, " dB"),
                "no information": markup.number(scores["no_info_psnr_db"], 1, " dB"),
            }
        if "hint_psnr_db" in scores:
            shown["hint PSNR"] = markup.number(scores["hint_psnr_db"], 1, " dB")
            shown["identified by the hint"] = "yes" if scores["hint_identified"] > 0.5 else "no"
        if "prompt_exact" in scores:
            shown["prompt exact"] = "yes" if scores["prompt_exact"] > 0.5 else "no"
        reference = {"guess": scores["no_info_psnr_db"], "ceiling": scores["ceiling_psnr_db"]}
        return markup.chips(shown), markup.bars(comparison(view, sample), chosen=one.attack, **reference)


class Cancelled(Exception):
    """The user stopped an attack."""


class AttackPanel(widgets.VBox):
    """Attack the explorer's run live: choose attack, fields and options; the result joins the explorer, in memory."""

    def __init__(self, explorer: Explorer):
        super().__init__()
        self.explorer = explorer
        self.attack = _dropdown("attack", [(attack_label(name), name) for name in ATTACKS])
        self.attack.value = "closed_form"  # the quickest that tells something
        self.seed = widgets.IntText(description="seed", value=0, layout=widgets.Layout(width="170px"), style=DESCRIBED)
        self.fields = {name: _checkbox(f"use {FIELD_WORDS[name]}") for name in FIELD_WORDS if name != "timesteps"}
        self.options: dict[str, Any] = {}
        self._options = _row([])
        self.button = widgets.Button(description="Attack now", button_style="primary", icon="play")
        self.cancel = widgets.Button(description="Cancel", icon="stop", disabled=True)
        self.progress = widgets.FloatProgress(min=0.0, max=1.0, layout=widgets.Layout(width="320px"))
        self.status, self.message = widgets.HTML(), widgets.HTML()
        self.thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._shown_at = 0.0
        self.children = [
            _row([self.attack, self.seed]),
            _row(list(self.fields.values())),
            self._options,
            _row([self.button, self.cancel, self.progress, self.status]),
            self.message,
        ]
        self.attack.observe(lambda change: self._list_options(), "value")
        explorer.run.observe(lambda change: self._list_fields(), "value")
        self.button.on_click(lambda button: self._start())
        self.cancel.on_click(lambda button: self._stop.set())
        self._list_options()
        self._list_fields()

    def _list_options(self) -> None:
        """Offer every numeric keyword of the attack function, at its default."""
        self.options = {}
        for name, parameter in inspect.signature(ATTACKS[self.attack.value]).parameters.items():
            kind = {int: widgets.IntText, float: widgets.FloatText}.get(type(parameter.default))
            if kind is not None:
                layout = widgets.Layout(width="190px")
                self.options[name] = kind(description=name, value=parameter.default, layout=layout, style=DESCRIBED)
        self._options.children = tuple(self.options.values())

    def _list_fields(self) -> None:
        """Offer the fields that were sent."""
        view = self.explorer.view
        sent = view.seen.tensors if view else {}
        for name, box in self.fields.items():
            box.layout.display = "" if name in sent else "none"
        self.button.disabled = view is None

    def _start(self) -> None:
        view = self.explorer.view
        if view is None or (self.thread and self.thread.is_alive()):
            return
        options = {name: box.value for name, box in self.options.items()}
        ignore = tuple(name for name, box in self.fields.items() if name in view.seen.tensors and not box.value)
        job = {"attack": self.attack.value, "ignore": ignore, "seed": self.seed.value, "options": options}
        self._stop.clear()
        self.button.disabled, self.cancel.disabled, self.message.value = True, False, ""
        self.progress.value, self.progress.bar_style, self.status.value = 0.0, "", "preparing and attacking …"
        self.thread = threading.Thread(target=self._work, args=(view, job), daemon=True)
        self.thread.start()

    def _work(self, view: RunView, job: dict[str, Any]) -> None:
        """Run in a thread, so that the explorer and the cancel button stay alive."""
        began = time.perf_counter()
        try:
            with _reported(self.message, make_it=""):
                attempt = self.explorer.artefacts.attack_live(view, callback=self._tell, **job)
                self.explorer.add(attempt, view)
                self.progress.value, self.progress.bar_style = 1.0, "success"
                self.status.value = f"done in {time.perf_counter() - began:.1f} s: see “live” among the attacks above"
        except Cancelled:
            self.message.value = ""
        except Exception as error:  # a thread's traceback would go nowhere
            self.message.value = markup.message(f"{type(error).__name__}: {error}")
        finally:
            if self.progress.bar_style != "success":
                self.progress.bar_style = "warning"
                self.status.value = "cancelled" if self._stop.is_set() else "stopped"
            self.button.disabled, self.cancel.disabled = False, True

    def _tell(self, what: str, done: int, total: int, objective: float) -> None:
        """Take an attack's callback: stop it if asked to, else show how far it is."""
        if self._stop.is_set():
            raise Cancelled
        if time.monotonic() - self._shown_at > 0.2 or done >= total:
            self._shown_at = time.monotonic()
            self.progress.value = min(1.0, done / total)
            self.status.value = f"step {min(done, total)} of {total}, objective {objective:.4g}"


class Gallery(widgets.VBox):
    """What the trained ControlNets make of held-out hints: any run, in pairs of hint and generated image."""

    def __init__(self, artefacts: Artefacts, *, shown: int = 12):
        super().__init__()
        self.artefacts, self.shown = artefacts, shown
        self.run = _dropdown("run")
        self.first = widgets.IntSlider(description="from", step=shown, layout=WIDE, style=DESCRIBED)
        self.about, self.pictures, self.message = _htmls(3)
        self._samples: tuple[Any, Any, list[str]] | None = None
        self.children = [widgets.HTML(markup.STYLE), self.message]
        with _reported(self.message):
            names = artefacts.trained()
            self.run.options, self.run.value = names, names[0]
            self._load()
            self.children = [*self.children, self.run, self.about, self.first, self.pictures]
        self.run.observe(lambda change: self._load(), "value")
        self.first.observe(lambda change: self._show(), "value")

    def _load(self) -> None:
        with _reported(self.message):
            folder = self.artefacts.runs / self.run.value
            record = checkpoint.load_json(folder / "record.json")
            tensors, meta = checkpoint.load(folder / "samples.safetensors")
            prompts: list[str] = meta["prompts"]  # type: ignore[assignment]
            self._samples = tensors["hints"], tensors["images"], prompts
            config = parse(TrainConfig, record["config"], where=f"{folder}/record.json")
            overlap = record.get("control_iou")
            followed = f"disc overlap {overlap:.2f}, " if overlap is not None else ""
            followed += f"SSIM of edges {record['control_ssim']:.2f}"
            self.about.value = markup.rows([*_run_rows(config), ("follows the hints", followed)])
            self.first.max = (len(prompts) - 1) // self.shown * self.shown
            self._show()

    def _show(self) -> None:
        if self._samples is not None:
            hints, images, prompts = (part[self.first.value : self.first.value + self.shown] for part in self._samples)
            pairs = zip(hints, images, prompts, strict=True)
            self.pictures.value = markup.gallery([(png(h, side=96), png(i, side=96), p) for h, i, p in pairs])


class InversionPanel(widgets.VBox):
    """Play an inversion's history: a federated update, an attack on it, and a slider over its evaluations."""

    def __init__(self, inverted: Inverted):
        super().__init__()
        self.inverted = inverted
        self.cell, self.attack = _dropdown("updates"), _dropdown("attack")
        self.update = widgets.IntSlider(description="update", max=0, layout=WIDE, style=DESCRIBED)
        self.frame = widgets.IntSlider(description="progress", max=0, readout=False, layout=WIDE, style=DESCRIBED)
        self.play = widgets.Play(min=0, max=0, interval=400, description="play")
        self.about, self.pictures, self.message = _htmls(3)
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        self.children = [widgets.HTML(markup.STYLE), self.message]
        with _reported(self.message):
            self._cells = inverted.cells
            self.cell.options, self.cell.value = list(self._cells), next(iter(self._cells))
            self._load_cell()
            controls = (self.cell, self.attack, self.update, _row([self.play, self.frame]))
            self.children = [*self.children, *controls, self.about, self.pictures]
        for widget, handler in (
            *((self.cell, self._load_cell), (self.attack, self._load)),
            *((self.update, self._load), (self.frame, self._show)),
        ):
            widget.observe(lambda change, handler=handler: handler(), "value")

    def _load_cell(self) -> None:
        with _reported(self.message):
            cell = self._cells[self.cell.value]
            self.update.value, self.update.max = 0, self.inverted.n_updates(cell) - 1
            names = self.inverted.attacks(cell)
            self.attack.options = list(names.items())
            self.attack.value = next(iter(names.values()))
            self._load()

    def _load(self) -> None:
        with _reported(self.message):
            cell = self._cells[self.cell.value]
            self.progress = self.inverted.progress(cell, self.attack.value, self.update.value)
            self.frame.max = self.play.max = len(self.progress.frames) - 1
            self.frame.value = self.frame.max
            self._show()

    def _show(self) -> None:
        with _reported(self.message):
            count, _ = self.progress.frames[self.frame.value]
            picture = png(to_uint8(side_by_side(self.progress, self.frame.value)), side=320)
            rows = [
                ("attack", f"{self.progress.label}; CPU {self.progress.saved.cpu_s:.1f} s for all updates"),
                ("evaluations", f"{count} of {self.progress.saved.n_evals}"),
                ("SSIM", f"{self.progress.ssim[self.frame.value]:.3f}"),
            ]
            self.about.value = markup.rows(rows)
            self.pictures.value = markup.picture(picture, "above: private, below: reconstructed")


class PlaygroundPanel(widgets.VBox):
    """Turn a client's defences on and off and see at once what the server receives and what it makes of it."""

    def __init__(self, artefacts: Artefacts, *, dataset: str = "photos", n_images: int = 640):
        super().__init__()
        self.artefacts, self.n_images = artefacts, n_images
        self.playground: Playground | None = None
        self.image = widgets.IntSlider(description="image", value=1, layout=WIDE, style=DESCRIBED)
        self.timestep = widgets.IntSlider(description="timestep", value=500, max=999, layout=WIDE, style=DESCRIBED)
        self.symsigmoid, self.half = _checkbox("symsigmoid", value=True), _checkbox("fp16", value=True)
        self.label = _checkbox("noise label sent")
        self.fixed_noise = widgets.FloatSlider(
            description="fixed noise", value=0.5, max=2.0, step=0.25, style=DESCRIBED, continuous_update=False
        )
        self.messages = widgets.SelectionSlider(
            description="seen so far", options=(1, 4, 16, 64, 128), value=16, style=DESCRIBED, continuous_update=False
        )
        self.pictures, self.scores, self.message = _htmls(3)
        public = resolve(artefacts.params["data"]["root"]) / "public"
        names = sorted({path.stem for path in public.glob("*")})
        self.dataset = _dropdown("data", names)
        if dataset in names:
            self.dataset.value = dataset
        self.children = [
            *(widgets.HTML(markup.STYLE), self.dataset, self.image, self.timestep),
            _row([self.symsigmoid, self.half, self.label]),
            _row([self.fixed_noise, self.messages]),
            *(self.message, self.pictures, self.scores),
        ]
        self.dataset.observe(lambda change: self._load(), "value")
        for widget in (
            self.image,
            self.timestep,
            self.symsigmoid,
            self.half,
            self.label,
            self.fixed_noise,
            self.messages,
        ):
            widget.observe(lambda change: self._show(), "value")
        self._load()

    def _images(self) -> ImageSet:
        root = resolve(self.artefacts.params["data"]["root"])
        return load(locate(self.dataset.value or "shapes", "public", root=root), limit=self.n_images)

    def _load(self) -> None:
        self.playground = None
        with _reported(self.message):
            base, images = self.artefacts.base, self._images()
            playground = Playground(base, images, n_client=min(128, len(images) // 2), cache=self.artefacts.cache)
            self.image.max, self.timestep.max = len(playground.images) - 1, base.n_timesteps - 1
            self.playground = playground
            self._show()

    def _show(self) -> None:
        if self.playground is None:
            return
        defences = Defences(symsigmoid=self.symsigmoid.value, fixed_noise=self.fixed_noise.value, half=self.half.value)
        with _reported(self.message):
            trial = self.playground.trial(
                self.image.value,
                self.timestep.value,
                defences,
                send_label=self.label.value,
                n_messages=self.messages.value,
            )
            self.pictures.value = markup.groups(trial.groups)
            self.scores.value = markup.chips(
                {
                    "PSNR": markup.number(trial.psnr_db, 1, " dB"),
                    "VAE ceiling": markup.number(trial.ceiling_psnr_db, 1, " dB"),
                    "hint PSNR": markup.number(trial.hint_psnr_db, 1, " dB"),
                    "on the wire for this sample": f"{trial.size_bytes:,} bytes",
                }
            ) + markup.block(f"<span class='dim'>{markup.escape(trial.method)}</span>")


@contextmanager
def _reported(area: widgets.HTML, *, make_it: str = MAKE_IT) -> Iterator[None]:
    """Show bad or missing input in `area`, with the command that makes it, in place of a traceback."""
    try:
        yield
        area.value = ""
    except InputError as error:
        area.value = markup.message(error, hint="" if "dvc" in str(error) else make_it)


def _run_rows(config: TrainConfig) -> list[tuple[str, str]]:
    return [("run", run_label(config)), ("defences", defences_label(config.defences))]


def _dropdown(description: str, options: Sequence[Any] = (), *, width: str = "min(640px, 100%)") -> widgets.Dropdown:
    layout = widgets.Layout(width=width)
    return widgets.Dropdown(description=description, options=options, layout=layout, style=DESCRIBED)


def _checkbox(description: str, *, value: bool = True) -> widgets.Checkbox:
    return widgets.Checkbox(description=description, value=value, indent=False, layout=widgets.Layout(width="170px"))


def _row(children: Sequence[widgets.Widget]) -> widgets.HBox:
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center"))


def _htmls(count: int) -> list[widgets.HTML]:
    return [widgets.HTML() for _ in range(count)]
