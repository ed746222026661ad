"""Attacks on recorded messages of the shipped base model: they reach what they should, and nothing from noise."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import shipped, tiny

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, Encoded, encoded
from splitlab.diffusion.controlnet import low_frequencies, symsigmoid
from splitlab.split.artefacts import load_reconstruction
from splitlab.split.attacks import ATTACKS, NO_INFORMATION
from splitlab.split.attacks.closed_form import estimate_fixed_noise, hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view, matching_timesteps
from splitlab.split.config import Adversary, AttackSpec, Defences, TrainConfig
from splitlab.split.schemes import make_scheme
from splitlab.split.server import attack_all, attack_and_save, attack_transcript, run_attack
from splitlab.split.train import make_clients
from splitlab.split.wire import Header, Transcript, from_bytes

S1 = Defences(timestep_floor=200, symsigmoid=True, fixed_noise=0.5, half=True, hide_prompts=True)
QUICK = {
    "inverse_network": {"steps": 20, "width": 16, "n_blocks": 2},
    "adaptive_network": {"steps": 20, "width": 16, "n_blocks": 2, "pool": 256},
    "likelihood": {"steps": 4},
    "prompt_guess": {"steps": 10, "batch": 8, "shortlist": 2, "draws": 1},
}
ELSEWHERE = {
    "unsplit": "a trained hint encoder",
    "hijacking": "a malicious server",
    "prompt_inversion": "encoder_hidden_states were sent",
    "unmixing": "key_mixing",
    "jigsaw": "patch_shuffle",
    "surrogate_posterior": "borrowed_colours",
}
"""Attacks on what S1's own messages do not have, and what that is: they refuse those, and have tests of their own."""

ON_S1 = [name for name in ATTACKS if name not in ELSEWHERE]
N_MESSAGES = 4

pytestmark = shipped.needs_shipped


record = functools.partial(shipped.record, n_messages=4, n_clients=2)
attacked = functools.partial(shipped.attack, n_public=600)
knowledge_of = functools.partial(shipped.knowledge_of, n_public=600)


@pytest.fixture(scope="module")
def public() -> ImageSet:
    return shipped.public(600)


@pytest.fixture(scope="module")
def victims() -> ImageSet:
    return shipped.victims()


def encoding(data: ImageSet) -> Encoded:
    return encoded(shipped.base(), data, cache=shipped.CACHE)


@pytest.mark.parametrize("defences", [Defences(), S1, replace(S1, timestep_floor=800)], ids=str)
def test_closed_form_reaches_the_vae_ceiling_whatever_s1_does(victims: ImageSet, defences: Defences) -> None:
    transcript, truth = record(defences)
    found = attacked("closed_form", transcript)
    images = victims.images[truth.indices]
    ceiling = shipped.ceiling(images)
    assert (shipped.psnr(found, truth) - ceiling).abs().max() < 0.5
    gallery_indices = metrics.draw_galleries(len(victims), truth.indices, 100, tiny.draw())
    assert metrics.identified(found.images, victims.images, gallery_indices).all()


def test_closed_form_is_exact_in_fp32(victims: ImageSet) -> None:
    transcript, truth = record(Defences())
    found = attacked("closed_form", transcript)
    data = encoding(victims)
    # 1 / sqrt(alphas_cumprod) amplifies float32 rounding by up to 15 at the last timestep.
    assert (found.images - shipped.base().decode(data.latents[truth.indices])).abs().max() < 1e-3
    assert found.hints is not None
    assert (found.hints - shipped.base().decode(data.hint_latents[truth.indices])).abs().max() < 1e-3


def test_closed_form_recovers_hints_through_activation_and_unknown_fixed_noise(
    public: ImageSet, victims: ImageSet
) -> None:
    transcript, truth = record(S1)
    found = attacked("closed_form", transcript)
    assert found.hints is not None
    wanted = victims.hints[truth.indices]
    mean_hint = public.hints.mean(0, keepdim=True).expand_as(wanted)
    gain = metrics.psnr_db(found.hints, wanted).mean() - metrics.psnr_db(mean_hint, wanted).mean()
    assert gain > 8.0  # 64 messages per client; with 256 the full runs reach the VAE's ceiling


def test_fixed_noise_is_estimated_from_messages_alone(public: ImageSet, victims: ImageSet) -> None:
    data = encoding(victims)
    generator = tiny.draw(1)
    noisy = torch.randn(data.latents.shape, generator=generator)
    secret = 0.5 * torch.randn(data.latents.shape[1:], generator=generator)
    smashed = symsigmoid(data.hint_latents + noisy) + secret
    hints = encoding(public).hint_latents
    found = estimate_fixed_noise(smashed, noisy, hints, symsigmoid=True, span=2.0)
    assert (found - secret).abs().median() < 5e-3
    unchanged = estimate_fixed_noise(smashed - secret, noisy, hints, symsigmoid=True, span=2.0)
    assert unchanged.abs().median() < 5e-3  # no noise, none found


def test_closed_form_without_the_label_recovers_the_hint_alone(victims: ImageSet) -> None:
    transcript, truth = record(Defences(symsigmoid=True))
    found = attacked("closed_form", transcript, ignore=("noise",))
    assert found.images is None
    assert found.hints is not None
    data = encoding(victims)
    assert (found.hints - shipped.base().decode(data.hint_latents[truth.indices])).abs().max() < 5e-2


def test_closed_form_needs_the_label_or_what_the_hint_went_into() -> None:
    transcript, _ = record(S1)
    with pytest.raises(InputError, match="carries no noise"):
        attacked("closed_form", transcript, ignore=("noise", "smashed"))


def test_one_step_denoising_beats_no_information_early_and_fades() -> None:
    transcript, truth = record(Defences())
    found = shipped.psnr(attacked("one_step", transcript), truth)
    guess = attacked("mean_public", transcript)
    early, late = truth.timesteps < 200, truth.timesteps >= 800
    assert found[early].mean() > shipped.psnr(guess, truth)[early].mean() + 8.0
    assert found[early].mean() > found[late].mean() + 8.0


@pytest.mark.slow
def test_inverse_network_learns_and_the_label_helps_it() -> None:
    transcript, truth = record(S1)
    found = {
        ignore: shipped.psnr(attacked("inverse_network", transcript, ignore=ignore, steps=120), truth)
        for ignore in (("noise",), ())
    }
    guess = shipped.psnr(attacked("mean_public", transcript), truth)
    assert found["noise",].mean() > guess.mean() + 2.0
    late = truth.timesteps >= 700
    assert found[()][late].mean() > found["noise",][late].mean() + 2.0


@pytest.mark.parametrize("attack", sorted(ELSEWHERE))
def test_attacks_on_something_else_refuse_s1s_messages(attack: str) -> None:
    transcript, _ = record(S1)
    with pytest.raises(InputError, match=ELSEWHERE[attack]):
        attacked(attack, transcript)


@pytest.mark.parametrize("attack", [name for name in ON_S1 if name not in NO_INFORMATION])
def test_pure_noise_in_place_of_the_observation_gives_nothing(victims: ImageSet, attack: str) -> None:
    transcript, truth = record(S1)
    noised = shipped.noised(transcript.observations)
    knowledge = knowledge_of(transcript)
    found = run_attack(attack, noised, knowledge, generator=tiny.draw(), options=QUICK.get(attack))
    if attack == "prompt_guess":  # it answers with prompts alone
        right = [prompt == victims.prompts[i] for prompt, i in zip(found.prompts, truth.indices.tolist(), strict=True)]
        assert len(right) == 128
        assert sum(right) <= 6
        return
    guess = run_attack("mean_public", noised, knowledge, generator=tiny.draw())
    assert shipped.psnr(found, truth).mean() < shipped.psnr(guess, truth).mean() + 0.5


def test_attacks_leave_their_input_alone_and_repeat_exactly(public: ImageSet, tmp_path: Path) -> None:
    transcript, _ = record(S1)
    before = [{k: v.clone() for k, v in o.tensors.items()} for o in transcript.observations]
    for attack in ON_S1:
        spec = AttackSpec(attack, options=QUICK.get(attack, {}))
        for folder in ("a", "b"):
            attack_and_save(
                transcript, spec, 0, shipped.base(), public, out=tmp_path / folder, cache=tmp_path / "cache"
            )
        first, second = ((tmp_path / folder / f"{attack}-0.safetensors").read_bytes() for folder in ("a", "b"))
        assert first == second, attack
    for observation, tensors in zip(transcript.observations, before, strict=True):
        assert all(torch.equal(observation.tensors[name], value) for name, value in tensors.items())


def test_attacks_in_parallel_leave_the_files_that_attacks_in_turn_leave(public: ImageSet, tmp_path: Path) -> None:
    transcript, _ = record(S1)
    specs = [AttackSpec("mean_public", seeds=1), AttackSpec("closed_form", seeds=1), AttackSpec("random_public")]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as those in parallel have
    try:
        for folder, workers in (("turn", 1), ("parallel", 2)):
            out, cache = tmp_path / folder, tmp_path / f"cache of {folder}"
            found = attack_all(transcript, specs, shipped.base(), public, out=out, cache=cache, workers=workers)
            assert list(found) == [
                (Adversary("mean_public"), 0),
                (Adversary("closed_form"), 0),
                *((Adversary("random_public"), seed) for seed in range(3)),
            ]
    finally:
        torch.set_num_threads(before)
    files = sorted((tmp_path / "turn").glob("*.safetensors"))
    assert len(files) == 5
    assert all(path.read_bytes() == (tmp_path / "parallel" / path.name).read_bytes() for path in files)
    assert len(list((tmp_path / "parallel").glob("*.timing.json"))) == 5


def test_saved_reconstructions_carry_their_threat_model(public: ImageSet, tmp_path: Path) -> None:
    transcript, _ = record(S1)
    spec = AttackSpec("one_step", seeds=1)
    attack_and_save(transcript, spec, 0, shipped.base(), public, out=tmp_path, cache=tmp_path)
    saved = load_reconstruction(tmp_path / "one_step-0.safetensors")
    assert saved.result.used == ("timesteps", "noisy_latents")
    assert dict(saved.threat_model)["receives"] == "timesteps, noisy_latents, smashed, noise"
    assert dict(saved.threat_model)["knows the defences"] == str(S1)
    guess = attack_and_save(
        transcript, AttackSpec("mean_public"), 0, shipped.base(), public, out=tmp_path, cache=tmp_path
    )
    assert guess.result.used == ()


def test_bad_calls_say_what_to_do(public: ImageSet, base: Base) -> None:
    transcript, _ = record(S1)
    with pytest.raises(InputError, match="no attack is called 'psychic'; there are mean_public"):
        attacked("psychic", transcript)
    with pytest.raises(InputError, match="stepz"):
        attacked("inverse_network", transcript, stepz=1)
    with pytest.raises(InputError, match="no such observation field"):
        attacked("closed_form", transcript, ignore=("gradient",))
    with pytest.raises(InputError, match="recorded with base model"):
        attack_transcript(transcript, attack="closed_form", base=base, public=public)
    with pytest.raises(InputError, match="the public data 16: give others"):
        attack_transcript(transcript, attack="closed_form", base=shipped.base(), public=tiny.small_set(4, size=16))
    empty = replace(transcript, observations=())
    with pytest.raises(InputError, match="no messages to attack"):
        attacked("closed_form", empty)


@pytest.mark.parametrize("defences", [Defences(), Defences(feature_noise=0.3, matched=True)], ids=str)
def test_the_u_shaped_split_leaks_its_noise_to_1e_4_and_its_images_with_it(
    victims: ImageSet, defences: Defences
) -> None:
    config = TrainConfig(scheme="u_shaped", defences=defences, batch_size=32, published_key=0)
    scheme = make_scheme(shipped.base(), config, make_clients(shipped.base(), victims, config), victims.hints)
    steps = [scheme.step(number, 1e-3) for number in range(2)]
    transcript = Transcript(
        Header("test", "shapes", "u_shaped", defences, victims.size, shipped.base().digest, 1),
        tuple(from_bytes(step.message or b"") for step in steps),
    )
    noise, indices = (torch.cat([getattr(s.truth, name) for s in steps]) for name in ("noise", "indices"))
    knowledge = knowledge_of(transcript)
    found = labelled(transcript.observations, knowledge).need("noise")
    assert (found - noise).norm() / noise.norm() <= 1e-4
    if not defences.feature_noise:
        solved = attacked("closed_form", transcript)
        images = victims.images[indices]
        ceiling = shipped.ceiling(images)
        assert (metrics.psnr_db(torch.as_tensor(solved.images), images).mean() - ceiling.mean()).abs() < 0.5
        assert solved.used == ("timesteps", "noisy_latents", "noise_pred", "noise_pred_gradient", "smashed")


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("label", [False, True])
def test_a_latent_view_is_latents_plus_gaussian_noise_of_the_stated_size(
    victims: ImageSet, matched: bool, label: bool
) -> None:
    defences = Defences(feature_noise=0.5, matched=matched)
    transcript, truth = record(defences)
    knowledge = knowledge_of(transcript)
    seen = labelled(transcript.observations, knowledge)
    view, std = latent_view(seen if label else seen.without("noise"), knowledge)
    clean = encoding(victims).latents[truth.indices]
    scaled = (view - clean) / std
    assert scaled.std().item() == pytest.approx(1.0, rel=0.02)  # 32,768 draws: standard error 0.4 %
    timesteps, alphas = matching_timesteps(std, knowledge)
    assert torch.equal(shipped.base().alphas_cumprod[timesteps], alphas.flatten())
    inside = (std > 0.1).flatten() & (std < 10).flatten()
    torch.testing.assert_close(((1 - alphas) / alphas).sqrt()[inside], std[inside], rtol=0.02, atol=0)


def test_an_attacker_can_be_denied_what_defences_are_on() -> None:
    transcript, _ = record(Defences(feature_noise=0.5, matched=True))
    knowledge = knowledge_of(transcript, ignore=("defences",))
    assert knowledge.defences == Defences()
    assert dict(knowledge.describe(transcript.observations, ()))["knows the defences"] == "no"


PROTECTED = Defences(timestep_floor=800, feature_noise=1.0, matched=True, hint_noise=1.0, coarse_hints=3)


@pytest.mark.parametrize("defences", [Defences(coarse_hints=3), Defences(coarse_hints=3, symsigmoid=True)], ids=str)
def test_what_coarse_hints_keep_is_solved_for(victims: ImageSet, defences: Defences) -> None:
    transcript, truth = record(defences)
    knowledge = knowledge_of(transcript)
    found = hint_latents(labelled(transcript.observations, knowledge), transcript.observations, knowledge)
    wanted = low_frequencies(encoding(victims).hint_latents[truth.indices], 3)
    assert (torch.as_tensor(found) - wanted).abs().max() < 1e-2
    assert wanted.abs().max() > 1


def test_noised_hints_are_guessed_from_public_ones_and_never_from_themselves(
    public: ImageSet, victims: ImageSet
) -> None:
    transcript, truth = record(PROTECTED)
    wanted = victims.hints[truth.indices]
    found = {
        name: attacked(name, transcript, **options)
        for name, options in (("closed_form", {}), ("posterior", {}), ("nearest_public", {}), ("mean_public", {}))
    }
    psnr_of = {name: metrics.psnr_db(torch.as_tensor(one.hints), wanted).mean().item() for name, one in found.items()}
    assert psnr_of["posterior"] > psnr_of["mean_public"] + 0.3
    assert psnr_of["posterior"] > psnr_of["closed_form"] + 2.0
    gallery_indices = metrics.draw_galleries(len(victims), truth.indices, 100, tiny.draw())
    hits = {n: metrics.identified(torch.as_tensor(o.hints), victims.hints, gallery_indices) for n, o in found.items()}
    names = {name: own.float().mean().item() for name, own in hits.items()}
    assert names["nearest_public"] > 0.08  # chance is 0.01, and 128 samples miss it by 0.01
    assert names["nearest_public"] > names["closed_form"]
    share = found["nearest_public"].objective
    assert max(share) < 0.9  # were a public sample among its own candidates, it would always be recognised
