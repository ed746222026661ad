"""What Yao (2024, S1) claims, what the result tables say, and a verdict by rules that are written beside it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from splitlab.core.labels import UNMEASURED, counted, percent
from splitlab.split.attacks import ATTACKS, NO_INFORMATION, REFERENCE, attack_label
from splitlab.split.client import reference_message, sample_bytes
from splitlab.split.config import Defences
from splitlab.study.leaks import Leak, bucket, leaks, strongest
from splitlab.study.results import by_adversary, by_run

HOLDS, PARTLY, REFUTED = "holds", "holds in part", "refuted"

SD15_LATENTS, SD15_TEXT, SD15_WIDTH = (4, 64, 64), (77, 768), 320
"""Shapes of Stable Diffusion 1.5: latents of 512x512 pixels, text embedding, width of the U-Net's first block."""

FULL, LITTLE = 0.95, 0.25
"""An attack that goes at least FULL of the way to the ceiling recovers everything; at most LITTLE, next to nothing."""

CLOSE, FAR = 0.05, 0.15
"""Differences of control IoU: at most CLOSE is quality kept, FAR or more is quality lost."""


@dataclass(frozen=True)
class Claim:
    """One line of the table of claims: what S1 says, what was measured (one entry per finding), and the verdict."""

    says: str
    measured: tuple[str, ...]
    verdict: str
    rule: str


def judged(says: str, measured: Sequence[str], rule: str, held: Sequence[bool], partly: Sequence[bool] = ()) -> Claim:
    """Judge a claim by its cases: it holds in all, some or none; `partly`: what counts as holding in part, too."""
    verdict = UNMEASURED if not held else HOLDS if all(held) else PARTLY if any([*held, *partly]) else REFUTED
    return Claim(says, tuple(measured), verdict, rule)


def defended(training: pd.DataFrame) -> list[str]:
    """Return the runs of S1's split that have a defence on."""
    chosen = training[(training["scheme"] == "split") & (training["defences"] != "none")]
    return [str(run) for run in chosen["run"]]


def protection(least: Sequence[float], most: Sequence[float]) -> str:
    """Judge a protection by how far the strongest attack gets: smallest and largest share, run by run."""
    if not least or any(map(math.isnan, (*least, *most))):
        return UNMEASURED
    if min(least) >= FULL:
        return REFUTED
    return HOLDS if max(most) <= LITTLE else PARTLY


PROTECTION_RULE = (
    f"Refuted if the strongest attack goes at least {percent(FULL)} of the way from the no-information guess to the "
    f"ceiling in every bucket of every run named; holds if it never exceeds {percent(LITTLE)}; in part otherwise."
)


@dataclass(frozen=True)
class Evidence:
    """Everything the claims are judged by.

    Attributes:
        training: the training table, trained runs and yardstick rows alike.
        attacks: the attack table.
        sent: for each attacked run, the fields that its messages carry.
        control: for each run with an IoU, (number of generated images, standard error of the IoU).
        defences: for each run, those of its clients.
    """

    training: pd.DataFrame
    attacks: pd.DataFrame
    sent: Mapping[str, tuple[str, ...]]
    control: Mapping[str, tuple[int, float]]
    defences: Mapping[str, Defences]

    def trained(self, *schemes: str) -> pd.DataFrame:
        """Return the rows of runs of those schemes that generate shapes, whose control can be measured as IoU."""
        every = self.training
        rows = every[every["steps"].notna() & every["control_iou"].notna() & (every["server"] == "honest")]
        return rows[rows["scheme"].isin(schemes)] if schemes else rows

    def with_defence(self, name: str) -> set[str]:
        """Return the attacked runs that have a defence on."""
        return {str(run) for run in self.attacks["run"].unique() if getattr(self.of_run(run), name)}

    def of_run(self, run: str) -> Defences:
        """Return a run's defences."""
        return self.defences.get(run, Defences())

    def ends(self, leak: Leak) -> tuple[pd.Series, pd.Series]:
        """Return an attack's rows at the least and the most noisy timesteps that were scored."""
        rows = self.attacks[self.attacks["run"] == leak.run]
        rows = by_adversary(rows)[leak.adversary]
        rows = rows.dropna(subset=["psnr_db"]).sort_values("t_low")
        return rows.iloc[0], rows.iloc[-1]

    def iou(self, run: str) -> str:
        """Write a run's IoU with its standard error."""
        value = float(self.training.set_index("run")["control_iou"][run])
        n, error = self.control[run]
        return f"{run} {value:.2f}\u00a0±\u00a0{error:.2f} (n\u00a0=\u00a0{n})"


def claims(evidence: Evidence) -> list[Claim]:
    """Judge S1's claims by the tables."""
    judges: tuple[Callable[[Evidence], Claim], ...] = (
        _no_gradient,
        _quality,
        _timestep_floor,
        _activation,
        _prompt_hiding,
        _attacks_fail,
        _bytes,
    )
    return [judge(evidence) for judge in judges]


def _no_gradient(evidence: Evidence) -> Claim:
    says = "The server need not send gradients back: a ControlNet can be trained on what clients send alone."
    rule = "Holds if no byte returns and each S1 run gains at least half the IoU over no control that central gains."
    split, central = evidence.trained("split"), evidence.trained("central")
    free = evidence.training[evidence.training["scheme"] == "no control"]["control_iou"].dropna()
    if split.empty or central.empty or free.empty:
        return Claim(says, ("The runs for it are missing.",), UNMEASURED, rule)
    floor, best = float(free.iloc[0]), float(central["control_iou"].max())
    gains = (split["control_iou"] - floor) / max(best - floor, 1e-6)
    returned = float(split["down_bytes_per_sample"].max(skipna=False))
    if math.isnan(returned):
        return Claim(says, ("What is returned was not counted in every run.",), UNMEASURED, rule)
    measured = (
        f"Bytes returned per sample: {returned:,.0f}.",
        f"Control IoU (± standard error): {', '.join(evidence.iou(run) for run in split['run'])}; "
        f"central {best:.2f}, no control {floor:.2f}. One training seed each.",
    )
    return Claim(says, measured, HOLDS if returned == 0 and gains.min() >= 0.5 else REFUTED, rule)


def _quality(evidence: Evidence) -> Claim:
    says = "Image quality is kept, compared with central, federated and conventional split training."
    rule = (
        f"Holds if every defended S1 run's IoU is at most {CLOSE:.2f} below the best of the others, refuted if one is "
        f"{FAR:.2f} or more below; in part otherwise. Only control is judged: FID is not measured here."
    )
    own = evidence.trained("split")
    own = own[own["defences"] != "none"]
    others = evidence.trained("central", "federated", "split_gradients")
    if own.empty or others.empty:
        return Claim(says, ("The runs for it are missing.",), UNMEASURED, rule)
    loss = float(others["control_iou"].max() - own["control_iou"].min())
    measured = (
        f"S1 with defences: {', '.join(evidence.iou(run) for run in own['run'])}.",
        f"Others: {', '.join(evidence.iou(run) for run in others['run'])}. One training seed each.",
    )
    return Claim(says, measured, HOLDS if loss <= CLOSE else REFUTED if loss >= FAR else PARTLY, rule)


def _timestep_floor(evidence: Evidence) -> Claim:
    says = "The timestep floor protects the images: only strongly noised latents leave the client."
    floored = evidence.with_defence("timestep_floor")
    found = [leak for leak in leaks(evidence.attacks) if leak.run in floored]
    best = list(strongest(found).values())
    measured = [f"{leak.run}: {leak}" for leak in best] or ["No attacked run has a floor."]
    if absent := sorted(floored - {leak.run for leak in best}):
        measured.append(f"No attack on images was scored on {', '.join(absent)}.")
    falls = [
        f"{leak.run}, {attack_label(leak.adversary)}: "
        + ", ".join(f"{row['psnr_db']:.1f} dB at t {bucket(row)}" for row in evidence.ends(leak))
        for leak in strongest([leak for leak in found if not leak.uses_noise]).values()
    ]
    if falls:
        measured.append(f"For comparison, the best attacks that ignore the sent noise: {'; '.join(falls)}.")
    verdict = protection([leak.least for leak in best], [leak.most for leak in best])
    return Claim(says, tuple(measured), verdict, PROTECTION_RULE)


def _activation(evidence: Evidence) -> Claim:
    says = "The activation symsigmoid (with fixed noise as an option) protects what is sent of the hint."
    rule = (
        "As above, for hints: the way from the mean public hint to what the best attack gets from the run without "
        "defences."
    )
    rows = evidence.attacks.dropna(subset=["hint_psnr_db"])
    open_runs = rows[(rows["defences"] == "none") & rows["run"].isin(evidence.trained("split")["run"])]
    looked = by_adversary(open_runs[~open_runs["attack"].isin(NO_INFORMATION)])
    reference = max((float(rows["hint_psnr_db"].mean()) for rows in looked.values()), default=math.nan)
    least, most, measured = [], [], []
    for run, own in rows[rows["dataset"].isin(open_runs["dataset"])].groupby("run", sort=False):
        guess = own[own["attack"] == REFERENCE].set_index("t_low")["hint_psnr_db"]
        tried = by_adversary(own[~own["attack"].isin(NO_INFORMATION)])
        if not evidence.of_run(str(run)).symsigmoid or not tried or guess.empty:
            continue
        best = max(sorted(tried), key=lambda who: tried[who]["hint_psnr_db"].mean())
        psnr = tried[best].set_index("t_low")["hint_psnr_db"]
        share = (psnr - guess) / max(reference - float(guess.mean()), 1e-6)
        least.append(float(share.min(skipna=False)))
        most.append(float(share.max(skipna=False)))
        overlap = tried[best]["hint_iou"].mean()
        measured.append(
            f"{run}: {attack_label(best)} recovers hints at {psnr.mean():.1f} dB (without defences "
            f"{reference:.1f}, mean public hint {guess.mean():.1f} dB)"
            + (f", outline IoU {overlap:.2f}" if pd.notna(overlap) else "")
            + f"; n = {int(tried[best]['n'].sum())}."
        )
    measured.append("The image itself does not pass through the activation: see the row above.")
    return Claim(says, tuple(measured), protection(least, most), rule)


def _prompt_hiding(evidence: Evidence) -> Claim:
    says = "Prompt hiding keeps the prompts private, and training with empty prompts still works."
    rule = (
        "Refuted if a text embedding is sent; in part if none is, but the image that the prompt describes is recovered "
        "as above; holds otherwise."
    )
    rows = evidence.attacks
    hidden = evidence.with_defence("hide_prompts")
    if not hidden:
        return Claim(says, ("No attacked run hides prompts.",), UNMEASURED, rule)
    shown = sorted(run for run in hidden if "encoder_hidden_states" in evidence.sent.get(run, ()))
    best = [leak for run, leak in strongest(leaks(rows)).items() if run in hidden]
    recovered = [leak.run for leak in best if leak.least >= FULL]
    absent = len(hidden) - len(best)
    measured = (
        f"Text embeddings are sent in {len(shown)} of {counted(len(hidden), 'run')} that hide them.",
        f"The image that the prompt describes is recovered in {len(recovered)} of {len(hidden)}"
        + (f"; in {absent} no attack on images was scored" if absent else "")
        + f".{_prompts_read(rows)}",
    )
    verdict = REFUTED if shown else PARTLY if recovered else UNMEASURED if absent else HOLDS
    return Claim(says, measured, verdict, rule)


def _prompts_read(rows: pd.DataFrame) -> str:
    """Say how many prompts the attacks read, where they are sent and where they are hidden."""
    parts = [
        f"{attack_label(who)} on {run} gets {percent(own['prompt_exact'].mean(skipna=False))} exactly right"
        for (run, who), own in by_run(rows).items()
        if own["prompt_exact"].notna().any()
    ]
    return f" Of prompts, {'; '.join(parts)}." if parts else ""


def _attacks_fail(evidence: Evidence) -> Claim:
    says = "The defences withstand attack: most fail, a learned inverse network being one of two that do not."
    rule = f"Judged as a claim of security, that of the strongest attack, not by counting attacks. {PROTECTION_RULE}"
    own = defended(evidence.training)
    found = [leak for leak in leaks(evidence.attacks) if leak.run in own]
    measured = []
    for who in dict.fromkeys(leak.adversary for leak in sorted(found, key=lambda leak: -leak.share)):
        tries = [leak for leak in found if leak.adversary == who]
        way = " / ".join(percent(leak.share) for leak in tries)
        seeds = counted(max(leak.n_seeds for leak in tries), "attack seed")
        measured.append(f"{attack_label(who)}: {way} of the way to the ceiling ({seeds}).")
    if found:
        order = " / ".join(dict.fromkeys(leak.run for leak in found))
        measured.append(f"Runs in this order: {order}; means over buckets.")
        present = set(evidence.attacks["attack"])
        elsewhere = [r.label for r in ATTACKS.values() if r.name in present and r.schemes and "split" not in r.schemes]
        if elsewhere:
            measured.append(
                f"{' and '.join(elsewhere)} need a client that is trained, or gradients that return: S1 has neither. "
                "What they get where they apply is told below."
            )
    best = strongest(found).values()
    verdict = protection([leak.least for leak in best], [leak.most for leak in best])
    return Claim(says, tuple(measured) or ("No defended S1 run was attacked.",), verdict, rule)


def message_sizes() -> Iterator[tuple[str, int]]:
    """Yield (protocol, payload bytes per sample) at Stable Diffusion 1.5's shapes, counted on messages built here."""
    reference = reference_message(SD15_LATENTS, SD15_TEXT, SD15_WIDTH)
    yield "S1's released code, prompts hidden", sum(part.nbytes for part in reference.values())
    for what, defences in (
        ("our messages, 32 bits, prompts sent", Defences()),
        ("our messages, 32 bits, prompts hidden", Defences(hide_prompts=True)),
        ("our messages, 16 bits, prompts hidden", Defences(hide_prompts=True, half=True)),
    ):
        yield what, sample_bytes(SD15_LATENTS, SD15_TEXT, defences)


def _bytes(evidence: Evidence) -> Claim:
    says = "One message goes up per batch and nothing comes down, which keeps communication low."
    rule = "Holds if an S1 run moves fewer bytes per sample, both ways together, than federated and conventional split."
    sizes = dict(message_sizes())
    (reference, theirs), *_, (ours, least) = sizes.items()
    total = evidence.training[["up_bytes_per_sample", "down_bytes_per_sample"]].sum(axis=1, skipna=False)
    table = evidence.training.assign(total=total).dropna(subset=["steps", "control_iou"])
    own, others = (
        table[table["run"].isin(defended(table))],
        table[table["scheme"].isin(["federated", "split_gradients"])],
    )
    measured = [
        f"At Stable Diffusion 1.5's shapes: {theirs:,} bytes per sample for {reference}; {least:,} for {ours}, from "
        f"which the same follows by a public linear map ({theirs / least:.0f} times fewer)."
    ]
    if own.empty or others.empty or table["total"].isna().any():
        return Claim(says, tuple(measured), UNMEASURED, rule)
    for who, rows in (("S1 with defences", own), ("Others", others)):
        parts = ", ".join(f"{row['run']} {row['total']:,.0f}" for _, row in rows.iterrows())
        measured.append(f"{who}: {parts} bytes per sample on the data used here, both ways together.")
    return Claim(says, tuple(measured), HOLDS if own["total"].max() < others["total"].min() else REFUTED, rule)
