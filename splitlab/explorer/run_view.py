"""One attacked run as the explorer shows it: its attempts, their scores, and which of them is the strongest.

A sample that was not scored has NaN for a score. It counts neither as identified nor as missed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitlab.core.labels import FIELD_WORDS
from splitlab.split.attacks import NO_INFORMATION, REFERENCE, attack_label
from splitlab.split.config import Adversary
from splitlab.split.messages import Observation
from splitlab.split.wire import Transcript
from splitlab.study.scoring import RunTruth

IDENTIFIED = ("identified", "hint_identified", "both_identified")
"""The scores that say whether a sample is recognised: by image, by hint, by both together."""


@dataclass(frozen=True)
class Attempt:
    """One attacker's reconstruction of a run, ready to show.

    Attributes:
        adversary: who made it.
        seed: the attacker's seed.
        used: the sent fields it read.
        threat_model: (what, value) rows.
        images, hints: `[n, 3, h, w]` uint8; None where the attack does not try.
        scores: name -> `[n]`, as `evaluate.score_samples` returns them, NaN for samples that were not scored; empty
            before the evaluation.
        prompts: n texts; None where the attack does not try.
        live: whether it was made here and now, and not by the pipeline.
    """

    adversary: Adversary
    seed: int
    used: tuple[str, ...]
    threat_model: tuple[tuple[str, str], ...]
    images: Tensor | None
    hints: Tensor | None
    scores: Mapping[str, Tensor]
    prompts: tuple[str, ...] | None = None
    live: bool = False

    @property
    def attack(self) -> str:
        """What it is listed by among the attempts on its run."""
        return ("live: " if self.live else "") + self.adversary.name

    @property
    def label(self) -> str:
        """Which attack it is, in words."""
        return ("live: " if self.live else "") + attack_label(self.adversary)

    @property
    def guesses(self) -> bool:
        """Whether it looks at nothing that was sent."""
        return self.adversary.attack in NO_INFORMATION

    @property
    def scored(self) -> Tensor | None:
        """Say which samples have a score of identification, `[n]`; None if none has."""
        known = [self.scores[way].isfinite() for way in IDENTIFIED if way in self.scores]
        scored = torch.stack(known).any(0) if known else torch.tensor(False)
        return scored if scored.any() else None


@dataclass(frozen=True)
class Strength:
    """How often an attack identifies, over the samples that all scored attacks of the run have scores of.

    Attributes:
        share: the largest share identified, by image, by hint or by both; NaN where it was not scored.
        by_image: the share identified by the image; NaN where that was not scored.
        psnr_db: mean PSNR of its images; NaN likewise.
        n: samples.
    """

    share: float
    by_image: float
    psnr_db: float
    n: int

    @property
    def order(self) -> tuple[float, float, float]:
        """What the strongest attack has the largest of; what was not scored comes last."""
        values = self.share, self.by_image, self.psnr_db
        first, second, third = (-math.inf if math.isnan(value) else value for value in values)
        return first, second, third


@dataclass(frozen=True)
class RunView:
    """An attacked run.

    Attributes:
        name: of the run.
        transcript: what the server received.
        seen: the same, all samples stacked.
        known: configuration, truth and private data; its `ceiling` is NaN before the evaluation.
        attempts: attack -> attempts by seed; live attacks are added here.
        scored: whether there are scores of this transcript.
    """

    name: str
    transcript: Transcript
    seen: Observation
    known: RunTruth
    attempts: dict[str, dict[int, Attempt]]
    scored: bool

    @property
    def timesteps(self) -> Tensor:
        """`[n]` timestep of every recorded sample."""
        return self.known.truth.timesteps

    def within(self, low: int, high: int) -> list[int]:
        """Return the samples with low <= t <= high, by rising timestep."""
        order = self.timesteps.argsort(stable=True)
        chosen = self.timesteps[order]
        return order[(chosen >= low) & (chosen <= high)].tolist()

    def prompt(self, sample: int) -> str:
        """Return a sample's prompt."""
        return self.known.private.prompts[int(self.known.truth.indices[sample])]

    def add(self, attempt: Attempt) -> None:
        """Take in a live attempt, in memory."""
        self.attempts.setdefault(attempt.attack, {})[attempt.seed] = attempt

    def first(self, attack: str) -> Attempt:
        """Return an attack's first attempt."""
        return next(iter(self.attempts[attack].values()))

    @property
    def strongest(self) -> str:
        """The attack that identifies the largest share; guesses without information only where nothing else is.

        Of equals the one that identifies more by the image, then the one of higher PSNR, then the one listed first.
        """
        attacks = [name for name in self.attempts if not self.first(name).guesses] or list(self.attempts)
        strengths = self.strengths
        return max(attacks, key=lambda name: strengths[name].order)

    @property
    def scored_samples(self) -> Tensor:
        """Say which samples some attack has scores of, `[n]`."""
        masks = [one.scored for tries in self.attempts.values() for one in tries.values() if one.scored is not None]
        return torch.stack(masks).any(0) if masks else torch.zeros(len(self.timesteps), dtype=torch.bool)

    @property
    def strengths(self) -> dict[str, Strength]:
        """Attack -> how often it identifies, mean over its scored seeds."""
        every = {name: list(tries.values()) for name, tries in self.attempts.items()}
        known = [one.scored for tries in every.values() for one in tries if one.scored is not None]
        compared = torch.stack(known).all(0) if known else torch.zeros(len(self.timesteps), dtype=torch.bool)
        return {name: _strength(tries, compared) for name, tries in every.items()}

    def compared(self) -> str:
        """Say which attack is the strongest, by what, and which were not scored."""
        strengths, name = self.strengths, self.strongest
        absent = [self.first(other).label for other, own in strengths.items() if math.isnan(own.share)]
        found = strengths[name]
        if math.isnan(found.share):
            return "not known: no attack was scored"
        most = f"{found.share:.0%} of {found.n} scored samples, by image, hint or both"
        guess = "; no attack but guesses was run" if self.first(name).guesses else ""
        return f"{self.first(name).label} identifies {most}{guess}" + (
            f"; not scored: {', '.join(absent)}" if absent else ""
        )


def _strength(tries: Sequence[Attempt], compared: Tensor) -> Strength:
    scored = [one.scores for one in tries if one.scored is not None]

    def mean(name: str) -> float:
        values = [scores[name][compared] for scores in scored if name in scores]
        return float(torch.stack(values).mean()) if values and compared.any() else math.nan

    shares = [share for share in map(mean, IDENTIFIED) if not math.isnan(share)]
    return Strength(max(shares, default=math.nan), mean(IDENTIFIED[0]), mean("psnr_db"), int(compared.sum()))


def sample_scores(view: RunView, one: Attempt, sample: int) -> dict[str, float]:
    """Return one sample's scores, with `ceiling_psnr_db` and `no_info_psnr_db`; NaN where there are none."""
    scores = {name: float(value[sample]) for name, value in one.scores.items()}
    guesses = [guess.scores["psnr_db"][sample] for guess in view.attempts.get(REFERENCE, {}).values() if guess.scores]
    guess = float(torch.stack(guesses).mean()) if guesses else math.nan
    return scores | {"ceiling_psnr_db": float(view.known.ceiling[sample]), "no_info_psnr_db": guess}


def comparison(view: RunView, sample: int) -> list[dict[str, Any]]:
    """Return one row per attack with scores of images: label, knowledge and this sample's scores by seed.

    A score is NaN where this sample was not scored.
    """
    rows = []
    for attack, tries in view.attempts.items():
        scored = [one.scores for one in tries.values() if "psnr_db" in one.scores]
        if scored:
            columns = {key: [float(one[key][sample]) for one in scored] for key in ("psnr_db", "ssim", "identified")}
            first = view.first(attack)
            rows.append({"attack": attack, "label": first.label, "uses": knowledge_label(first.used), **columns})
    return rows


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Sort names by their place in `order`; unknown ones last."""
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def knowledge_label(used: Sequence[str]) -> str:
    """Say in words which fields an attack used; the timestep, which all use, goes unsaid."""
    fields = [name for name in in_order(used or ["nothing"], list(FIELD_WORDS)) if name != "timesteps"]
    return " + ".join(FIELD_WORDS.get(name, name) for name in fields) or "timestep"
