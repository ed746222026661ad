"""The other side: a server that attacks what it was sent, with public knowledge only."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitlab.core.checkpoint import save_json
from splitlab.core.errors import InputError
from splitlab.core.parallel import parallel
from splitlab.core.progress import Callback
from splitlab.core.seeds import Key
from splitlab.core.seeds import generator as splitlab_generator
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.split.artefacts import SavedReconstruction, save_reconstruction
from splitlab.split.attacks import ATTACKS
from splitlab.split.config import Adversary, AttackSpec, Defences
from splitlab.split.defences import disguised
from splitlab.split.messages import Knowledge, Observation, Reconstruction
from splitlab.split.wire import Transcript, read_transcript

FACTS = ("defences",)
"""What an attacker can be denied besides the fields of a message: then it takes the client for undefended."""


def run_attack(
    attack: str,
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    options: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> Reconstruction:
    """Run one attack by name on what it is allowed to see, and time it.

    Raises:
        InputError: no such attack, an option it does not take, or observations that lack what it needs.
    """
    if attack not in ATTACKS:
        raise InputError(f"no attack is called {attack!r}; there are {', '.join(ATTACKS)}")
    if ATTACKS[attack].takes_surrogates:
        knowledge = replace(
            knowledge, public=disguised(knowledge.public, knowledge.defences, key=Key.published("attacker"))
        )
    denied = [name for name in knowledge.ignored if name not in FACTS]
    seen = [observation.without(*denied) for observation in observations]
    began, worked = time.perf_counter(), time.process_time()
    result = ATTACKS[attack].run(seen, knowledge, options or {}, generator=generator, callback=callback)
    return replace(result, wall_s=time.perf_counter() - began, cpu_s=time.process_time() - worked)


def attack_transcript(
    transcript: Transcript | str | Path,
    *,
    attack: str,
    base: Base,
    public: ImageSet,
    ignore: tuple[str, ...] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    server: Mapping[str, Tensor] | None = None,
    callback: Callback | None = None,
) -> Reconstruction:
    """Attack a transcript, also one that somebody else recorded.

    Args:
        transcript: the transcript, or its file.
        attack: name of the attack.
        base: the public base model the run used.
        public: auxiliary public data of the same image size.
        ignore: observation fields or `FACTS` to deny the attacker.
        seed: of the attack's draws.
        options: keyword arguments of the attack.
        cache: where encodings of the public data are kept.
        server: what a malicious server trained during the run.
        callback: told of progress.

    Raises:
        InputError: the transcript, the data and the base model do not belong together.
    """
    if not isinstance(transcript, Transcript):
        transcript = read_transcript(transcript, base=base)
    knowledge = make_knowledge(transcript, base, public, ignore=ignore, cache=cache, server=server)
    draw = splitlab_generator("attack", attack, *ignore, seed)
    return run_attack(attack, transcript.observations, knowledge, generator=draw, options=options, callback=callback)


def make_knowledge(
    transcript: Transcript,
    base: Base,
    public: ImageSet,
    *,
    ignore: tuple[str, ...] = (),
    cache: Path | None = None,
    server: Mapping[str, Tensor] | None = None,
) -> Knowledge:
    """Gather what the adversary knows about a recorded run: its public header, models and data.

    Raises:
        InputError: they do not belong together.
    """
    header = transcript.header
    if public.size != header.size:
        raise InputError(
            f"run {header.run}: its images have {header.size} pixels, the public data {public.size}: give others"
        )
    if base.digest != header.base:
        raise InputError(f"run {header.run}: recorded with base model {header.base[:12]}, not {base.digest[:12]}")
    defences = Defences() if "defences" in ignore else header.defences
    return Knowledge(base, header.scheme, defences, header.size, public, tuple(ignore), cache, dict(server or {}))


def attack_and_save(
    transcript: Transcript,
    spec: AttackSpec,
    seed: int,
    base: Base,
    public: ImageSet,
    *,
    out: Path,
    cache: Path,
    server: Mapping[str, Tensor] | None = None,
) -> SavedReconstruction | None:
    """Run one attack of a grid; write `<out>/<attack>-<seed>.safetensors`, and its CPU seconds beside it.

    An ablated attack that cannot run without what it is denied leaves `<attack>.refused.json` with the reason
    instead, and None is returned.
    """
    knowledge = make_knowledge(transcript, base, public, ignore=spec.ignore, cache=cache, server=server)
    name = f"{spec.adversary.name}-{seed}"
    try:
        result = attack_transcript(
            transcript,
            attack=spec.attack,
            base=base,
            public=public,
            ignore=spec.ignore,
            seed=seed,
            options=spec.options,
            cache=cache,
            server=server,
        )
    except InputError as error:
        if not spec.ignore:
            raise
        refusal = {"attack": spec.attack, "denied": list(spec.ignore), "reason": str(error)}
        save_json(out / f"{spec.adversary.name}.refused.json", refusal)
        return None
    rows = tuple(knowledge.describe(transcript.observations, result.used))
    saved = SavedReconstruction(result, spec.adversary, seed, rows)
    save_reconstruction(out / f"{name}.safetensors", saved)
    save_json(out / f"{name}.timing.json", {"cpu_s": round(result.cpu_s, 3)})
    return saved


def attack_all(
    transcript: Transcript,
    specs: Sequence[AttackSpec],
    base: Base,
    public: ImageSet,
    *,
    out: Path,
    cache: Path,
    server: Mapping[str, Tensor] | None = None,
    workers: int = 1,
) -> dict[tuple[Adversary, int], SavedReconstruction]:
    """Run every attack of a grid with each of its seeds on one transcript: `attack_and_save`, `workers` at a time.

    Returns (adversary, seed) -> what was found, without the attacks that could not run.
    """
    tries = [(spec, seed) for spec in specs for seed in range(spec.seeds)]
    work = partial(attack_and_save, out=out, cache=cache, server=server)
    calls = [(transcript, spec, seed, base, public) for spec, seed in tries]
    found = list(parallel(work, calls, desc="attacks", workers=workers))
    return {(spec.adversary, seed): one for (spec, seed), one in zip(tries, found, strict=True) if one is not None}
