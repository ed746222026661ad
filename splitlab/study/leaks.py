"""What one attack got out of one run, summed up from the attack table: how far, in dB, and whom it identifies."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from splitlab.core.labels import counted, percent
from splitlab.split.attacks import NO_INFORMATION, attack_label
from splitlab.split.config import Adversary
from splitlab.study.results import by_run, words


@dataclass(frozen=True)
class Leak:
    """What one attack got out of one run, over its timestep buckets.

    Attributes:
        run, adversary: which.
        psnr_db, std_db, ceiling_db, no_info_db: means over the buckets.
        least, most: the smallest and largest share, over the buckets, of the way from the no-information guess to the
            VAE's ceiling, in dB.
        worst_gap_db: how far it stays below the ceiling in its worst bucket.
        id_top1, id_chance: identification, mean over the buckets, and its chance level.
        n_buckets, n, n_seeds: timestep buckets, images in all of them, attack seeds.
        uses_noise: whether it reads the noise that the client sends.
    """

    run: str
    adversary: Adversary
    psnr_db: float
    std_db: float
    ceiling_db: float
    no_info_db: float
    least: float
    most: float
    worst_gap_db: float
    id_top1: float
    id_chance: float
    n_buckets: int
    n: int
    n_seeds: int
    uses_noise: bool

    @property
    def share(self) -> float:
        """Return how far the attack gets on average, 0 at the no-information guess, 1 at the ceiling."""
        way = self.ceiling_db - self.no_info_db
        return (self.psnr_db - self.no_info_db) / way if way > 0 else 0.0

    def __str__(self) -> str:
        """Tell it in a sentence; the run is not named."""
        return (
            f"{attack_label(self.adversary)} reaches {self.psnr_db:.1f}\u00a0±\u00a0{self.std_db:.1f}\u00a0dB "
            f"(VAE ceiling {self.ceiling_db:.1f}, no information {self.no_info_db:.1f}), {percent(self.least)} of the "
            f"way in its worst bucket, and identifies {percent(self.id_top1)} (chance {percent(self.id_chance)}); "
            f"n = {self.n} in {counted(self.n_buckets, 'bucket')}, {counted(self.n_seeds, 'attack seed')}."
        )


def bucket(row: pd.Series) -> str:
    """Write a table row's timestep bucket, both ends included."""
    return f"{row['t_low']:.0f}–{row['t_high'] - 1:.0f}"


def shares(rows: pd.DataFrame) -> pd.Series:
    """Return each row's share of the way from the no-information guess to the VAE ceiling, in dB."""
    way = (rows["ceiling_psnr_db"] - rows["no_info_psnr_db"]).clip(lower=1e-6)
    return (rows["psnr_db"] - rows["no_info_psnr_db"]) / way


def leaks(attacks: pd.DataFrame) -> list[Leak]:
    """Summarise the attack table: one entry per run and attack that looks at the messages, over its scored buckets."""
    found = []
    scored = attacks[attacks["psnr_db"].notna() & ~attacks["attack"].isin(NO_INFORMATION)]
    for (run, adversary), rows in by_run(scored).items():
        mean, share = rows.mean(numeric_only=True, skipna=False), shares(rows)
        found.append(
            Leak(
                run=str(run),
                adversary=adversary,
                psnr_db=float(mean["psnr_db"]),
                std_db=float(mean["psnr_db_std"]),
                ceiling_db=float(mean["ceiling_psnr_db"]),
                no_info_db=float(mean["no_info_psnr_db"]),
                least=float(share.min()),
                most=float(share.max()),
                worst_gap_db=float((rows["ceiling_psnr_db"] - rows["psnr_db"]).max()),
                id_top1=float(mean["id_top1"]),
                id_chance=float(mean["id_chance"]),
                n_buckets=len(rows),
                n=int(rows["n"].sum()),
                n_seeds=int(rows["n_seeds"].max()),
                uses_noise="noise" in words(rows["used"].iloc[0]),
            )
        )
    return found


def strongest(found: Sequence[Leak]) -> dict[str, Leak]:
    """Return each run's strongest attack, by mean PSNR."""
    best: dict[str, Leak] = {}
    for leak in found:
        if leak.run not in best or leak.psnr_db > best[leak.run].psnr_db:
            best[leak.run] = leak
    return best
