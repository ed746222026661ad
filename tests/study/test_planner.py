import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.core.tables import read_table
from splitlab.privacy.accounting import gdp_delta
from splitlab.split.config import Defences, read_defences
from splitlab.study.planner import Setting, measured, plan, public_norm, shipped

HIDDEN = Defences(
    timestep_floor=800, feature_noise=1.0, matched=True, hint_noise=2.0, coarse_hints=3, hide_prompts=True
)
LOUD = Defences(timestep_floor=800, feature_noise=2.0, matched=True, hint_noise=4.0, coarse_hints=3, hide_prompts=True)
BARE = Defences(timestep_floor=800, feature_noise=1.0, matched=True, hide_prompts=True)
SETTINGS = [
    Setting(Defences(), 1.0, "closed_form", 30.0, 0.86),
    Setting(BARE, 0.2, "nearest_public", 12.0, 0.68),
    Setting(HIDDEN, 0.1, "nearest_public", 12.0, 0.60),
    Setting(LOUD, 0.03, "posterior", 10.5, 0.40),
]
ASKED = {"norm": 30.0, "delta": 1e-5, "messages": 29}


@pytest.mark.parametrize("defences", [Defences(), HIDDEN, BARE, Defences(key_mixing=16, half=True, fixed_noise=0.1)])
def test_defences_are_read_as_tables_write_them(defences: Defences):
    assert read_defences(str(defences)) == defences


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("magic", "unknown key magic"),
        ("feature_noise=much", "'much' is no number"),
        ("hide_prompts recoloured", "unknown key recoloured"),
    ],
)
def test_what_names_no_defences_is_refused(text: str, reason: str):
    with pytest.raises(InputError, match=reason):
        read_defences(text)


def test_the_mildest_setting_that_meets_the_target_is_proposed():
    found = {p: plan(SETTINGS, tiny.ALPHAS, identification=p, **ASKED) for p in (1.0, 0.25, 0.1, 0.05)}
    chosen = [one.setting.identification for one in found.values()]
    assert chosen == [1.0, 0.2, 0.1, 0.03]
    assert all(one.setting.identification <= p for p, one in found.items())
    assert plan(SETTINGS, tiny.ALPHAS, psnr_db=11.0, **ASKED).setting.attack == "posterior"
    assert plan(SETTINGS, tiny.ALPHAS, identification=0.3, psnr_db=11.0, **ASKED).setting.psnr_db == 10.5


def test_a_target_that_nothing_meets_is_refused_and_the_closest_named():
    with pytest.raises(InputError, match=r"no setting measured meets identification <= 0.01.*leaves 3%"):
        plan(SETTINGS, tiny.ALPHAS, identification=0.01, **ASKED)
    with pytest.raises(InputError, match="there are none"):
        plan([], tiny.ALPHAS, identification=0.5, **ASKED)
    with pytest.raises(InputError, match="plan for what"):
        plan(SETTINGS, tiny.ALPHAS, **ASKED)
    unknown = [Setting(HIDDEN, 0.0, "guess", math.nan, math.nan)]
    with pytest.raises(InputError, match="no setting measured"):
        plan(unknown, tiny.ALPHAS, psnr_db=40.0, **ASKED)  # a PSNR that nobody measured is not a low one


def test_the_guarantee_is_that_of_image_and_hint_together_composed_over_the_run():
    found = plan(SETTINGS, tiny.ALPHAS, identification=0.1, **ASKED)
    assert found.setting.defences.latent_norm == 30.0
    # two Gaussian mechanisms by hand (Dong et al. 2022, Cor. 3.3): 2 R sqrt(ᾱ_800) / σ1 and 2 R / σh; the matched
    # client names the nearest timestep, whose ᾱ is within a per cent
    image, hint = 60.0 * math.sqrt(float(tiny.ALPHAS[800])), 60.0 / 2.0
    assert found.mu_message == pytest.approx(math.hypot(image, hint), rel=0.01)
    assert found.mu_run == pytest.approx(found.mu_message * math.sqrt(29), rel=1e-6)
    assert gdp_delta(found.mu_message, found.epsilon_message) == pytest.approx(1e-5, rel=1e-3)
    assert found.epsilon_run > found.epsilon_message > 100  # large, and said
    assert "nothing but that ε is guaranteed" in str(found)
    assert f"{found.epsilon_run:.4g}" in str(found)


def test_noise_drawn_once_does_not_compose():
    once = Setting(Defences(feature_noise=7.0, matched=True, hint_noise=2.0, per_image_noise=True), 0.1, "a", 1.0, 0.5)
    found = plan([once], tiny.ALPHAS, identification=0.1, **ASKED)
    assert found.mu_run == found.mu_message == pytest.approx(math.hypot(60 / 7, 60 / 2), rel=1e-6)
    assert "The prompt is sent as it is" in str(found)


def test_a_noised_layout_is_bounded_by_itself_and_sent_once():
    defences = Defences(
        timestep_floor=800, feature_noise=1.0, matched=True, borrowed_colours=True, hint_layout_noise=0.2
    )
    found = plan([Setting(defences, 0.1, "a", 1.0, 0.5)], tiny.ALPHAS, identification=0.1, **ASKED)
    # 2 R sqrt(ᾱ_800) / σ1 for the image; the diagonal of the unit cube over the noise, sqrt(3) / 0.2, for the layout
    image, hint = 60.0 * math.sqrt(float(tiny.ALPHAS[800])), math.sqrt(3) / 0.2
    assert found.mu_message == pytest.approx(math.hypot(image, hint), rel=0.01)
    assert found.mu_run == pytest.approx(math.hypot(image * math.sqrt(29), hint), rel=0.01)
    assert "The prompt is sent as it is" not in str(found)


@pytest.mark.parametrize(
    "defences", [BARE, Defences(hint_noise=1.0), Defences(feature_noise=1.0, independent_draws=True)]
)
def test_what_is_sent_without_noise_or_twice_has_no_epsilon(defences: Defences):
    found = plan([Setting(defences, 0.1, "a", 1.0, 0.5)], tiny.ALPHAS, identification=0.1, **ASKED)
    assert math.isinf(found.mu_message)
    assert math.isinf(found.epsilon_run)
    assert "ε = inf" in str(found)


def test_the_strongest_attack_counts_whatever_it_identifies_by():
    columns = ("defences", "attack", "t_low", "id_top1", "hint_id_top1", "psnr_db")
    rows = [
        (str(BARE), "posterior", 800, 0.05, 0.1, 12.0),
        (str(BARE), "closed_form", 800, 0.02, 1.0, 9.0),
        ("none", "closed_form", 0, 1.0, math.nan, 30.0),
        (f"{BARE} recoloured", "posterior", 0, 0.0, 0.0, 1.0),
    ]
    utility = pd.DataFrame({"defences": ["none", "none", str(BARE)], "control_iou": [0.8, 0.9, 0.6]})
    bare, none = measured(pd.DataFrame(rows, columns=columns), utility)
    assert replace(bare, ideal=0.0) == Setting(BARE, 1.0, "closed_form", 12.0, 0.6, ideal=0.0)
    assert math.isnan(bare.ideal)
    assert (none.identification, none.control_iou) == (1.0, pytest.approx(0.85))
    with pytest.raises(InputError, match="identifies nobody"):
        measured(pd.DataFrame({"defences": ["none"]}))


def test_the_projects_own_table_is_read():
    table = read_table(ROOT / "reports/metrics/split_attacks.csv")
    found = measured(table[table["run"].str.startswith("survey-shapes")])
    assert {one.defences: one.identification for one in found}[Defences()] == 1.0
    assert len(found) > 5
    assert all(0 <= one.identification <= 1 for one in found)


def test_control_counts_as_all_settings_of_a_table_are_asked():
    row = {"defences": str(BARE), "attack": "a", "id_image": 0.1, "id_both_ideal": 0.2}
    row |= {"control_iou": 0.4, "control_iou_std": 0.9, "control_iou_guided": 0.3, "messages": 3}
    assert measured(pd.DataFrame([row])) == [Setting(BARE, 0.1, "a", math.nan, 0.3, 3, 0.2)]
    other = row | {"defences": str(LOUD), "control_iou_guided": None}
    assert math.isnan(measured(pd.DataFrame([row, other]))[1].control_iou), "not what it has when asked otherwise"


@pytest.mark.parametrize("missing", ["id_image", "id_hint", "id_both"])
@pytest.mark.parametrize("messages", [1, 29])
def test_a_setting_that_was_not_scored_is_never_proposed(missing: str, messages: int):
    row = {"defences": str(HIDDEN), "attack": "a", "id_image": 0.02, "id_hint": 0.02, "id_both": 0.02}
    rows = [row | {"messages": n} | ({missing: None} if n == messages else {}) for n in (1, 29)]
    (found,) = measured(pd.DataFrame(rows))
    assert math.isnan(found.identification)
    with pytest.raises(InputError, match="there are none"):
        plan([found], tiny.ALPHAS, identification=1.0, **ASKED)
    with pytest.raises(InputError, match="leaves 3%"):
        plan([found, SETTINGS[3]], tiny.ALPHAS, identification=0.01, **ASKED)
    assert plan([found, *SETTINGS], tiny.ALPHAS, identification=0.05, **ASKED).setting.attack == "posterior"


def test_a_run_needs_an_attack_on_as_many_messages(tmp_path: Path):
    row = {"attack": "a", "id_image": 0.05, "id_hint": 0.05, "id_both": 0.05, "id_both_ideal": 0.06}
    table = [row | {"defences": str(one), "setting": name} for name, one in (("x", HIDDEN), ("y", LOUD), ("z", BARE))]
    pd.DataFrame(table).to_csv(tmp_path / "matched_client.csv", index=False)
    runs = [row | {"defences": str(HIDDEN), "messages": 3, "id_image": 0.07}]
    runs += [row | {"defences": str(LOUD), "messages": n, "id_image": 0.01 * n} for n in (3, 29)]
    runs[-1]["id_both_ideal"] = None
    pd.DataFrame(runs).assign(dataset="shapes").to_csv(tmp_path / "whole_run.csv", index=False)
    found = {n: {one.defences: one for one in shipped(messages=n, metrics=tmp_path)} for n in (1, 2, 10)}
    assert list(found[1]) == [HIDDEN, LOUD, BARE]
    assert {defences: one.identification for defences, one in found[2].items()} == {HIDDEN: 0.07, LOUD: 0.05}
    assert {defences: one.identification for defences, one in found[10].items()} == {LOUD: 0.29}
    assert math.isnan(found[10][LOUD].ideal), "of fewer messages is not of all"
    with pytest.raises(InputError, match="no run of 30 messages per image was attacked: ask for at most 29"):
        shipped(messages=30, metrics=tmp_path)


def test_what_is_private_for_one_message_need_not_be_for_a_run():
    one, run = (
        plan(shipped(messages=n), tiny.ALPHAS, norm=36.0, delta=1e-5, messages=n, identification=0.1) for n in (1, 29)
    )
    assert not one.setting.defences.per_image_noise
    assert run.setting.defences.per_image_noise
    assert "from one message" in str(one)
    assert "from up to 29 messages per image, somebody who holds the candidates" in str(run)
    assert one.setting.control_iou > run.setting.control_iou > 0.5
    worst = {setting.defences: setting.identification for setting in shipped(messages=29)}
    assert worst[replace(one.setting.defences, latent_norm=0.0)] > 0.3


def test_photographs_have_no_run_that_was_attacked():
    assert len(shipped("photos")) > 5
    with pytest.raises(InputError, match="on photos no run of 29 messages per image was attacked: ask for at most 1"):
        shipped("photos", messages=29)
    with pytest.raises(InputError, match=r"matched_client_digits.csv"):
        shipped("digits")


def test_the_public_norm_is_the_largest():
    latents, hints = torch.ones(3, 4, 2, 2), torch.ones(3, 4, 2, 2)
    hints[1] *= 3
    assert public_norm(latents, hints) == pytest.approx(12.0)
