"""The evaluation: perfect where the truth is given, at chance where nothing is, and clear about what is missing."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key
from splitlab.data.generate import write_split
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.split.artefacts import SavedReconstruction, load_reconstruction, save_reconstruction
from splitlab.split.config import Adversary, Defences
from splitlab.split.defences import disguised
from splitlab.split.messages import Reconstruction
from splitlab.split.train import train
from splitlab.study.config import EvaluateConfig
from splitlab.study.evaluate import (
    disjoint,
    evaluate_run,
    rounded,
    setting_of,
    training_row,
    yardsticks,
)
from splitlab.study.results import Results, long_table, settings_table
from splitlab.study.scoring import best_order, buckets, run_truth, score_samples

CONFIG = EvaluateConfig(buckets=(0, 500, 1000), candidates=6, samples=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Base, private: ImageSet, heldout: ImageSet) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "runs" / "tiny"
    config = tiny.config(steps=4, record_messages=4)
    train("tiny", config, base, private, heldout, out=out, cache=out.parent / "cache")
    return out


def saved(attack: str, images: torch.Tensor, seed: int = 0, hints: torch.Tensor | None = None) -> SavedReconstruction:
    return SavedReconstruction(Reconstruction(images, hints), Adversary(attack), seed, (("adversary", "a test"),))


@pytest.fixture
def reconstructions(run: Path, base: Base, private: ImageSet, tmp_path: Path) -> Path:
    known = run_truth(run, base, private)
    images, hints = (part[known.truth.indices] for part in (private.images, private.hints))
    mean = private.images.mean(0, keepdim=True).expand_as(images)
    save_reconstruction(tmp_path / "mean_public-0.safetensors", saved("mean_public", mean))
    save_reconstruction(tmp_path / "oracle-0.safetensors", saved("oracle", images, 0, hints))
    for seed in range(2):
        noise = torch.rand(images.shape, generator=tiny.draw(seed)) * 2 - 1
        save_reconstruction(tmp_path / f"noise-{seed}.safetensors", saved("noise", noise, seed))
    return tmp_path


def test_the_truth_scores_perfectly_and_noise_does_not(
    run: Path, base: Base, private: ImageSet, reconstructions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores" / "tiny.safetensors"
    rows = evaluate_run(run, reconstructions, base, private, CONFIG, out=out)
    setting = {**setting_of("tiny", "trained", tiny.config(steps=4, record_messages=4))}
    found = Results(long_table("split", rounded(rows)), settings_table("split", pd.DataFrame([setting])))
    frame = found.view("split_attacks")
    assert set(frame["run"]) == {"tiny"}
    oracle, noise = (frame[frame.attack == name] for name in ("oracle", "noise"))
    assert (oracle.psnr_db > 45).all()  # 8-bit quantisation of the saved images is all that is lost
    assert (oracle.id_top1 == 1).all()
    assert (oracle.ssim > 0.99).all()
    assert (oracle.hint_iou == 1).all()
    assert noise.hint_iou.isna().all()
    assert (noise.n_seeds == 2).all()
    assert (noise.psnr_db < frame[frame.attack == "mean_public"].psnr_db.min()).all()
    assert (frame.no_info_psnr_db == frame.no_info_psnr_db.groupby([frame.t_low]).transform("first")).all()
    assert (frame.id_chance - 1 / 6).abs().max() < 1e-4
    assert out.exists()


def test_equal_reconstructions_give_equal_tables(
    run: Path, base: Base, private: ImageSet, reconstructions: Path, tmp_path: Path
) -> None:
    tables = []
    for name in ("a", "b"):
        rows = evaluate_run(run, reconstructions, base, private, CONFIG, out=tmp_path / f"{name}.scores")
        tables.append(rounded(rows).to_csv())
    assert tables[0] == tables[1]
    assert (tmp_path / "a.scores").read_bytes() == (tmp_path / "b.scores").read_bytes()


def test_a_table_without_its_no_information_row_is_refused(
    run: Path, base: Base, private: ImageSet, reconstructions: Path
) -> None:
    (reconstructions / "mean_public-0.safetensors").unlink()
    with pytest.raises(InputError, match="mean_public, the no-information row"):
        evaluate_run(run, reconstructions, base, private, CONFIG, out=reconstructions / "out")


def test_reconstructions_of_another_run_are_refused(
    run: Path, base: Base, private: ImageSet, reconstructions: Path
) -> None:
    few = private.images[:2]
    save_reconstruction(reconstructions / "mean_public-0.safetensors", saved("mean_public", few))
    with pytest.raises(InputError, match="2 images for"):
        evaluate_run(run, reconstructions, base, private, CONFIG, out=reconstructions / "out")


def test_truth_of_other_data_is_refused(run: Path, base: Base, private: ImageSet) -> None:
    with pytest.raises(InputError, match="the data hold 1"):
        run_truth(run, base, private.subset([0]))


def test_buckets_hold_the_first_samples_of_their_timesteps() -> None:
    timesteps = torch.tensor([10, 600, 20, 30, 700, 40, 50, 60])
    found = buckets(timesteps, CONFIG)
    assert found[0, 500].tolist() == [0, 2, 3, 5, 6]
    assert found[500, 1000].tolist() == [1, 4]
    assert (500, 1000) not in buckets(timesteps[:1], CONFIG)


def test_training_rows_and_yardsticks_fill_the_table(run: Path, base: Base, heldout: ImageSet) -> None:
    rows = [training_row(run), *yardsticks("shapes", base, heldout, samples=2)]
    frame = pd.DataFrame(rows)
    frame = Results(long_table("split", rounded(rows)), settings_table("split", frame)).view("training")
    assert frame.run.tolist() == ["tiny", "(no control: shapes)", "(VAE ceiling: shapes)"]
    assert frame.iloc[0][["eval_loss", "up_bytes_per_sample", "peak_rss_mb"]].notna().all()


def test_a_run_without_its_record_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"record.json: missing; run the stage that makes it \(`dvc repro`\)"):
        training_row(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        training_row(tmp_path)


def test_hints_and_prompts_are_scored_where_no_image_is_recovered(run: Path, base: Base, private: ImageSet) -> None:
    known = run_truth(run, base, private)
    hints = private.hints[known.truth.indices]
    prompts = [private.prompts[i] for i in known.truth.indices.tolist()]
    prompts[0] = "no such prompt"
    result = Reconstruction(hints=hints, prompts=tuple(prompts))
    scores = score_samples(replace(saved("x", hints), result=result), known, CONFIG, localise=True)
    assert set(scores) == {"hint_psnr_db", "hint_identified", "hint_iou", "prompt_exact"}
    assert scores["hint_identified"].all()
    assert scores["prompt_exact"].tolist() == [0.0] + [1.0] * (len(prompts) - 1)


def test_only_the_chosen_samples_are_scored(run: Path, base: Base, private: ImageSet) -> None:
    known = run_truth(run, base, private)
    whole = saved("x", private.images[known.truth.indices])
    scores = score_samples(whole, known, CONFIG, localise=False, chosen=torch.tensor([1, 3]))
    assert torch.nonzero(scores["psnr_db"].isfinite())[:, 0].tolist() == [1, 3]


def test_mixed_samples_are_matched_within_their_group_and_no_further(run: Path, base: Base, private: ImageSet) -> None:
    known = run_truth(run, base, private)
    mixed = replace(known, config=replace(known.config, defences=Defences(key_mixing=3)))
    images = private.images[known.truth.indices]
    n = len(images)
    within = torch.arange(n).reshape(-1, 3).flip(1).flatten()
    across = torch.arange(n).roll(3)
    assert torch.equal(best_order(saved("x", images[within]), mixed), within)  # a reversal undoes itself
    assert not torch.equal(images[across][best_order(saved("x", images[across]), mixed)], images)
    assert torch.equal(best_order(saved("x", images[within]), known), torch.arange(n))
    scores = score_samples(saved("x", images[within]), mixed, CONFIG, localise=False)
    assert (scores["psnr_db"] > 90).all()
    assert torch.equal(scores["place"].long(), within)


def test_public_data_that_hold_private_images_are_refused(tmp_path: Path) -> None:
    drawn = tiny.samples(6)
    for split, chosen in {"private": drawn[:3], "public": drawn[2:], "clean": drawn[3:]}.items():
        write_split(tmp_path / split / "tiny.zip", chosen)
    sources = {split: str(tmp_path / split / "tiny.zip") for split in ("private", "public", "heldout")}
    params = {"datasets": {"tiny": sources}}
    with pytest.raises(
        InputError,
        match=r"1 of the 3 private images are public images too, the first tiny2 \(public: tiny2\)",
    ):
        disjoint("tiny", params)
    (tmp_path / "clean" / "tiny.zip").replace(tmp_path / "public" / "tiny.zip")
    assert len(disjoint("tiny", params)) == 3


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    result = Reconstruction(prompts=("a", "b"), used=("encoder_hidden_states",), n_evals=3)
    save_reconstruction(tmp_path / "x.safetensors", replace(saved("x", torch.zeros(1, 3, 4, 4)), result=result))
    found = load_reconstruction(tmp_path / "x.safetensors").result
    assert (found.images, found.hints, found.prompts, found.n_evals) == (None, None, ("a", "b"), 3)


def test_disguised_samples_are_recognised_as_they_were_sent(run: Path, base: Base, private: ImageSet) -> None:
    known = run_truth(run, base, private)
    defences = Defences(borrowed_colours=True, random_symmetry=True)
    sent, own = disguised(private, defences, key=Key.published(0)), known.truth.indices
    truth = replace(known.truth, prompts=tuple(sent.prompts[i] for i in own.tolist()))
    hidden = replace(known, config=replace(known.config, defences=defences), truth=truth)
    result = Reconstruction(images=sent.images[own], hints=sent.hints[own])
    scores = score_samples(replace(saved("x", result.images), result=result), hidden, CONFIG, localise=False)
    for name in ("identified", "hint_identified", "both_identified"):
        assert scores[name].mean() > 0.9, name
    assert scores["psnr_db"].mean() < 20  # in other colours than the private ones
