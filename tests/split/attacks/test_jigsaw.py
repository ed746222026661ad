"""Patch shuffling undone: the permutation comes back, fixed or fresh; nothing comes back from noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from world import shipped, tiny

from splitlab.core.errors import InputError
from splitlab.diffusion import metrics
from splitlab.diffusion.base import encoded
from splitlab.split.attacks.jigsaw import place_by_moments
from splitlab.split.config import Defences
from splitlab.split.defences.keys import from_patches, to_patches
from splitlab.split.server import attack_transcript

FIXED = Defences(patch_shuffle=2)
FRESH = replace(FIXED, fresh_keys=True)
QUICK = {"steps": 150, "width": 48, "n_layers": 2}
N_MESSAGES = 4

pytestmark = shipped.needs_shipped


def mean_psnr(images: torch.Tensor | None, truth: torch.Tensor) -> float:
    assert images is not None
    return float(metrics.psnr_db(images, truth).mean())


@pytest.mark.parametrize("side", [1, 2])
def test_one_permutation_is_found_exactly(side: int) -> None:
    data, known = (encoded(shipped.base(), d, cache=shipped.CACHE) for d in (shipped.victims(), shipped.public()))
    patches = to_patches(torch.cat([data.latents, data.hint_latents], 1), side)
    shuffle = torch.randperm(patches.shape[1], generator=tiny.draw(5))
    public_patches = to_patches(torch.cat([known.latents, known.hint_latents], 1), side)
    order, _ = place_by_moments(patches[:, shuffle], public_patches)
    assert torch.equal(shuffle[order], torch.arange(len(shuffle)))
    untouched, _ = place_by_moments(patches, public_patches)
    assert torch.equal(untouched, torch.arange(len(shuffle)))


@pytest.mark.parametrize(
    "defences",
    [
        FIXED,
        replace(FIXED, symsigmoid=True, fixed_noise=0.1, half=True, timestep_floor=200, hide_prompts=True),
        replace(FIXED, patch_shuffle=1),
    ],
    ids=str,
)
def test_a_fixed_permutation_protects_nothing(defences: Defences) -> None:
    transcript, truth = shipped.record(defences, n_messages=N_MESSAGES, n_clients=2)
    found = shipped.attack("jigsaw", transcript)
    images, hints = shipped.victims().images[truth.indices], shipped.victims().hints[truth.indices]
    assert mean_psnr(found.images, images) > shipped.ceiling(images).mean() - 0.5
    guess = shipped.attack("mean_public", transcript)
    assert mean_psnr(found.hints, hints) > mean_psnr(guess.hints, hints) + 8.0


def test_fresh_permutations_are_learned_from_public_data() -> None:
    transcript, truth = shipped.record(FRESH, n_messages=N_MESSAGES)
    found, guess, naive = (
        shipped.attack(name, transcript, **options)
        for name, options in (("jigsaw", QUICK), ("mean_public", {}), ("closed_form", {}))
    )
    assert found.objective[-1] < 0.5 * found.objective[0]
    images = shipped.victims().images[truth.indices]
    reached = mean_psnr(found.images, images)
    assert reached > max(mean_psnr(guess.images, images), mean_psnr(naive.images, images)) + 3.0


@pytest.mark.parametrize("defences", [FIXED, FRESH], ids=str)
def test_noise_gives_nothing_and_runs_repeat_and_inputs_stay(defences: Defences) -> None:
    options = {**QUICK, "steps": 10} if defences.fresh_keys else {}
    assert shipped.gain_from_pure_noise("jigsaw", defences, **options) < 0.5
    shipped.check_repeats_and_leaves_input("jigsaw", defences, **options)


def test_refusals_say_why() -> None:
    transcript, _ = shipped.record(FIXED, n_messages=N_MESSAGES)
    run: dict[str, Any] = {"attack": "jigsaw", "base": shipped.base(), "public": shipped.public()}
    with pytest.raises(InputError, match="patch_shuffle, which is not on here: use closed_form"):
        attack_transcript(transcript, **run, ignore=("defences",))
    with pytest.raises(InputError, match="carries no noise"):
        attack_transcript(transcript, **run, ignore=("noise",))
    both = replace(transcript, header=replace(transcript.header, defences=replace(FIXED, key_mixing=16)))
    with pytest.raises(InputError, match="cannot undo key_mixing"):
        attack_transcript(both, **run)


def test_putting_patches_in_order_undoes_the_shuffle() -> None:
    maps = torch.randn(3, 4, 8, 8, generator=tiny.draw())
    order = torch.stack([torch.randperm(16, generator=tiny.draw(i)) for i in range(3)])
    assert torch.equal(
        from_patches(to_patches(from_patches(to_patches(maps, 2), order, 2), 2), order.argsort(1), 2), maps
    )
