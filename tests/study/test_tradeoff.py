"""Privacy against utility: known points on the scales, what is left out and why, labels that do not collide."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from splitlab.report import tradeoff_report
from splitlab.report.figures.tradeoff_figures import draw_tradeoff, spread_out
from splitlab.study import tradeoff

ALPHAS = torch.linspace(0.999, 0.005, 1000)
DEFENDED = "timestep_floor=800 feature_noise=1 matched hide_prompts"


def write(folder: Path, **tables: list[dict]) -> Path:
    for name, rows in tables.items():
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    return folder


def message(defences: str, attack: str, by_image: float, by_hint: float, t_low: int = 0) -> dict:
    name = "none" if defences == "none" else "hidden"
    setting = {
        "run": f"survey-shapes-{name}",
        "kind": "survey",
        "name": name,
        "dataset": "shapes",
        "defences": defences,
    }
    found = {"id_top1": by_image, "hint_id_top1": by_hint, "both_id_top1": by_hint, "id_chance": 0.01, "psnr_db": 20.0}
    return setting | {"attack": attack, "denied": None, "t_low": t_low, "n": 64, "n_evals": 1} | found


def tuned(trainable: str, epsilon: float, accuracy: float | None, *, auc: float = 0.5, dataset: str = "digits") -> dict:
    return {"dataset": dataset, "trainable": trainable, "epsilon": epsilon, "delta": 1e-5, "downstream_acc": accuracy,
            "mia_auc": auc, "n": 800, "n_test": 200}  # fmt: skip


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Three schemes whose places are known."""
    attacks = [
        message("none", "closed_form", 1.0, 1.0),
        message(DEFENDED, "mean_public", 0.9, 0.9),  # a guess that is lucky is no attack
        message(DEFENDED, "posterior", 0.0, 0.03, t_low=800),
        message(DEFENDED, "posterior", 0.109, 0.208, t_low=900),
    ]
    costs = [
        {"dataset": "shapes", "setting": name, "defences": words, "control_iou": iou, "control_edges": 0.1}
        for name, words, iou in (("none", "none", 0.8), ("hidden", DEFENDED, 0.5))
    ]
    training = [
        {"dataset": "shapes", "scheme": "no control", "control_iou": 0.2},
        {"dataset": "shapes", "scheme": "federated", "control_iou": 0.7},
    ]
    update = {"model": "controlnet", "dataset": "shapes", "granted": "noise", "id_chance": 0.01, "n": 2, "n_seeds": 1}
    update |= {"ssim": 0.9}
    updates = [
        update | {"defence": "none", "level": None, "attack": "known_noise", "id_top1": 1.0},
        update | {"defence": "noise", "level": 1.0, "attack": "known_noise", "id_top1": 0.5},
    ]
    private = [
        tuned("public base", 0.0, 0.3), tuned("public start", 0.0, 0.5), tuned("real images", math.inf, 0.95),
        tuned("attention", math.inf, 0.9, auc=0.6), tuned("attention", math.inf, 0.9, auc=0.6),
        tuned("attention", 0.999, 0.68, auc=0.51), tuned("attention", 0.9995, 0.72, auc=0.53),
        tuned("unet", 9.99, 0.4, auc=0.49), tuned("attention", 1.0, None, auc=0.52, dataset="photos"),
    ]  # fmt: skip
    return write(
        tmp_path, split_attacks=attacks, utility=costs, training=training, gradient_attacks=updates, dp=private
    )


@pytest.fixture
def points(metrics: Path) -> pd.DataFrame:
    return tradeoff.tradeoff(metrics, alphas_cumprod=ALPHAS)


def test_success_above_chance_ends_where_it_should() -> None:
    assert tradeoff.above_chance(0.01, 0.01) == 0.0
    assert tradeoff.above_chance(1.0, 0.01) == 1.0
    assert tradeoff.above_chance(0.75, 0.5) == 0.5
    assert tradeoff.above_chance(0.4, 0.5) == 0.0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1e-5), (10.0, 1e-5), (2.0, 0.1)])
def test_the_ceiling_of_membership_is_the_area_of_the_trade_off_curve(epsilon: float, delta: float) -> None:
    alpha = np.linspace(0, 1, 2_000_001)
    curve = np.maximum.reduce(
        [0 * alpha, 1 - delta - math.exp(epsilon) * alpha, math.exp(-epsilon) * (1 - delta - alpha)]
    )  # Dong, Roth and Su 2022, eq. 5
    assert tradeoff.membership_ceiling(epsilon, delta) == pytest.approx(1 - 2 * np.trapezoid(curve, alpha), abs=1e-5)
    assert tradeoff.membership_ceiling(math.inf, delta) == 1.0


def test_a_split_clients_place_is_that_of_its_worst_bucket_by_image_or_hint(points: pd.DataFrame) -> None:
    own = points[points["setting"] == "hidden"].iloc[0]
    assert own["scheme"] == tradeoff.MATCHED
    assert own["leak"] == pytest.approx(0.2)  # (0.208 - 0.01) / 0.99, by the hint
    assert own["image_leak"] == pytest.approx(0.1)
    assert own["attack"] == "diffusion posterior, by hint"
    assert own["kept"] == pytest.approx(0.5)  # (0.5 - 0.2) / (0.8 - 0.2)
    assert math.isnan(own["epsilon"])
    assert "without a bound" in own["why_no_epsilon"]
    plain = points[(points["scheme"] == tradeoff.SPLIT) & (points["setting"] == "none")].iloc[0]
    assert (plain["leak"], plain["kept"]) == (1.0, 1.0)


def test_private_fine_tuning_is_measured_from_what_is_public_to_what_has_no_noise(points: pd.DataFrame) -> None:
    own = points[(points["scheme"] == tradeoff.DP_LDM) & (points["epsilon"] == 1.0)].iloc[0]
    assert own["n_seeds"] == 2
    assert own["kept"] == pytest.approx(0.5)  # (0.7 - 0.5) / (0.9 - 0.5): the public start, not the base
    assert own["leak"] == pytest.approx(0.04)  # 2 x 0.52 - 1
    assert own["ceiling"] == pytest.approx(math.tanh(0.5), abs=1e-3)
    full = points[points["scheme"] == tradeoff.DP_FULL].iloc[0]
    assert full["kept"] < 0  # worse than public, against attention's ε = ∞: its own was not run
    assert full["utility_of"] == "accuracy downstream; no defence: attention only"
    assert full["leak"] == 0.0


def test_what_cannot_be_placed_says_why(points: pd.DataFrame) -> None:
    left = points[points["left_out"] != ""]
    assert set(left["left_out"]) == {
        "its utility was not measured",
        "no accuracy downstream: its images are not of classes",
    }
    assert left["setting"].tolist() == ["noise-1", "attention"]


def test_a_training_that_learns_nothing_has_no_place(metrics: Path) -> None:
    costs = pd.read_csv(metrics / "utility.csv", keep_default_na=False).assign(control_iou=[0.15, 0.18])
    costs.to_csv(metrics / "utility.csv", index=False)
    own = tradeoff.tradeoff(metrics, alphas_cumprod=ALPHAS).iloc[0]
    assert own["left_out"] == "without defence it is no better (0.15) than without private data (0.20)"


def test_a_federated_share_of_dp_ldm_has_its_utility_and_its_own_attacker(metrics: Path) -> None:
    shares = [
        {"noise": noise, "epsilon": epsilon, "trainable": "attention", "attack": "holds the candidates",
         "knowledge": "noise", "shares": 1, "identified": hit, "chance": 0.01, "n": 100}
        for noise, epsilon, hit in (("none", math.inf, 1.0), ("central", 1.0, 0.109), ("local", 10.0, 0.02))
    ]  # fmt: skip
    points = tradeoff.tradeoff(write(metrics, dp_shares=shares), alphas_cumprod=ALPHAS)
    own = points[points["scheme"] == tradeoff.FEDERATED_DP]
    assert own["leak"].tolist() == pytest.approx([1.0, 0.1])
    assert own["kept"].tolist() == pytest.approx([1.0, 0.5])


def test_a_table_that_is_not_there_leaves_its_scheme_out(metrics: Path) -> None:
    (metrics / "dp.csv").unlink()
    points = tradeoff.tradeoff(metrics, alphas_cumprod=ALPHAS)
    assert set(points["scheme"]) == {tradeoff.SPLIT, tradeoff.MATCHED, tradeoff.FEDERATED}


def test_labels_keep_apart_and_stay_near() -> None:
    places = spread_out(np.array([0.0, 0.01, 0.02, 1.0]), gap=0.1)
    assert np.diff(places).min() >= 0.1 - 1e-12
    assert places[1] == pytest.approx(0.01)  # the middle of three stays where it is
    assert places[3] == 1.0
    assert len(spread_out(np.array([]), gap=0.1)) == 0
    places = spread_out(np.array([0.0, 0.01, 0.5]), gap=0.1, lowest=0.2)
    assert places.tolist() == pytest.approx([0.2, 0.3, 0.5])


def test_the_picture_has_every_label_and_none_upon_another(points: pd.DataFrame) -> None:
    figure = draw_tradeoff(points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [text for text in figure.axes[0].texts if text.get_fontsize() < 9.2 and text.get_text()]
    words = [text.get_text() for text in texts]
    assert "simulated ε = 1" in words  # its key is published
    assert any(text.startswith("no ε: noise without a bound") for text in words)
    boxes = [text.get_window_extent(renderer) for text in texts]
    overlapping = [
        (words[i], words[j]) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])
    ]  # fmt: skip
    assert not overlapping


def test_photographs_have_their_own_measure_and_their_own_panel(metrics: Path) -> None:
    own = {"steps": 900, "n_seeds": 3, "id_chance": 0.01, "attack": "closed_form", "n": 300, "id_image": 0.01}
    own |= {"control_edges_std": 0.01, "control_edges_guided_std": 0.02}
    photos = [
        own | {"setting": "none", "defences": "none", "control_edges": 0.1, "control_edges_guided": 0.2,
               "id_hint": 1.0, "id_both": 1.0, "id_worst": 1.0},
        own | {"setting": "coarse", "defences": DEFENDED, "control_edges": 0.19, "control_edges_guided": 0.08,
               "id_hint": 0.109, "id_both": 0.05, "id_worst": 0.109},
        {"setting": "(public data only)", "steps": 900, "control_edges": 0.19, "control_edges_guided": 0.14,
         "control_edges_std": 0.01, "control_edges_guided_std": 0.02, "n_seeds": 3},
        {"setting": "(VAE ceiling)", "control_edges": 0.4},
    ]  # fmt: skip
    free = {"dataset": "photos", "scheme": "no control", "control_edges": 0.05}
    training = [*pd.read_csv(metrics / "training.csv").to_dict("records"), free]
    write(metrics, matched_client_photos=photos, training=training)
    points = tradeoff.tradeoff(metrics, alphas_cumprod=ALPHAS)
    own_points = points[points["dataset"].eq("photos") & points["scheme"].eq(tradeoff.MATCHED)]
    assert own_points["setting"].tolist() == ["coarse"]
    assert own_points["kept"].tolist() == pytest.approx([0.2])  # (0.08 - 0.05) / (0.2 - 0.05), all of them guided
    assert own_points["leak"].tolist() == pytest.approx([0.1])
    (public,) = points[points["scheme"] == tradeoff.PUBLIC_DATA].to_dict("records")
    assert (public["leak"], public["epsilon"]) == (0.0, 0.0)
    assert public["kept"] == pytest.approx(0.6)  # (0.14 - 0.05) / (0.2 - 0.05)
    assert (
        "**Public data alone** teach a ControlNet, on photos, 60\N{NO-BREAK SPACE}%"
        in tradeoff_report.conclusion(points).data
    )
    titles = [axis.get_title(loc="left") for axis in draw_tradeoff(points).axes]
    assert [title.split(":")[0] for title in titles] == ["drawings and digits", "photographs"]


def test_of_one_message_and_a_whole_run_the_strongest_attack_counts(metrics: Path) -> None:
    own = {"setting": "high", "defences": DEFENDED, "steps": 900, "n_seeds": 3, "id_chance": 0.01, "n": 300}
    own |= {"control_iou_guided": 0.6, "control_iou_guided_std": 0.01}
    one = {"attack": "posterior", "id_image": 0.109, "id_hint": 0.01, "id_both": 0.05, "id_worst": 0.109}
    one |= {"id_image_ideal": 0.208, "id_hint_ideal": 0.01, "id_both_ideal": 0.1}
    run = {"dataset": "shapes", "setting": "high", "messages": 29, "n": 300, "attack": "accumulation"}
    run |= {"id_image": 0.505, "id_hint": 0.01, "id_both": 0.4, "id_worst": 0.505, "id_chance": 0.01}
    run |= {"id_image_ideal": 0.802, "id_hint_ideal": 0.01, "id_both_ideal": 0.7}
    none = own | one | {"setting": "none", "defences": "none", "control_iou_guided": 0.9}
    write(metrics, matched_client=[none, own | one], whole_run=[run])
    points = tradeoff.tradeoff(metrics, alphas_cumprod=ALPHAS)
    (found,) = points[points["setting"] == "high"].to_dict("records")
    assert found["attack"].endswith("by image, from 29 messages per image")
    assert (found["leak"], found["image_leak"], found["ceiling"]) == pytest.approx((0.5, 0.5, 0.8))
    assert found["ceiling_by"].endswith("by Bayes, from 29 messages per image")


def test_control_is_compared_asked_alike_and_after_as_many_steps(metrics: Path) -> None:
    own = {"steps": 900, "n_seeds": 3, "id_chance": 0.01, "attack": "closed_form", "n": 300}
    own |= dict.fromkeys(("id_image", "id_hint", "id_both", "id_worst"), 0.01)
    own |= {"defences": DEFENDED, "control_iou_std": 0.0, "control_iou_guided_std": 0.01}
    rows = [
        own | {"setting": "none", "defences": "none", "control_iou": 0.95, "control_iou_guided": 0.9},
        {"setting": "(none, 600 steps)", "steps": 600, "control_iou": 0.99, "control_iou_guided": 0.8},
        own | {"setting": "long", "control_iou": 0.9, "control_iou_guided": 0.55},
        own | {"setting": "short", "control_iou": 0.9, "control_iou_guided": 0.5, "steps": 600},
        own | {"setting": "other", "control_iou": 0.9, "control_iou_guided": 0.5, "steps": 300},
        own | {"setting": "unasked", "control_iou": 0.9, "control_iou_guided": None},
    ]
    points = tradeoff.tradeoff(write(metrics, matched_client=rows), alphas_cumprod=ALPHAS)
    found = points[points["n"].eq(300)].set_index("setting")
    assert found["kept"][["none", "long", "short"]].tolist() == pytest.approx([1.0, 0.5, 0.5])
    assert found["reference"][["long", "short"]].tolist() == [0.9, 0.8]
    assert set(found["utility_of"]) == {"control IoU under guidance"}
    assert found["left_out"]["other"] == "the same training without defence was not measured"
    assert found["left_out"]["unasked"] == "its utility was not measured"


@pytest.mark.parametrize("column", ["id_top1", "hint_id_top1", "both_id_top1"])
def test_a_survey_that_was_not_scored_by_one_measure_is_not_called_private(metrics: Path, column: str) -> None:
    attacks = pd.read_csv(metrics / "split_attacks.csv", keep_default_na=False, na_values=[""])
    attacks.loc[attacks["t_low"].eq(800) & attacks["attack"].ne("mean_public"), column] = math.nan
    points = tradeoff.tradeoff(write(metrics, split_attacks=attacks.to_dict("records")), alphas_cumprod=ALPHAS)
    left_out = points.set_index("setting")["left_out"]
    assert left_out["hidden"].startswith("not scored by ")
    assert left_out["none"].iloc[0] == "", "an attack that identifies all leaves nothing open"


def test_what_nobody_scored_leaks_an_unknown_amount_not_nothing(metrics: Path) -> None:
    assert math.isnan(tradeoff.above_chance(math.nan, 0.01))
    attacks = pd.read_csv(metrics / "split_attacks.csv", keep_default_na=False, na_values=[""])
    attacks[["id_top1", "hint_id_top1", "both_id_top1"]] = math.nan
    updates = pd.read_csv(metrics / "gradient_attacks.csv", keep_default_na=False, na_values=[""])
    private = pd.read_csv(metrics / "dp.csv").assign(mia_auc=math.nan)
    tables = {"split_attacks": attacks, "gradient_attacks": updates.assign(id_top1=math.nan), "dp": private}
    write(metrics, **{name: table.to_dict("records") for name, table in tables.items()})
    points = tradeoff.tradeoff(metrics, alphas_cumprod=ALPHAS)
    assert len(points) > 6
    assert points["leak"].isna().all()
    assert points["left_out"].ne("").all()
    assert "0 settings of 0 leave" in tradeoff_report.conclusion(points).data


@pytest.mark.parametrize("column", ["downstream_acc", "mia_auc"])
def test_a_seed_that_was_not_measured_is_not_averaged_over(metrics: Path, column: str) -> None:
    private = pd.read_csv(metrics / "dp.csv")
    one = private["trainable"].eq("attention") & private["epsilon"].eq(0.9995)
    assert one.sum() == 1
    private.loc[one, column] = math.nan
    points = tradeoff.tradeoff(write(metrics, dp=private.to_dict("records")), alphas_cumprod=ALPHAS)
    own = points[(points["scheme"] == tradeoff.DP_LDM) & points["epsilon"].eq(1.0) & points["dataset"].eq("digits")]
    said = {"downstream_acc": "its utility was not measured", "mia_auc": "no attack was scored"}
    assert own["left_out"].tolist() == [said[column]]


def test_what_was_attacked_by_one_message_says_so(metrics: Path) -> None:
    attacks = pd.read_csv(metrics / "split_attacks.csv", keep_default_na=False, na_values=[""])
    attacks.loc[attacks["run"].str.endswith("hidden"), ["id_top1", "hint_id_top1", "both_id_top1"]] = 0.01
    points = tradeoff.tradeoff(write(metrics, split_attacks=attacks.to_dict("records")), alphas_cumprod=ALPHAS)
    assert "attacked from up to 1 message per image" in tradeoff_report.table(points).data
    said = tradeoff_report.conclusion(points).data
    assert "1 setting of split clients were attacked from one message per image" in said
    assert "what a run gives away was not measured" in said


def test_the_table_says_what_stands_behind_each_mark(points: pd.DataFrame) -> None:
    text = tradeoff_report.table(points).data
    assert "Left out of the picture" in text
    assert "ε = 1" in text
    assert "no ε: noise without a bound" in text
    assert text.count("<tr>") == 1 + (points["left_out"] == "").sum()
    said = tradeoff_report.conclusion(points).data
    assert "2 settings of 6 leave" in said
    assert "0 of them keep" in said
