"""How much noise is enough? The mildest setting that meets a target in measured attacks, and the ε it really buys."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.labels import UNSCORED
from splitlab.core.paths import resolve
from splitlab.core.tables import read_table
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base, encoded
from splitlab.privacy.accounting import composed_mu, gdp_epsilon
from splitlab.split.config import Defences, read_defences
from splitlab.split.privacy import message_events

IDENTIFICATION = ("id_top1", "hint_id_top1", "id_image", "id_hint", "id_both", "both_id_top1")
"""Columns that say which share of samples an attack identified, by image, hint or both, in the tables there are."""

CONTROL = tuple(f"control_{of}{asked}" for asked in ("_guided", "") for of in ("iou", "edges"))
"""Columns of control, IoU of shapes or agreement of edges of photographs: the first there is, so that all of a table's
settings are asked alike; at the guidance that is best for public hints, if that was measured."""

IDEAL = ("id_image_ideal", "id_hint_ideal", "id_both_ideal")
"""Columns of what somebody recognises who holds the candidates."""


@dataclass(frozen=True)
class Setting:
    """What was measured about one setting.

    Attributes:
        defences: the clients'.
        identification: the largest share identified, over attacks, timestep buckets, image, hint and both; NaN where
            something was not scored that may tell more, and the setting is then never proposed.
        attack: the attack that did.
        psnr_db: the largest mean PSNR of recovered images, over attacks and buckets; NaN where none was measured.
        control_iou: control after training (for photographs, agreement of edges); NaN where it was not measured.
        messages: from up to how many messages per image it was attacked.
        ideal: the largest share that somebody recognises who holds the candidates, by Bayes; NaN where not measured.
        chance: the share that a guess identifies; NaN where the table does not say it.
    """

    defences: Defences
    identification: float
    attack: str
    psnr_db: float
    control_iou: float
    messages: int = 1
    ideal: float = math.nan
    chance: float = math.nan


@dataclass(frozen=True)
class Plan:
    """A setting that meets the target, and the guarantee that comes with it, however weak.

    Attributes:
        setting: as measured; its defences carry the bound (`latent_norm`) that the guarantee needs.
        messages: how often a run sends each image.
        delta: δ.
        mu_message, epsilon_message: of one message, image and hint together (μ-GDP; ε at δ); infinite where the image
            or the hint is sent without noise.
        mu_run, epsilon_run: of the whole run. Both hold for a run with secret draws; with a published key, for none.
    """

    setting: Setting
    messages: int
    delta: float
    mu_message: float
    epsilon_message: float
    mu_run: float
    epsilon_run: float

    def __str__(self) -> str:
        """Say it in words that claim no more than was measured and proved."""
        one, defences = self.setting, self.setting.defences
        control = "" if math.isnan(one.control_iou) else f" Control {one.control_iou:.2f}."
        chance = "" if math.isnan(one.chance) else f" (chance {one.chance:.0%})"
        ideal = "" if math.isnan(one.ideal) else f", somebody who holds the candidates {one.ideal:.0%}"
        prompt = (
            ""
            if defences.hide_prompts or defences.borrowed_colours
            else " The prompt is sent as it is and covered by neither."
        )
        of = "one message" if one.messages == 1 else f"up to {one.messages} messages per image"
        return (
            f"{defences}: the strongest attack measured ({one.attack}) identifies {one.identification:.0%}{chance} "
            f"from {of}{ideal}.{control} As differential privacy, for replacing an image and its hint, of norm up to "
            f"{defences.latent_norm:g}: per message μ = {self.mu_message:.1f}, ε = {self.epsilon_message:.4g}; per run "
            f"of {self.messages} messages per image μ = {self.mu_run:.1f}, ε = {self.epsilon_run:.4g} "
            f"(δ = {self.delta:g}), with secret draws. Beyond the attacks measured, nothing but that ε is guaranteed."
            f"{prompt}"
        )


def measured(attacks: pd.DataFrame, utility: pd.DataFrame | None = None) -> list[Setting]:
    """Gather per setting the strongest attack over all rows of a table.

    Args:
        attacks: `split_attacks.csv`, a row per attack and timestep bucket, or `matched_client.csv`, with rows of
            `whole_run.csv` below it where they are to count; of one data set.
        utility: `utility.csv`, for control where the table has none.

    Raises:
        InputError: the table has no column that says who was identified.
    """
    columns = [name for name in IDENTIFICATION if name in attacks]
    if not columns:
        raise InputError(f"the table identifies nobody: it needs one of the columns {', '.join(IDENTIFICATION)}")
    asked = next((name for name in CONTROL if name in attacks), None)
    found = []
    for text, rows in attacks.groupby("defences", sort=False):
        try:
            defences = read_defences(str(text))
        except InputError:
            continue  # a set-up with more to it than defences on messages
        identification, attack = _strongest(rows, columns)
        psnr = float(rows["psnr_db"].max()) if "psnr_db" in rows else math.nan
        control = float(rows[asked].max()) if asked else math.nan
        messages = int(rows["messages"].max()) if "messages" in rows else 1
        chance = float(rows["id_chance"].max()) if "id_chance" in rows else math.nan
        found.append(Setting(defences, identification, attack, psnr, control, messages, _ideal(rows), chance))
    if utility is None:
        return found
    costs = {
        read_defences(str(words)): float(rows["control_iou"].mean(skipna=False))
        for words, rows in utility.groupby("defences", sort=False)
    }
    return [replace(setting, control_iou=costs.get(setting.defences, setting.control_iou)) for setting in found]


def _strongest(rows: pd.DataFrame, columns: Sequence[str]) -> tuple[float, str]:
    """Return the largest share that an attack identifies, and that attack.

    NaN where less than all are identified and, in some bucket or for some number of messages, no attack was scored by
    image, by hint or by both: what was not scored may be the strongest.
    """
    groups = rows.groupby([name for name in ("t_low", "messages") if name in rows] or "defences")
    complete = groups[list(columns)].count().gt(0).all(axis=None)
    worst = rows[list(columns)].max(axis=1).fillna(-1.0).reset_index(drop=True)
    place = int(worst.argmax())
    if not complete and worst.iloc[place] < 1.0:
        return math.nan, UNSCORED
    return float(worst.iloc[place]), str(rows["attack"].iloc[place])


def _ideal(rows: pd.DataFrame) -> float:
    """Return the largest share that the candidates' holder recognises; NaN unless it was measured in every row."""
    names = [name for name in IDEAL if name in rows]
    return float(rows[names].max(axis=1).max(skipna=False)) if names else math.nan


def shipped(dataset: str = "shapes", *, messages: int = 1, metrics: str | Path = "reports/metrics") -> list[Setting]:
    """Gather what this project measured about matched clients, trained for 600 or 900 steps (`reports/metrics`).

    Args:
        dataset: "shapes" or "photos".
        messages: how often a run sends each image. Above 1, only settings that were attacked from so many or more.
        metrics: folder of the tables.

    Raises:
        InputError: a table is missing, or no run of so many messages was attacked.
    """
    folder = resolve(metrics)
    of = "" if dataset == "shapes" else f"_{dataset}"
    table = read_table(folder / f"matched_client{of}.csv", "defences", "attack")
    table = table.dropna(subset=["defences"]).assign(messages=1)
    if messages > 1:
        runs = read_table(folder / "whole_run.csv", "dataset", "defences", "messages", "attack")
        runs = runs[runs["dataset"].eq(dataset)]
        enough = runs[runs["messages"].ge(messages)].groupby("defences")["messages"].min()
        if enough.empty:
            most = int(max(runs["messages"], default=1))
            raise InputError(
                f"on {dataset} no run of {messages} messages per image was attacked: ask for at most {most}"
            )
        runs = runs[runs["messages"].le(runs["defences"].map(enough))]  # those of no such run compare as false
        table = pd.concat([table[table["defences"].isin(runs["defences"])], runs])
    return measured(table)


def plan(
    settings: Sequence[Setting],
    alphas_cumprod: Float[Tensor, " T"],
    *,
    norm: float,
    delta: float,
    messages: int,
    identification: float = math.inf,
    psnr_db: float = math.inf,
) -> Plan:
    """Propose the setting of best control, or else of least noise, under which no attack measured exceeds the target.

    Only settings that were measured are proposed; nothing is extrapolated.

    Args:
        settings: what was measured (`measured`).
        alphas_cumprod: ᾱ of the noise schedule.
        norm: L2 norm to which the client is to bound latents and hint latents (`latent_norm`); `public_norm` gives one
            that costs nothing. A setting that was measured with a bound of its own keeps that.
        delta: δ of the guarantee, below 1 / number of images.
        messages: how often a run sends each image: epochs.
        identification: largest share that the strongest attacker may identify, by image, hint or both.
        psnr_db: largest mean PSNR that it may reach.

    Raises:
        InputError: there is no target, or no setting meets it.
    """
    if math.isinf(identification) and math.isinf(psnr_db):
        raise InputError("plan for what? give identification, psnr_db or both")
    if not norm > 0 or messages < 1:
        raise InputError(f"norm must be above 0 and messages 1 or more, got {norm} and {messages}")
    fit = [one for one in settings if one.identification <= identification and _no_clearer(one, psnr_db)]
    if not fit:
        scored = [one for one in settings if not math.isnan(one.identification)]
        closest = min(scored, key=lambda one: one.identification, default=None)
        best = f"the safest, {closest.defences}, leaves {closest.identification:.0%}" if closest else "there are none"
        raise InputError(f"no setting measured meets identification <= {identification:g}, PSNR <= {psnr_db:g}: {best}")
    plans = [_plan(one, alphas_cumprod, norm, delta, messages) for one in fit]
    return max(plans, key=lambda one: (_known(one.setting.control_iou), min(one.mu_message, 1e9)))


def _no_clearer(one: Setting, psnr_db: float) -> bool:
    """A target on PSNR is not met by a setting without one."""
    return math.isinf(psnr_db) or one.psnr_db <= psnr_db


def _known(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _plan(one: Setting, alphas_cumprod: Tensor, norm: float, delta: float, messages: int) -> Plan:
    defences = replace(one.defences, latent_norm=one.defences.latent_norm or norm)
    mus = [_mu(defences, alphas_cumprod, n) for n in (1, messages)]
    epsilons = [gdp_epsilon(mu, delta) for mu in mus]
    return Plan(replace(one, defences=defences), messages, delta, mus[0], epsilons[0], mus[1], epsilons[1])


def _mu(defences: Defences, alphas_cumprod: Tensor, messages: int) -> float:
    """Return μ of image and hint together; infinite where either is sent without noise, or the image twice."""
    hint = defences.hint_noise or defences.hint_layout_noise
    if not defences.feature_noise or not hint or defences.independent_draws:
        return math.inf
    return composed_mu(message_events(defences, alphas_cumprod, messages=messages))


def usual_norm(base: Base, images: ImageSet, *, cache: Path | None = None) -> float:
    """Return `public_norm` of public images and their hints, rounded up to a tenth: a bound that costs nothing."""
    data = encoded(base, images, cache=cache)
    return math.ceil(10 * public_norm(data.latents, data.hint_latents)) / 10


def public_norm(latents: Float[Tensor, "n c h w"], hint_latents: Float[Tensor, "n c h w"]) -> float:
    """Return the largest norm of public latents and hint latents: a bound that hardly ever scales anything down."""
    return max(float(torch.linalg.vector_norm(part.flatten(1), dim=1).max()) for part in (latents, hint_latents))
