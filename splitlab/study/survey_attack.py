"""Recorded transcripts, attacked in parallel: nothing here reads private data. What is done is kept, so it resumes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from splitlab.core.parallel import parallel
from splitlab.data.image_set import ImageSet, digest
from splitlab.diffusion.base import Base
from splitlab.split.config import AttackSpec, Defences
from splitlab.split.server import attack_and_save
from splitlab.split.wire import Transcript, read_server, read_transcript
from splitlab.study.kept import code_digest, file_digest, hand_out
from splitlab.study.survey import LoadSplit, SurveyConfig

Job = tuple[Transcript, Mapping[str, Tensor], str, AttackSpec, int, Base, ImageSet, Path, Path]
"""What `_attack` takes: one attack on one transcript."""


def attack_runs(
    attacks: Mapping[str, Sequence[AttackSpec]],
    base: Base,
    load: LoadSplit,
    *,
    runs: Path,
    out: Path,
    cache: Path,
    workers: int = 1,
) -> None:
    """Attack the transcripts of the runs that `attacks` names, each by its own list; leaves `out`/<run>."""
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for run, specs in attacks.items():
        files = [runs / run / "transcript.safetensors", runs / run / "server.safetensors"]
        transcript, server = read_transcript(files[0], base=base), read_server(files[1])
        jobs += _jobs(transcript, server, files, specs, base, load, out / run, cache)
    _run(jobs, workers)


def attack_survey(
    config: SurveyConfig, base: Base, load: LoadSplit, *, seen: Path, out: Path, cache: Path, workers: int = 1
) -> None:
    """Run the catalogue on every transcript below `seen`; of the data, only public splits are read."""
    out.mkdir(parents=True, exist_ok=True)  # of an empty grid too
    jobs: list[Job] = []
    for run, planned in sorted(config.transcripts().items()):
        files = [seen / run / "transcript.safetensors"]
        transcript = read_transcript(files[0])
        specs = catalogue(config, planned.kind, transcript.header.defences)
        jobs += _jobs(transcript, {}, files, specs, base, load, out / run, cache)
    _run(jobs, workers)


def _jobs(
    transcript: Transcript,
    server: Mapping[str, Tensor],
    files: Sequence[Path],
    specs: Iterable[AttackSpec],
    base: Base,
    load: LoadSplit,
    out: Path,
    cache: Path,
) -> list[Job]:
    """List every attack with each of its seeds; `files` are what the server has."""
    evidence, public = " ".join(map(file_digest, files)), load(transcript.header.dataset, "public")
    return [
        (transcript, server, evidence, spec, seed, base, public, out, cache)
        for spec in specs
        for seed in range(spec.seeds)
    ]


def _run(jobs: Sequence[Job], workers: int) -> None:
    for _ in parallel(_attack, jobs, desc="attacks", workers=workers):
        pass


def _attack(
    transcript: Transcript,
    server: Mapping[str, Tensor],
    evidence: str,
    spec: AttackSpec,
    seed: int,
    base: Base,
    public: ImageSet,
    out: Path,
    cache: Path,
) -> None:
    """Run one attack, unless the same was run before, and hand out what it left."""
    follows_from = {"evidence": evidence, "spec": spec, "seed": seed, "base": base.digest, "public": public.digest}
    key = digest(follows_from | {"code": code_digest("split")})[:16]
    kept = cache / "attacks" / f"{transcript.header.run}-{spec.adversary.name}-{seed}-{key}"
    if not any(kept.glob("*.json")):  # its seconds or its refusal: the last that an attack writes
        attack_and_save(transcript, spec, seed, base, public, out=kept, cache=cache, server=server)
    hand_out(kept, out)


def catalogue(config: SurveyConfig, kind: str, defences: Defences) -> list[AttackSpec]:
    """Return the attacks on one of the survey's transcripts; `kind`: see `splitlab.study.survey.Planned`."""
    if kind == "epochs":
        return list(config.epoch_attacks)
    return [spec for spec in config.attacks if not spec.when or getattr(defences, spec.when)]
