"""Which attack is the strongest, and what is said of samples that were not scored: fabricated scores, no models."""

import math

import pytest
import torch
from torch import Tensor
from world import tiny

from splitlab.explorer import markup
from splitlab.explorer.run_view import Attempt, RunView, comparison, sample_scores
from splitlab.split.config import Adversary, TrainConfig
from splitlab.split.messages import Observation, Truth
from splitlab.split.wire import Header, Transcript
from splitlab.study.scoring import RunTruth

N = 4


def view(**scores: dict[str, list[float]] | list[dict[str, list[float]]]) -> RunView:
    """Return a run of `N` samples whose attacks have these scores, one mapping per seed."""
    truth = Truth(torch.arange(N), torch.arange(N) * 100, torch.zeros(N, 4, 4, 4))
    private = tiny.small_set(N)
    message = Observation(0, 0, truth.timesteps, torch.zeros(N, 4, 4, 4), None, None)
    header = Header("run", "shapes", "split", TrainConfig().defences, private.size, "digest", 1)
    known = RunTruth(TrainConfig(), truth, private, torch.full((N,), math.nan))
    attempts = {
        name.replace("__", "-"): {
            seed: attempt(name.replace("__", "-"), seed, own)
            for seed, own in enumerate(values if isinstance(values, list) else [values])
        }
        for name, values in scores.items()
    }
    return RunView("run", Transcript(header, (message,)), message, known, attempts, True)


def attempt(name: str, seed: int, scores: dict[str, list[float]]) -> Attempt:
    tensors: dict[str, Tensor] = {key: torch.tensor(values, dtype=torch.float32) for key, values in scores.items()}
    live, plain = name.startswith("live: "), name.removeprefix("live: ")
    return Attempt(Adversary(plain), seed, (), (), None, None, tensors, live=live)


def by_image(*identified: float, psnr_db: float = 20.0) -> dict[str, list[float]]:
    return {"identified": list(identified), "psnr_db": [psnr_db] * N, "ssim": [0.5] * N}


NAN = math.nan
UNSCORED = {name: [NAN] * N for name in ("identified", "psnr_db", "ssim")}


def test_the_strongest_attack_identifies_most_not_the_one_of_highest_psnr():
    run = view(posterior=by_image(0, 0, 0, 1, psnr_db=30.0), closed_form=by_image(0, 0, 1, 1, psnr_db=10.0))
    assert run.strongest == "closed_form"
    assert run.compared() == "closed form identifies 50% of 4 scored samples, by image, hint or both"


def test_a_hint_that_identifies_counts_and_of_equals_the_image_decides_then_psnr_then_the_order():
    hints = {"hint_identified": [1.0] * N}
    assert view(closed_form=hints, posterior=by_image(1, 1, 1, 0)).strongest == "closed_form"
    assert view(closed_form=hints, posterior=by_image(1, 1, 1, 1)).strongest == "posterior"
    clearer = by_image(1, 1, 1, 1, psnr_db=21.0)
    assert view(posterior=by_image(1, 1, 1, 1), one_step=clearer).strongest == "one_step"
    assert view(posterior=clearer, one_step=clearer).strongest == "posterior"


@pytest.mark.parametrize("attack", [by_image(0, 0, 0, 0, psnr_db=1.0), UNSCORED, {}])
def test_a_guess_without_information_is_never_the_strongest_beside_an_attack(attack: dict):
    lucky = by_image(1, 1, 1, 1, psnr_db=40.0)
    guesses = {"mean_public": lucky, "random_public": [lucky, lucky], "live: mean_public": lucky}
    assert view(**guesses, posterior=attack).strongest == "posterior"


def test_where_nothing_but_guesses_is_there_that_is_said():
    run = view(mean_public=by_image(0, 0, 0, 1), random_public=by_image(0, 0, 0, 0))
    assert run.strongest == "mean_public"
    assert run.compared().endswith("; no attack but guesses was run")


def test_attacks_are_compared_on_the_samples_that_all_of_them_scored():
    live = by_image(0, 1, 1, 1)
    run = view(**{"live: posterior": live}, closed_form=by_image(1, 1, NAN, NAN), unsplit=UNSCORED)
    assert run.strengths["closed_form"].share == 1.0
    assert run.strengths["live: posterior"].share == 0.5  # of the first two samples, not three quarters of all
    assert math.isnan(run.strengths["unsplit"].share)
    assert run.strongest == "closed_form"
    assert run.compared() == (
        "closed form identifies 100% of 2 scored samples, by image, hint or both; not scored: UnSplit"
    )


def test_a_seed_that_was_not_scored_does_not_make_the_others_so():
    run = view(random_public=by_image(0, 0, 0, 0), posterior=[by_image(1, 1, 1, 1), UNSCORED])
    assert run.strengths["posterior"].share == 1.0


def test_without_any_score_no_attack_is_called_strongest():
    run = view(mean_public={}, posterior=UNSCORED)
    assert run.compared() == "not known: no attack was scored"
    assert not run.scored_samples.any()


def test_nan_is_neither_yes_nor_no():
    assert markup.verdict([1.0]) == "yes"
    assert markup.verdict([0.0]) == "no"
    assert markup.verdict([NAN]) == markup.verdict([NAN, NAN]) == "not scored"
    assert markup.verdict([1.0, NAN, 0.0]) == "1 of 2, 1 not scored"
    assert markup.verdict([1.0, 0.0]) == "1 of 2"
    assert markup.number(NAN, 1, " dB") == "not scored"


def test_bars_of_samples_that_were_not_scored_say_so_and_draw_none():
    run = view(mean_public=UNSCORED, posterior=by_image(NAN, 1, 1, 1) | {"psnr_db": [NAN, 20.0, 20.0, 20.0]})
    rows = comparison(run, 0)
    assert [row["attack"] for row in rows] == ["mean_public", "posterior"]
    html = markup.bars(rows, chosen="posterior", guess=NAN, ceiling=NAN)
    assert "nan" not in html
    assert 'class="bar"' not in html
    assert html.count("<td>not scored</td>") == 2
    assert "no information not scored" in html
    assert '<div class="bar"' in markup.bars(comparison(run, 1), chosen="posterior", guess=5.0, ceiling=30.0)
    assert all(math.isnan(value) for value in sample_scores(run, run.attempts["mean_public"][0], 0).values())


def test_a_setting_that_was_not_measured_is_listed_as_that():
    html = markup.settings([{"label": "half", "share": NAN, "ideal": NAN, "control": NAN, "chosen": False}])
    assert "nan" not in html
    assert html.count("not measured") == 3
    assert 'class="bar"' not in html
