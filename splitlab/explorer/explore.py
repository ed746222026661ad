"""What the explorer shows, as plain data, PNG bytes and HTML: all of it that needs neither widgets nor a browser.

Truth and reconstruction stand side by side here for the eye; numbers are those of `evaluate`. Nothing is written.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.labels import SCHEME_WORDS
from splitlab.core.paths import CACHE, resolve
from splitlab.core.pixels import from_uint8, to_uint8
from splitlab.core.progress import Callback
from splitlab.data.colours import are_shapes
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base, load_base
from splitlab.explorer.run_view import Attempt, RunView, in_order, knowledge_label
from splitlab.params import load_split
from splitlab.split.artefacts import Recorded, SavedReconstruction, load_reconstruction, read_record, read_scores
from splitlab.split.attacks import ATTACKS
from splitlab.split.config import Adversary, TrainConfig
from splitlab.split.messages import Observation, stack
from splitlab.split.server import attack_transcript, make_knowledge
from splitlab.split.wire import read_server, read_transcript, read_truth
from splitlab.study.config import EvaluateConfig
from splitlab.study.scoring import RunTruth, score_samples


class Artefacts:
    """The pipeline's artefacts, read when asked for and kept until their files change.

    Args:
        params: the content of params.yaml.
        runs: folder of runs.
        reconstructions: folder of reconstructions, one folder per attacked run.
        scores: folder of per-sample scores.
        survey: folder of the survey's transcripts and reconstructions.
        cache: folder of encoded public data, for live attacks.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        *,
        runs: str | Path = "runs",
        reconstructions: str | Path = "reconstructions",
        scores: str | Path = "scores",
        survey: str | Path = "survey",
        cache: Path = CACHE,
    ):
        self.params, self.cache, self.survey = params, cache, resolve(survey)
        self.runs, self.reconstructions, self.scores = resolve(runs), resolve(reconstructions), resolve(scores)
        self._views: dict[str, tuple[object, RunView]] = {}
        self._splits: dict[tuple[str, str], ImageSet] = {}

    @cached_property
    def base(self) -> Base:
        """The public models."""
        return load_base(self.params["base"]["source"])

    @property
    def config(self) -> EvaluateConfig:
        """How reconstructions are scored."""
        return parse(EvaluateConfig, self.params["evaluate"], where="evaluate")

    def split(self, dataset: str, split: str) -> ImageSet:
        """Return a split of a data set."""
        if (dataset, split) not in self._splits:
            self._splits[dataset, split] = load_split(dataset, split, self.params)
        return self._splits[dataset, split]

    def attacked(self) -> list[str]:
        """Return the runs that have reconstructions, in the order of params.yaml's attacks, then the survey's.

        Raises:
            InputError: there is none.
        """
        found = {path.parent.name for path in self.reconstructions.glob("*/*.safetensors")}
        surveyed = {path.parent.name for path in (self.survey / "reconstructions").glob("*/*.safetensors")}
        if not found | surveyed:
            raise InputError(f"no run has been attacked yet: {self.reconstructions} holds no reconstructions")
        return [*in_order(found, list(self.params["attacks"])), *sorted(surveyed)]

    def recorded(self, run: str) -> Recorded:
        """Return where an attacked run's files are."""
        if (self.survey / "truth" / run).exists():
            return Recorded.of_survey(run, self.survey)
        return Recorded.of_run(run, self.runs, self.reconstructions)

    def trained(self) -> list[str]:
        """Return the runs that have generated samples, in the order of params.yaml.

        Raises:
            InputError: there is none.
        """
        found = {path.parent.name for path in self.runs.glob("*/samples.safetensors")}
        if not found:
            raise InputError(f"no run has finished yet: {self.runs} holds no generated samples")
        return in_order(found, list(self.params["runs"]))

    def view(self, run: str) -> RunView:
        """Return an attacked run.

        Raises:
            InputError: an artefact is missing, damaged or of another transcript.
        """
        recorded = self.recorded(run)
        saved = sorted(recorded.reconstructions.glob("*.safetensors"))
        files = [recorded.transcript, recorded.truth, recorded.record, self.scores / f"{run}.safetensors", *saved]
        stamp = [(path, path.stat().st_mtime_ns if path.exists() else None) for path in files]
        if run not in self._views or self._views[run][0] != stamp:
            self._views[run] = stamp, self._read(recorded, saved)
        return self._views[run][1]

    def _read(self, recorded: Recorded, saved: Sequence[Path]) -> RunView:
        run, folder = recorded.name, recorded.truth.parent
        _, config = read_record(recorded.record)
        transcript = read_transcript(recorded.transcript, base=self.base)
        truth, private = read_truth(recorded.truth), self.split(config.dataset, "private")
        seen = stack(transcript.observations)
        n = len(truth.indices)
        if n != seen.batch_size or int(truth.indices.max()) >= len(private):
            raise InputError(f"{folder}: transcript, truth and private data do not belong together")
        scores = self._scores(run, n)
        attempts: dict[Adversary, dict[int, Attempt]] = {}
        for one in map(load_reconstruction, saved):
            if any(value is not None and len(value) != n for value in (one.result.images, one.result.hints)):
                raise InputError(
                    f"{recorded.reconstructions}: {one.adversary.name} is of another transcript than {folder}"
                )
            prefix = f"{one.adversary.name}/{one.seed}/"
            own = {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}
            attempts.setdefault(one.adversary, {})[one.seed] = attempt(one, own)
        ranks = {name: rank for rank, name in enumerate(ATTACKS)}
        order = sorted(attempts, key=lambda who: (ranks.get(who.attack, len(ranks)), not who.denied, who.name))
        ordered = {who.name: attempts[who] for who in order}
        known = RunTruth(config, truth, private, scores.get("ceiling_psnr_db", torch.full((n,), torch.nan)))
        return RunView(run, transcript, seen, known, ordered, bool(scores))

    def _scores(self, run: str, n: int) -> dict[str, Tensor]:
        """Return the run's per-sample scores; none if they are missing or of another transcript."""
        path = self.scores / f"{run}.safetensors"
        tensors = read_scores(path) if path.exists() else {}
        return tensors if all(len(value) == n for value in tensors.values()) else {}

    def attack_live(
        self,
        view: RunView,
        attack: str,
        *,
        ignore: tuple[str, ...] = (),
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> Attempt:
        """Attack a run's transcript as the pipeline does, then score the result; nothing is written but caches.

        Raises:
            InputError: the attack needs a field that was not sent or is denied, or an option is bad.
        """
        public = self.split(view.transcript.header.dataset, "public")
        own = self.runs / view.name / "server.safetensors"
        server = read_server(own) if own.exists() else {}
        result = attack_transcript(
            view.transcript,
            attack=attack,
            base=self.base,
            public=public,
            ignore=ignore,
            seed=seed,
            options=options,
            cache=self.cache,
            server=server,
            callback=callback,
        )
        images, hints = (None if part is None else _as_saved(part) for part in (result.images, result.hints))
        quantised = replace(result, images=images, hints=hints)
        knowledge = make_knowledge(view.transcript, self.base, public, ignore=ignore, server=server)
        rows = tuple(knowledge.describe(view.transcript.observations, result.used))
        saved = SavedReconstruction(quantised, Adversary(attack, ignore), seed, rows)
        localise = are_shapes(view.known.private.prompts)
        return attempt(saved, score_samples(saved, view.known, self.config, localise=localise), live=True)


def _as_saved(images: Tensor) -> Tensor:
    """Quantise as saving and loading does, memory layout included: it decides how sums are rounded."""
    return from_uint8(to_uint8(images).contiguous())


def attempt(saved: SavedReconstruction, scores: Mapping[str, Tensor], *, live: bool = False) -> Attempt:
    """Pack a reconstruction with its scores; of mixed samples, each with the reconstruction it was judged by."""
    result = saved.result
    images, hints = (None if part is None else to_uint8(part) for part in (result.images, result.hints))
    if "place" in scores:
        place = scores["place"].where(scores["place"].isfinite(), torch.arange(len(scores["place"])).float()).long()
        images, hints = (None if part is None else part[place] for part in (images, hints))
    made = saved.adversary, saved.seed, result.used, saved.threat_model
    return Attempt(*made, images, hints, scores, result.prompts, live)


def attack_title(one: Attempt) -> str:
    """Label an attempt for a menu: the attack and what it uses."""
    return f"{one.label} — uses {knowledge_label(one.used)}"


def run_label(config: TrainConfig) -> str:
    """Say in words what a run was."""
    clients = "1 client" if config.n_clients == 1 else f"{config.n_clients} clients"
    return f"{config.dataset} · {SCHEME_WORDS.get(config.scheme, config.scheme)} · {clients}"


def png(pixels: UInt8[Tensor, "3 h w"], *, side: int = 160) -> bytes:
    """Encode a picture as PNG, every pixel blown up to a square so that it is at least `side` pixels high."""
    factor = max(1, math.ceil(side / pixels.shape[-2]))
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    large = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    large.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def false_colour(maps: Float[Tensor, "k h w"], *, most: int = 16) -> UInt8[Tensor, "3 height width"]:
    """Lay out the first channels as a mosaic, blue negative, white zero, red positive."""
    maps = maps[:most]
    columns = math.ceil(math.sqrt(len(maps)))
    blank = columns * math.ceil(len(maps) / columns) - len(maps)
    scale = maps.abs().quantile(0.99).clamp_min(1e-6)
    tiles = torch.cat([maps / scale, torch.zeros(blank, *maps.shape[1:])])
    rows = [torch.cat(list(row), 1) for row in tiles.split(columns)]
    colours = matplotlib.colormaps["RdBu_r"](torch.cat(rows).clamp(-1, 1).add(1).div(2).numpy(), bytes=True)
    return torch.from_numpy(np.ascontiguousarray(colours[..., :3])).permute(2, 0, 1)


@dataclass(frozen=True)
class Picture:
    """A captioned picture; `png` is None where there is nothing to show, and `note` says why."""

    caption: str
    png: bytes | None
    note: str = ""


Groups = list[tuple[str, str, list[Picture]]]
"""(title, subtitle, pictures): what stands together."""

PRIVATE = "Private"
WIRE = "On the wire"
RECONSTRUCTED = "Reconstructed"


def wire_pictures(message: Observation, base: Base) -> list[Picture]:
    """Show the first sample of a message: what the server receives of it."""
    seen = message.float()
    not_sent = "not sent"

    def maps(value: Tensor | None) -> bytes | None:
        return None if value is None else png(false_colour(value[0]))

    noisy = None if seen.noisy_latents is None else png(to_uint8(base.decode(seen.noisy_latents[:1]))[0])
    return [
        Picture("noisy latents", noisy, not_sent),
        Picture("cut-layer activation", maps(seen.smashed), not_sent),
        Picture("noise label", maps(seen.noise), not_sent),
    ] + (
        [] if seen.noise_pred_gradient is None else [Picture("loss gradient", maps(seen.noise_pred_gradient), not_sent)]
    )


def sample_groups(view: RunView, one: Attempt, sample: int, base: Base) -> Groups:
    """Show one sample: what is private, what the server receives, what the attack makes of it."""
    index = int(view.known.truth.indices[sample])
    image, hint = (to_uint8(group[index]) for group in (view.known.private.images, view.known.private.need_hints()))
    picture, found = (None if part is None else png(part[sample]) for part in (one.images, one.hints))
    missing = "this attack does not try"
    message = view.seen.map(lambda value: value[sample : sample + 1])
    return [
        (PRIVATE, "only the client has these", [Picture("image", png(image)), Picture("hint", png(hint))]),
        (WIRE, "what the server receives", wire_pictures(message, base)),
        (
            RECONSTRUCTED,
            f"by {one.label}" + (f": “{one.prompts[sample]}”" if one.prompts else ""),
            [Picture("image", picture, missing), Picture("hint", found, missing)],
        ),
    ]
