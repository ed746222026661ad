"""Federated updates from client to report: grids that say what they are, files that keep apart who knows what."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from world import tiny
from world.project import World

from splitlab.core import checkpoint
from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.explorer import InversionPanel
from splitlab.explorer.update_explore import Inverted, side_by_side
from splitlab.federated.attacks import NO_INFORMATION
from splitlab.federated.client import pixel_unet, share
from splitlab.federated.defences import make_defence
from splitlab.federated.external import attack_gradient
from splitlab.federated.saved import SavedInversion, load_inversion, save_inversion
from splitlab.federated.update import UpdateTruth, read_update, read_update_truth, write_update
from splitlab.report import update_report
from splitlab.study.results import VIEWS
from splitlab.study.update_grid import Case, Cell, InversionSpec, ModelSpec, UpdateConfig
from splitlab.study.update_scores import _row, matched, score_inversion
from splitlab.study.update_survey import attack_updates, public_model, record_updates

SIZE = 8
PIXEL = ModelSpec("pixel", size=SIZE, channels=(32, 32))


@pytest.fixture(scope="module")
def table(world: World) -> pd.DataFrame:
    return update_report.load_updates(world.root / "metrics", world.root / "figures-updates").table


def config(*cases: Case, **changes: object) -> UpdateConfig:
    given = {"models": {"pixel": PIXEL, "lora": ModelSpec("lora"), "latent": ModelSpec("latent")}, "images": 2}
    given |= {"published_key": 0}
    return UpdateConfig(cases=cases, **(given | changes))


def case(**changes: object) -> Case:
    return Case(**({"model": "pixel", "attacks": (InversionSpec("timesteps"),), "dataset": "tiny"} | changes))


def test_cells_are_all_combinations_and_those_alike_are_merged():
    both = config(case(timesteps=(20, 100)), case(attacks=(InversionSpec("unknown_noise"),), images=3))
    names = {cell.name: (n, [spec.name for spec in cell.attacks]) for cell, n, _ in both.cells}
    assert names == {"pixel-tiny-t20-b1": (2, ["timesteps"]), "pixel-tiny-t100-b1": (3, ["timesteps", "unknown_noise"])}
    full = replace(both, grid="full")
    assert [(n, seeds) for _, n, seeds in full.cells] == [(5, 3), (5, 3)]


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lambda: config(case(), case()), "asked for twice"),
     (lambda: config(case(model="x")), "no model is called x; there: pixel"),
     (lambda: config(grid="half"), "choose one of default, full"),
     (lambda: case(defences=("nois=1",)), "defence 'nois=1' is unknown"),
     (lambda: case(defences=("noise=much",)), "'much' is no number"),
     (lambda: case(trainable="some"), "trainable 'some' is unknown"),
     (lambda: case(dtype="float7"), "dtype 'float7' is unknown"),
     (lambda: InversionSpec("guess"), "attack 'guess' is unknown"),
     (lambda: InversionSpec("dlg", grant=("images",)), "images cannot be granted"),
     (lambda: ModelSpec("video"), "kind 'video' is unknown; choose one of pixel, latent"),
     (lambda: parse(UpdateConfig, {"model": {}}, where="updates"), "updates: unknown key model")],
)  # fmt: skip
def test_what_means_nothing_is_refused(make, reason: str):
    with pytest.raises(InputError, match=reason):
        make()


def test_what_the_server_may_know_holds_no_image(world: World):
    for path in (world.root / "updates" / "granted").glob("*/*.safetensors"):
        tensors, _ = checkpoint.load(path)
        assert set(tensors) <= {"timesteps", "noise", "text", "hint_latents"}
    update = read_update(world.root / "updates" / "sent" / "pixel-tiny-t100-b1" / "0-0.safetensors")
    truth = read_update_truth(world.root / "updates" / "truth" / "pixel-tiny-t100-b1" / "0.safetensors")
    shapes = {tuple(value.shape) for value in update.gradients.values()}
    assert tuple(truth.clean[0].shape) not in shapes


def test_the_table_has_every_column_and_a_row_without_information_in_every_cell(table: pd.DataFrame):
    assert set(VIEWS["gradient_attacks"].columns) <= set(table.columns)
    assert (table["cpu_s"] >= 0).all()
    for _, rows in table.groupby("cell"):
        assert rows["attack"].iloc[0] == NO_INFORMATION
    assert (table["n"] == 2).all()


def test_the_images_come_back_and_noise_on_the_update_ends_that(table: pd.DataFrame):
    rows = table[table["model"] == "pixel"].set_index(["defence", "level", "attack"])["ssim"]
    ours, blind = rows.xs("unknown_noise", level="attack"), rows.xs(NO_INFORMATION, level="attack")
    assert ours.loc["none"].iloc[0] > 0.95
    assert ours.loc["noise", 100.0] < blind.loc["noise", 100.0] + 0.2
    assert ours.loc["none"].iloc[0] > rows.xs("gidm", level="attack").loc["none"].iloc[0]


def test_timesteps_are_exact_without_a_defence(table: pd.DataFrame):
    rows = table[(table["defence"] == "none")].set_index(["model", "attack"])
    assert rows.loc[("pixel", "timesteps"), "timestep_exact"] == 1.0
    assert rows.loc[("latent", "timesteps"), "timestep_exact"] == 1.0
    assert 0.0 <= rows.loc[("latent", "prompts"), "prompt_exact"] <= 1.0  # a random text model: see its own tests
    assert rows.loc[("latent", NO_INFORMATION), "timestep_exact"] == 0.0


def test_what_was_granted_is_not_counted_as_found(table: pd.DataFrame):
    gidm = table[table["attack"] == "gidm"]
    assert gidm["timestep_exact"].isna().all()
    assert set(gidm["granted"]) == {"timesteps noise"}


def test_an_interrupted_attack_goes_on_where_it_was(base: Base, private: ImageSet, tmp_path: Path):
    one = config(case())
    record_updates(one, base, tiny.splits(private), out=tmp_path)
    attack_updates(one, base, tiny.splits(private), recorded=tmp_path, out=tmp_path / "inv")
    path = tmp_path / "inv" / "pixel-tiny-t100-b1" / "timesteps-0.safetensors"
    before = path.stat().st_mtime_ns
    attack_updates(one, base, tiny.splits(private), recorded=tmp_path, out=tmp_path / "inv")
    assert path.stat().st_mtime_ns == before


def test_an_attack_that_cannot_says_why(base: Base, private: ImageSet, tmp_path: Path):
    one = config(case(attacks=(InversionSpec("dlg"),)))
    record_updates(one, base, tiny.splits(private), out=tmp_path)
    attack_updates(one, base, tiny.splits(private), recorded=tmp_path, out=tmp_path / "inv")
    saved = load_inversion(tmp_path / "inv" / "pixel-tiny-t100-b1" / "dlg-0.safetensors")
    assert saved.images is None
    assert "needs knowledge.noise" in saved.refused


def test_an_attack_that_was_refused_once_has_no_mean_over_the_other_seeds(
    base: Base, private: ImageSet, tmp_path: Path
):
    one = config(case())
    record_updates(one, base, tiny.splits(private), out=tmp_path)
    attack_updates(one, base, tiny.splits(private), recorded=tmp_path, out=tmp_path / "inv")
    ((cell, _, _),) = one.cells
    truth = read_update_truth(tmp_path / "truth" / cell.name / "0.safetensors")
    found = load_inversion(tmp_path / "inv" / cell.name / "timesteps-0.safetensors")
    refused = SavedInversion(found.attack, found.granted, refused="no gradient")
    rows = [_row(cell, saved, [truth, truth], private.images) for saved in ([found, found], [found, refused])]
    assert [row["seeds"] for row in rows] == [2, 2]
    assert rows[0]["timestep_exact"] == 1.0
    assert rows[1]["timestep_exact"] is None
    assert rows[1]["note"] == "no gradient"


def test_aggregated_clients_stand_behind_one_update(base: Base, private: ImageSet, tmp_path: Path):
    one = config(case(defences=("aggregation=3",), timesteps=(-1,), images=2))
    record_updates(one, base, tiny.splits(private), out=tmp_path)
    truth = read_update_truth(next((tmp_path / "truth").glob("*/0.safetensors")))
    updates = sorted((tmp_path / "sent").glob("*/*.safetensors"))
    assert (len(truth), len(updates)) == (6, 2)
    model = public_model(PIXEL, base, 0)
    alone = [share(model, truth[i : i + 1], alphas_cumprod=base.alphas_cumprod) for i in range(3)]
    mean = torch.stack([u.gradients["conv_in.weight"] for u in alone]).mean(0)
    torch.testing.assert_close(read_update(updates[0]).gradients["conv_in.weight"], mean, rtol=1e-4, atol=1e-6)


def test_more_images_than_there_are_is_one_clear_error(base: Base, private: ImageSet, tmp_path: Path):
    with pytest.raises(InputError, match="needs 40 private images, tiny has 12"):
        record_updates(config(case(images=40)), base, tiny.splits(private), out=tmp_path)


def test_adapters_are_the_same_for_server_and_client(base: Base):
    first, second = (public_model(ModelSpec("lora"), base, 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any("lora_A" in name for name, _ in first.named_parameters())
    assert not any("lora" in name for name, _ in base.unet.named_parameters()), "the base itself stays as it was"


def test_an_absent_model_is_one_clear_error(base: Base, tmp_path: Path):
    with pytest.raises(InputError, match=r"config.json: cannot be read \(No such file"):
        public_model(ModelSpec("pixel", source=str(tmp_path)), base, 0)


@pytest.mark.parametrize("words", ["noise=0.1", "clip=1", "top_k=0.1", "bits=8", "sign", "dp_sgd=1", "soteria=0.5"])
def test_every_defence_can_be_named(words: str):
    assert make_defence(words) is not None
    assert make_defence("none") is None


def test_images_of_one_update_are_matched_in_the_order_that_suits_them():
    truth = torch.rand(4, 3, 4, 4)
    torch.testing.assert_close(matched(truth[[1, 0, 3, 2]], truth, 2), truth)
    torch.testing.assert_close(matched(truth[[2, 1, 0, 3]], truth, 2), truth[[2, 1, 0, 3]])


def test_the_truth_itself_scores_perfectly():
    truth = UpdateTruth(tiny.small_set(2).images, torch.tensor([3, 5]), torch.zeros(2, 3, 32, 32))
    cell = Cell("m", "tiny", -1, 2, "none", "epsilon", "gradient", "all", "float32", ())
    saved = SavedInversion("a", ("b",), images=truth.clean[[1, 0]], timesteps=((3, 5),))
    scores = score_inversion(saved, truth, cell, tiny.small_set(6).images, seed=0)
    assert {key: float(value.mean()) for key, value in scores.items() if key != "psnr_db"} == pytest.approx(
        {"timestep_exact": 1.0, "ssim": 1.0, "mse": 0.0, "identified": 1.0}
    )
    with pytest.raises(InputError, match="1 images were reconstructed of 2"):
        score_inversion(replace(saved, images=truth.clean[:1]), truth, cell, truth.clean, seed=0)


def test_an_inversion_survives_the_disk(tmp_path: Path):
    images = torch.rand(2, 3, 4, 4).mul(255).round().div(127.5).sub(1.0)
    saved = SavedInversion("a", ("b",), images, ((1, 2),), (("x", "y"),), ((3, images),), (0.5,), 7, 1.5)
    save_inversion(tmp_path / "one.safetensors", saved)
    back = load_inversion(tmp_path / "one.safetensors")
    torch.testing.assert_close(back.images, images)
    torch.testing.assert_close(back.history[0][1], images)
    assert replace(back, images=None, history=()) == replace(saved, images=None, history=())


def test_a_gradient_that_somebody_brings_is_attacked(tmp_path: Path):
    model = pixel_unet(SIZE, seed=0, channels=(32, 32))
    clean = torch.nn.functional.interpolate(tiny.small_set(1).images, size=(SIZE, SIZE), mode="area")
    truth = UpdateTruth(clean, torch.tensor([100]), torch.randn(clean.shape, generator=tiny.draw(1)))
    schedule = torch.linspace(0.9999, 0.98, 1000).cumprod(0)
    update = share(model, truth, alphas_cumprod=schedule)
    write_update(tmp_path / "update.safetensors", update)
    checkpoint.save(tmp_path / "plain.safetensors", update.gradients, {})
    model.save_pretrained(tmp_path / "unet")
    for name in ("update", "plain"):
        found = attack_gradient(
            tmp_path / f"{name}.safetensors", model=tmp_path / "unet", attack="timesteps", alphas_cumprod=schedule
        )
        assert found.timesteps.tolist() == [100]
    with pytest.raises(InputError, match="attack 'x' is unknown"):
        attack_gradient(tmp_path / "update.safetensors", model=model, attack="x")
    with pytest.raises(InputError, match="no model; name a directory that diffusers'"):
        attack_gradient(tmp_path / "update.safetensors", model=tmp_path)
    other = pixel_unet(SIZE, seed=0, channels=(16, 32))
    with pytest.raises(InputError, match="shapes that differ"):
        attack_gradient(tmp_path / "update.safetensors", model=other, attack="timesteps")


def test_the_report_draws_strips_and_a_curve_and_judges_the_claims(world: World):
    material = update_report.load_updates(world.root / "metrics", world.root / "figures-updates")
    names = {path.name for path in material.figures.iterdir()}
    assert names == {"strip-pixel.png", "images-pixel.png", "curve.png"}
    assert (
        "near-identical (SSIM ≥ 0.9, or as near as the VAE gets) in 1 of 1 undefended cell"
        in update_report.conclusion(material).data
    )
    assert "ahead in 1 of 1 cell" in update_report.conclusion(material).data
    assert 'class="verdict holds"' in update_report.claims_table(material).data
    assert update_report.pictures(material).data.count("<figure>") == 2
    assert "patch test" in update_report.table(material).data
    with pytest.raises(InputError, match=r"gradient_attacks\.csv: missing"):
        update_report.load_updates(world.root, world.root)


def test_an_inversion_is_played_frame_by_frame(world: World):
    recorded = world.root / "updates"
    inverted = Inverted(world.params, recorded=recorded, inversions=recorded / "inversions")
    panel = InversionPanel(inverted)
    assert next(iter(panel.cell.options)) == "pixel-tiny-t100-b1"
    assert dict(panel.attack.options) == {"patch test": "unknown_noise", "GIDM (knows t, noise)": gidm_name()}
    assert panel.update.max == 1
    assert panel.progress.ssim[-1] > 0.95
    last, panel.frame.value = panel.pictures.value, 0
    assert panel.pictures.value != last, "the slider changes the picture"
    panel.attack.value = gidm_name()
    assert "GIDM" in panel.about.value
    side = side_by_side(panel.progress, 0)
    assert side.shape == (3, 33, 16)


def gidm_name() -> str:
    return "gidm-with-timesteps-noise"


def test_an_explorer_without_inversions_says_what_makes_them(tmp_path: Path, world: World):
    panel = InversionPanel(Inverted(world.params, recorded=tmp_path, inversions=tmp_path))
    assert "no inverted updates" in panel.message.value


def test_near_identical_is_judged_against_what_the_vae_can_show():
    rows = pd.DataFrame({"ssim": [0.95, 0.85, 0.84, 0.84, 0.7], "ceiling_ssim": [None, None, 0.845, 0.87, 0.99]})
    assert update_report.alike(rows).tolist() == [True, False, True, False, False]
