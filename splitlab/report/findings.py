"""The report's summary: a few sentences, each made from the result tables, so that it changes when they do."""

import math

from splitlab.core.labels import UNMEASURED, counted, percent
from splitlab.report.claims import FULL, HOLDS, LITTLE, PARTLY, REFUTED, Evidence, claims, defended
from splitlab.split.attacks import ATTACKS, attack_label
from splitlab.study.leaks import Leak, leaks, strongest


def findings(evidence: Evidence) -> list[str]:
    """Say in Markdown sentences what was found."""
    found = leaks(evidence.attacks)
    own = [leak for leak in found if leak.run in defended(evidence.training)]
    sentences = [*_main(own), *_floor(evidence, found), *_without_noise(evidence, own)]
    best = strongest(found)
    rows = evidence.training
    rows = rows[(rows["scheme"] == "split_gradients") & (rows["server"] == "honest")]
    sentences += [
        f"**Conventional split learning** sends the same fields ({run}): {best[run]}"
        for run in rows["run"]
        if run in best
    ]
    return [*sentences, *_use(evidence), _tally(evidence)]


def _main(own: list[Leak]) -> list[str]:
    """Say what the strongest attack gets out of the defended runs of S1's split."""
    best = list(strongest(own).values())
    if not best:
        return ["No run of S1's split with defences was attacked."]
    names = " and ".join(dict.fromkeys(attack_label(leak.adversary) for leak in best))
    picks = _picks(own, best)
    if min(leak.least for leak in best) < FULL:
        least, most = percent(min(leak.least for leak in best)), percent(max(leak.most for leak in best))
        holds = " in part" if max(leak.most for leak in best) > LITTLE else ""
        return [
            f"**S1's defences withstand the attacks tried{holds}.** The strongest (*{names}*) gets between {least} and "
            f"{most} of the way from the no-information guess to the VAE ceiling, depending on run and timestep; "
            f"{picks}."
        ]
    gap = max(0.05, *(leak.worst_gap_db for leak in best))
    first = (
        f"**S1's defences do not keep the images from the server.** In every timestep bucket of "
        f"{counted(len(best), 'defended run')} ({', '.join(leak.run for leak in best)}), the attack *{names}* comes "
        f"within {gap:.1f} dB of the VAE ceiling, the best that decoding recovered latents can reach, and "
        f"{picks}."
    )
    who = {leak.adversary for leak in best}
    morals = {ATTACKS[one.attack].moral for one in who if one.attack in ATTACKS and not one.denied}
    return [first, *(morals - {""} if len(who) == len(morals) == 1 else ())]


def _picks(own: list[Leak], best: list[Leak]) -> str:
    """Say how many private images are identified, in the run where it is fewest, by the attack that identifies most."""
    most = {leak.run: max(one.id_top1 for one in own if one.run == leak.run) for leak in best}
    if any(math.isnan(leak.id_top1) for leak in own):
        return f"how many private images it picks out of a gallery was {UNMEASURED} in every run"
    who = "it" if all(leak.id_top1 == most[leak.run] for leak in best) else "the attack that identifies most"
    least = percent(min(most.values()))
    picks = least if least == percent(1.0) else f"at least {least}"
    chance = percent(max(leak.id_chance for leak in best))
    return f"{who} picks {picks} of the private images out of a gallery (chance {chance})"


def _floor(evidence: Evidence, found: list[Leak]) -> list[str]:
    """Say whether the timestep floor makes a difference, on the data whose runs have an IoU."""
    floors: dict[float, list[float]] = {}
    for run, leak in strongest(found).items():
        if run in evidence.control:
            floors.setdefault(evidence.of_run(run).timestep_floor, []).append(leak.least)
    if len(floors) < 2:
        return []
    reached = {floor: min(least) for floor, least in sorted(floors.items())}
    parts = ", ".join(f"{percent(least)} of the way at floor {floor:.0f}" for floor, least in reached.items())
    little = max(reached.values()) - min(reached.values()) <= 1.0 - FULL
    says = "makes no difference to the strongest attack" if little else "changes what the strongest attack gets"
    return [f"**The timestep floor {says}.** In its worst bucket it gets {parts}."]


def _without_noise(evidence: Evidence, own: list[Leak]) -> list[str]:
    """Say how the best attacker fares who does not use the noise, on the first defended run."""
    blind = list(strongest([leak for leak in own if not leak.uses_noise]).values())[:1]
    return [
        f"**An attacker who ignores the sent noise** depends on the timestep: the best of them on {leak.run}, "
        f"{attack_label(leak.adversary)}, reaches {first['psnr_db']:.1f} dB at the least noisy timesteps and "
        f"{last['psnr_db']:.1f} dB at the noisiest, where guessing reaches {leak.no_info_db:.1f} dB."
        for leak in blind
        for first, last in [evidence.ends(leak)]
    ]


def _use(evidence: Evidence) -> list[str]:
    """Say how well the trained models follow their hints."""
    rows, every = evidence.trained(), evidence.training
    if rows.empty:
        return []
    free = every[every["scheme"] == "no control"]["control_iou"].dropna()
    reference = f" (no control: {free.iloc[0]:.2f})" if len(free) else ""
    own = rows[rows["run"].isin(defended(rows))]["control_iou"]
    span = f"; S1 with defences lies at {own.min():.2f} to {own.max():.2f}" if len(own) else ""
    low, high = rows["control_iou"].min(), rows["control_iou"].max()
    return [
        f"**How well the models follow their hints.** Generated discs overlap the asked-for ones with an IoU of "
        f"{low:.2f} to {high:.2f} over all schemes{reference}{span}."
    ]


def _tally(evidence: Evidence) -> str:
    judged = claims(evidence)
    counts = {kind: sum(claim.verdict == kind for claim in judged) for kind in (HOLDS, PARTLY, REFUTED, UNMEASURED)}
    plural = {HOLDS: "hold", PARTLY: "hold in part"}
    parts = (f"{n} {plural.get(kind, kind) if n > 1 else kind}" for kind, n in counts.items() if n)
    return (
        f"**Of {counted(len(judged), 'claim')} of S1's**, by the rules stated in the table below: {', '.join(parts)}."
    )
