"""Evidence for the report's claims, changed to say this or that."""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from splitlab.report import claims
from splitlab.report import page as report


def evidence(material: report.Material, change: Callable[[pd.DataFrame, pd.DataFrame], None]) -> claims.Evidence:
    training, attacks = material.evidence.training.copy(), material.evidence.attacks.copy()
    change(training, attacks)
    return replace(material.evidence, training=training, attacks=attacks)


def verdicts(found: claims.Evidence) -> dict[str, str]:
    names = ("gradient", "quality", "floor", "activation", "prompts", "attacks", "bytes")
    return dict(zip(names, (claim.verdict for claim in claims.claims(found)), strict=True))


def attack_at(share: float) -> Callable[[pd.DataFrame, pd.DataFrame], None]:
    """Let the closed form go `share` of the way from 10 dB to a ceiling of 30 dB, for images and for hints."""

    def change(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        attacks[["no_info_psnr_db", "ceiling_psnr_db"]] = 10.0, 30.0
        closed, undefended = attacks["attack"] == "closed_form", attacks["run"] == "split"
        attacks["psnr_db"] = 10.0
        attacks.loc[closed, "psnr_db"] = 10.0 + 20.0 * share
        attacks["hint_psnr_db"] = 10.0
        attacks.loc[closed, "hint_psnr_db"] = 10.0 + 20.0 * share
        attacks.loc[closed & undefended, "hint_psnr_db"] = 30.0

    return change
