"""Verdicts from tables made up for it: what counts as stopped, who the paper's attacker is, which cost is whose."""

import pandas as pd
import pytest
from world import tiny

from splitlab.split.config import Adversary, read_defences
from splitlab.split.privacy import message_guarantee
from splitlab.study.verdicts import ABLATION_COLUMNS, VERDICT_COLUMNS, ablations, pooled, verdicts

QUIET = {"psnr_db": 11.0, "ssim": 0.3, "id_top1": 0.02, "hint_id_top1": 0.01, "prompt_exact": None}
QUIET |= {"both_id_top1": 0.015, "hint_psnr_db": 10.0}


UNSCORED: dict[str, object] = {"id_top1": None, "hint_id_top1": None, "both_id_top1": None}


def row(attack: str, t_low: int = 0, **changes: object) -> dict:
    fixed = {"run": "survey-shapes-x", "kind": "survey", "name": "x", "dataset": "shapes", "defences": "half"}
    fixed |= {"attack": attack, "denied": None, "t_low": t_low, "used": "timesteps noisy_latents"}
    return fixed | {"n": 64, "n_seeds": 3, "id_chance": 0.01} | QUIET | changes


def judge(*rows: dict, utility: pd.DataFrame | None = None) -> pd.Series:
    table = pd.DataFrame(rows)
    claim = message_guarantee(read_defences(table["defences"].iloc[0]), tiny.ALPHAS)
    facts = {"epsilon_message": claim.epsilon if claim.events else None, "why_no_epsilon": claim.why}
    frame = verdicts(table, utility, pd.DataFrame([facts], index=["survey-shapes-x"]))
    assert list(frame.columns) == list(VERDICT_COLUMNS)
    assert len(frame) == 1
    return frame.iloc[0]


def test_a_defence_that_every_attack_fails_against_stops_them():
    found = judge(row("closed_form"), row("likelihood", denied="noise defences"), row("mean_public", id_top1=0.9))
    assert found["stops_adaptive"] == found["stops_paper_attacks"] == True  # noqa: E712  (None is not True)
    assert "no attack identifies more than 2%" in found["reason"]
    assert found["setting"] == "x"


def test_one_timestep_bucket_in_which_an_attack_identifies_is_enough_to_fail():
    calm = [row("closed_form", t_low=low) for low in (0, 200, 400, 600)]
    found = judge(*calm, row("closed_form", t_low=800, id_top1=0.2))
    assert not found["stops_adaptive"]
    assert found["id_worst"] == pytest.approx(0.2)
    assert found["worst_t_low"] == 800
    assert found["id_top1"] == pytest.approx((4 * 0.02 + 0.2) / 5)
    assert found["reason"].startswith("closed_form identifies 20% at t ≥ 800")
    assert not found["reason"].endswith("the prompt is sent")
    told = judge(row("adaptive_network", id_top1=1.0, used="noisy_latents encoder_hidden_states"))
    assert told["reason"].endswith(", and the prompt is sent")


def test_a_hint_that_identifies_fails_the_defence_but_not_the_papers_attacks():
    found = judge(row("closed_form", hint_id_top1=0.95), row("inverse_network", denied="noise defences"))
    assert not found["stops_adaptive"]
    assert found["stops_paper_attacks"]
    assert found["hint_attack"] == "closed_form"
    assert "the hint is recovered and identifies 95%" in found["reason"]


def test_image_and_hint_that_identify_only_together_fail_the_defence():
    found = judge(row("adaptive_network", hint_id_top1=0.05, both_id_top1=0.4))
    assert not found["stops_adaptive"]
    assert found["reason"] == "neither image nor hint identifies, but the two together do: 40%"


@pytest.mark.parametrize("missing", ["id_top1", "hint_id_top1", "both_id_top1"])
@pytest.mark.parametrize("where", [0, 200])
def test_what_was_not_scored_is_neither_stopped_nor_not(missing: str, where: int):
    rows = [row("closed_form", t_low=low, **({missing: None} if low == where else {})) for low in (0, 200)]
    found = judge(*rows, row("mean_public"))  # a guess's score does not stand for an attack's
    assert pd.isna(found["stops_adaptive"])
    assert found["reason"].startswith("not measured: no attack was scored by ")
    assert pd.isna(found[missing])
    certain = judge(*rows, row("posterior", t_low=200, id_top1=0.5))
    assert not certain["stops_adaptive"]
    assert not pd.isna(certain["stops_adaptive"]), "what one attack does is known, whatever others would"


def test_a_run_of_which_nothing_was_scored_claims_nothing():
    found = judge(row("closed_form", **UNSCORED), row("likelihood", denied="noise defences", **UNSCORED))
    assert pd.isna(found["stops_adaptive"])
    assert pd.isna(found["stops_paper_attacks"])
    assert found[["id_top1", "id_worst", "hint_id_top1", "both_id_top1", "paper_id_worst"]].isna().all()
    guesses = judge(row("mean_public"), row("random_public"))
    assert pd.isna(guesses["stops_adaptive"])
    assert guesses["reason"] == "not measured: no attack but guesses was run"


def test_among_few_candidates_nothing_is_called_stopped():
    found = judge(row("closed_form", id_chance=0.1), row("likelihood", denied="noise defences", id_chance=0.1))
    assert pd.isna(found["stops_adaptive"])
    assert pd.isna(found["stops_paper_attacks"])
    assert found["reason"] == "not measured: among 10 candidates no attack can exceed 10 times chance"


def test_a_paper_attack_that_was_scored_in_part_is_not_stopped():
    paper = {"attack": "likelihood", "denied": "noise defences"}
    papers = row(**paper), row(**paper, t_low=200, id_top1=None)
    found = judge(*papers, row("closed_form"), row("closed_form", t_low=200))
    assert pd.isna(found["stops_paper_attacks"])
    assert found["stops_adaptive"] == True  # noqa: E712


def test_an_unscored_attack_is_not_the_strongest_and_its_clear_images_do_not_make_it_so():
    assert judge(row("posterior", id_top1=None, psnr_db=40.0), row("closed_form"))["strongest_attack"] == "closed_form"


def test_an_ablation_of_which_one_side_was_not_scored_breaks_nothing():
    table = pd.DataFrame([row("posterior", id_top1=0.9), row("posterior", denied="noise", id_top1=None),
                          row("one_step", id_top1=1.0),
                          row("one_step", denied="noise", **UNSCORED, psnr_db=None)])  # fmt: skip
    found = ablations(table, {}).set_index("attack")
    assert pd.isna(found["breaks"]["posterior"])
    assert pd.isna(found["without_it"]["posterior"])
    assert found["breaks"]["one_step"], "without the fact it recovers no image at all"


def test_a_cost_of_which_one_seed_is_missing_is_not_averaged_over_the_others():
    costs = [{"dataset": "shapes", "name": "x", "control_iou": iou, "eval_loss": 0.1} for iou in (0.7, None)]
    assert pd.isna(judge(row("closed_form"), utility=pd.DataFrame(costs))["control_iou"])


def test_an_epsilon_is_claimed_only_where_bound_and_noise_are_owned():
    bare = judge(row("closed_form", defences="feature_noise=1 matched hint_noise=2 hide_prompts"))
    assert pd.isna(bare["epsilon_message"])
    assert "without a bound" in bare["why_no_epsilon"]
    bound = judge(row("closed_form", defences="latent_norm=8 feature_noise=1 matched hint_noise=2 hide_prompts"))
    assert bound["epsilon_message"] > 1
    assert bound["why_no_epsilon"] == ""
    assert "no noise" in judge(row("closed_form", defences="key_mixing=16 hide_prompts"))["why_no_epsilon"]


def test_the_papers_attackers_are_those_without_label_and_defences():
    found = judge(row("closed_form", id_top1=1.0), row("inverse_network", denied="noise", id_top1=0.9),
                  row("inverse_network", denied="noise defences", id_top1=0.05))  # fmt: skip
    assert (found["paper_attack"], found["paper_id_worst"]) == ("inverse_network", 0.05)
    assert found["stops_paper_attacks"]
    assert not found["stops_adaptive"]
    alone = judge(row("closed_form"))
    assert pd.isna(alone["stops_paper_attacks"])


def test_the_strongest_attack_identifies_most_and_psnr_decides_between_equals():
    every = pooled(pd.DataFrame([row("a", id_top1=0.5, psnr_db=12.0), row("b", id_top1=0.5, psnr_db=14.0),
                                 row("c", psnr_db=20.0), row("hints", psnr_db=None, id_top1=None)]))  # fmt: skip
    assert [pool["adversary"].attack for pool in every] == ["b", "a", "c", "hints"]


def test_buckets_are_pooled_by_their_size():
    (one,) = pooled(pd.DataFrame([row("a", n=10, psnr_db=10.0), row("a", t_low=200, n=30, psnr_db=20.0)]))
    assert one["psnr_db"] == pytest.approx(17.5)
    assert one["n"] == 40


def test_the_cost_is_that_of_the_same_defences_on_the_same_data():
    utility = pd.DataFrame(
        [{"dataset": "shapes", "name": "x", "control_iou": iou, "eval_loss": 0.1} for iou in (0.7, 0.9)]
        + [{"dataset": "photos", "name": "x", "control_iou": 0.1, "eval_loss": 9.0}]
    )
    found = judge(row("closed_form"), utility=utility)
    assert found["control_iou"] == pytest.approx(0.8)
    assert found["eval_loss"] == pytest.approx(0.1)


def test_runs_that_are_not_the_surveys_are_not_judged():
    assert verdicts(pd.DataFrame([row("closed_form") | {"run": "shapes-s1", "kind": "trained"}]), None).empty


def test_an_ablation_compares_an_attack_with_itself_denied_one_fact():
    table = pd.DataFrame([row("closed_form", id_top1=1.0), row("posterior", id_top1=0.9),
                          row("posterior", denied="noise", id_top1=0.8), row("orphan", denied="noise", id_top1=0.5),
                          row("words", **UNSCORED, psnr_db=None, hint_psnr_db=None, prompt_exact=1.0)])  # fmt: skip
    run = "survey-shapes-x"
    blind, mute = Adversary("closed_form", ("noise", "smashed")), Adversary("words", ("x",))
    found = ablations(table, {(run, blind): "no noise", (run, mute): "no x"})
    assert list(found.columns) == list(ABLATION_COLUMNS)
    by_name = found.set_index("attack")
    assert set(by_name.index) == {"posterior", "closed_form", "words"}
    assert not by_name["breaks"]["posterior"]
    assert by_name["without_it"]["posterior"] == 0.8
    assert by_name["breaks"]["closed_form"]
    assert by_name["note"]["closed_form"] == "no noise"
    assert by_name["denied"]["closed_form"] == "noise smashed"
    assert by_name["measure"]["words"] == "prompt_exact"


def test_of_equally_strong_attacks_the_simplest_gives_the_reason():
    found = judge(row("posterior", id_top1=1.0, psnr_db=30.0), row("closed_form", id_top1=1.0, psnr_db=29.0))
    assert found["strongest_attack"] == "posterior"
    assert found["reason"].startswith("closed_form identifies 100%")
