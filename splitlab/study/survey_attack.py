"""The survey's transcripts, attacked alike: nothing here reads private data."""

from pathlib import Path

from splitlab.core.parallel import parallel
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.split.config import AttackSpec, Defences
from splitlab.split.server import attack_and_save
from splitlab.split.wire import Transcript, read_transcript
from splitlab.study.survey import LoadSplit, SurveyConfig


def attack_survey(
    config: SurveyConfig, base: Base, load: LoadSplit, *, seen: Path, out: Path, cache: Path, workers: int = 1
) -> None:
    """Run the catalogue on every transcript below `seen`; of the data, only public splits are read."""
    out.mkdir(parents=True, exist_ok=True)  # of an empty grid too
    calls = [
        (transcript, spec, seed, base, load(transcript.header.dataset, "public"), out / run, cache)
        for run, planned in sorted(config.transcripts().items())
        for transcript in [read_transcript(seen / run / "transcript.safetensors")]
        for spec in catalogue(config, planned.kind, transcript.header.defences)
        for seed in range(spec.seeds)
    ]
    for _ in parallel(_attack, calls, desc="attack", workers=workers):
        pass


def _attack(
    transcript: Transcript, spec: AttackSpec, seed: int, base: Base, public: ImageSet, out: Path, cache: Path
) -> None:
    attack_and_save(transcript, spec, seed, base, public, out=out, cache=cache)


def catalogue(config: SurveyConfig, kind: str, defences: Defences) -> list[AttackSpec]:
    """Return the attacks on one of the survey's transcripts; `kind`: see `splitlab.study.survey.Planned`."""
    if kind == "epochs":
        return list(config.epoch_attacks)
    return [spec for spec in config.attacks if not spec.when or getattr(defences, spec.when)]
