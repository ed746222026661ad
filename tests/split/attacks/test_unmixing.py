"""Key mixing undone: sources come back under fixed and fresh keys; nothing comes back from noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from world import shipped, tiny

from splitlab.core.errors import InputError
from splitlab.diffusion import metrics
from splitlab.split.attacks.unmixing import fast_ica
from splitlab.split.config import Defences
from splitlab.split.defences.keys import mixing_key
from splitlab.split.messages import Reconstruction, Truth
from splitlab.split.server import attack_transcript

GROUP = 16
FIXED = Defences(key_mixing=GROUP)
N_MESSAGES = 4

pytestmark = shipped.needs_shipped


def matched_psnr(images: Tensor | None, truth: Tensor) -> float:
    """Mean PSNR, dB, under the best assignment within each group, the same for every attack."""
    assert images is not None
    values = []
    for found, wanted in zip(images.split(GROUP), truth.split(GROUP), strict=True):
        places, order = linear_sum_assignment(torch.cdist(wanted.flatten(1), found.flatten(1)).square().numpy())
        values.append(metrics.psnr_db(found[order], wanted[places]))
    return float(torch.cat(values).mean())


def measured(found: Reconstruction, truth: Truth) -> Tensor:
    return torch.tensor(matched_psnr(found.images, shipped.victims().images[truth.indices]))


def test_fast_ica_finds_the_key_up_to_the_order() -> None:
    draw = tiny.draw(3)
    sources = -torch.rand(5, 20_000, generator=draw).log() * torch.randn(5, 20_000, generator=draw).sign()
    key = mixing_key(5, draw)
    unmixer = fast_ica(key @ sources, draw)
    gains = unmixer @ key
    gains = gains / gains.abs().amax(1, keepdim=True)
    assert gains.abs().round().sum(0).tolist() == [1.0] * 5  # a permutation
    assert gains.abs().sort(1).values[:, :-1].max() < 0.05  # 20,000 samples: interference below 5 %


@pytest.mark.parametrize(
    ("defences", "n_clients", "gain_db"),
    [
        (FIXED, 1, 12.0),
        (replace(FIXED, symsigmoid=True, half=True, timestep_floor=200, hide_prompts=True), 2, 10.0),
        (replace(FIXED, fresh_keys=True), 1, 6.0),
    ],
    ids=str,
)
def test_sources_come_back(defences: Defences, n_clients: int, gain_db: float) -> None:
    transcript, truth = shipped.record(defences, n_messages=N_MESSAGES, n_clients=n_clients)
    found, guess, naive = (shipped.attack(name, transcript) for name in ("unmixing", "mean_public", "closed_form"))
    images, hints = shipped.victims().images[truth.indices], shipped.victims().hints[truth.indices]
    reached = matched_psnr(found.images, images)
    assert reached > matched_psnr(guess.images, images) + gain_db
    assert reached > matched_psnr(naive.images, images) + gain_db - 3.0
    assert matched_psnr(found.hints, hints) > matched_psnr(guess.hints, hints) + gain_db - 5.0


@pytest.mark.parametrize("fresh", [False, True])
def test_noise_gives_nothing_and_runs_repeat_and_inputs_stay(fresh: bool) -> None:
    defences = replace(FIXED, fresh_keys=fresh)
    assert shipped.gain_from_pure_noise("unmixing", defences, measure=measured) < 0.5
    shipped.check_repeats_and_leaves_input("unmixing", defences)


def test_refusals_say_why() -> None:
    transcript, _ = shipped.record(FIXED, n_messages=N_MESSAGES)
    run: dict[str, Any] = {"attack": "unmixing", "base": shipped.base(), "public": shipped.public()}
    with pytest.raises(InputError, match="key_mixing, which is not on here: use closed_form"):
        attack_transcript(transcript, **run, ignore=("defences",))
    with pytest.raises(InputError, match="carries no noise"):
        attack_transcript(transcript, **run, ignore=("noise",))
    both = replace(transcript, header=replace(transcript.header, defences=replace(FIXED, patch_shuffle=2)))
    with pytest.raises(InputError, match="cannot undo patch_shuffle"):
        attack_transcript(both, **run)
    cut = tuple(o.map(lambda v: v[:20]) for o in transcript.observations)
    with pytest.raises(InputError, match="has 20 samples, not whole groups of key_mixing 16"):
        attack_transcript(replace(transcript, observations=cut), **run)
