"""Attacks on recorded messages of the shipped base model: they reach what they should, and nothing from noise."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.data.image_set import ImageSet, load
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, encoded, load_base
from splitlab.diffusion.controlnet import low_frequencies, symsigmoid
from splitlab.split.artefacts import load_reconstruction
from splitlab.split.attacks import ATTACKS, NO_INFORMATION
from splitlab.split.attacks.closed_form import estimate_fixed_noise, hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view, matching_timesteps
from splitlab.split.client import client_send
from splitlab.split.config import AttackSpec, Defences, TrainConfig
from splitlab.split.messages import Truth
from splitlab.split.schemes import make_scheme
from splitlab.split.server import attack_all, attack_and_save, attack_transcript, make_knowledge, run_attack
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

pytestmark = pytest.mark.skipif(
    not (ROOT / "models/base/model_index.json").exists() or not (ROOT / "data/public").exists(),
    reason="the shipped base model or data are missing; `make data` pulls them",
)


@pytest.fixture(scope="module")
def shipped() -> Base:
    return load_base(ROOT / "models/base")


@pytest.fixture(scope="module")
def public() -> ImageSet:
    return load(ROOT / "data/public/shapes.zip", limit=600)


@pytest.fixture(scope="module")
def victims() -> ImageSet:
    return load(ROOT / "data/private/shapes.zip", limit=128)


def record(base: Base, victims: ImageSet, defences: Defences, n_clients: int = 2) -> tuple[Transcript, Truth]:
    config = TrainConfig(defences=defences, n_clients=n_clients, published_key=0)
    clients = make_clients(base, victims, config)
    sent = [client_send(clients[i % n_clients], i // n_clients, 32) for i in range(N_MESSAGES)]
    header = Header("test", "shapes", "split", defences, victims.size, base.digest, n_clients)
    truths = [truth for _, truth in sent]
    columns = {name: torch.cat([getattr(t, name) for t in truths]) for name in ("indices", "timesteps", "noise")}
    return Transcript(header, tuple(from_bytes(message) for message, _ in sent)), Truth(**columns)


def psnr(images: torch.Tensor, victims: ImageSet, truth: Truth) -> torch.Tensor:
    return metrics.psnr_db(images, victims.images[truth.indices])


@pytest.mark.parametrize("defences", [Defences(), S1, replace(S1, timestep_floor=800)], ids=str)
def test_closed_form_reaches_the_vae_ceiling_whatever_s1_does(
    shipped: Base, public: ImageSet, victims: ImageSet, defences: Defences
) -> None:
    transcript, truth = record(shipped, victims, defences)
    found = attack_transcript(transcript, attack="closed_form", base=shipped, public=public)
    images = victims.images[truth.indices]
    ceiling = metrics.psnr_db(shipped.decode(shipped.encode(images)), images)
    assert (psnr(found.images, victims, truth) - ceiling).abs().max() < 0.5
    gallery_indices = metrics.draw_galleries(len(victims), truth.indices, 100, tiny.draw())
    assert metrics.identified(found.images, victims.images, gallery_indices).all()


def test_closed_form_is_exact_in_fp32(shipped: Base, public: ImageSet, victims: ImageSet) -> None:
    transcript, truth = record(shipped, victims, Defences())
    found = attack_transcript(transcript, attack="closed_form", base=shipped, public=public)
    data = encoded(shipped, victims)
    # 1 / sqrt(alphas_cumprod) amplifies float32 rounding by up to 15 at the last timestep.
    assert (found.images - shipped.decode(data.latents[truth.indices])).abs().max() < 1e-3
    assert found.hints is not None
    assert (found.hints - shipped.decode(data.hint_latents[truth.indices])).abs().max() < 1e-3


def test_closed_form_recovers_hints_through_activation_and_unknown_fixed_noise(
    shipped: Base, public: ImageSet, victims: ImageSet
) -> None:
    transcript, truth = record(shipped, victims, S1)
    found = attack_transcript(transcript, attack="closed_form", base=shipped, public=public)
    assert found.hints is not None
    wanted = victims.hints[truth.indices]
    mean_hint = public.hints.mean(0, keepdim=True).expand_as(wanted)
    gain = metrics.psnr_db(found.hints, wanted).mean() - metrics.psnr_db(mean_hint, wanted).mean()
    assert gain > 8.0  # 64 messages per client; with 256 the full runs reach the VAE's ceiling


def test_fixed_noise_is_estimated_from_messages_alone(shipped: Base, public: ImageSet, victims: ImageSet) -> None:
    data = encoded(shipped, victims)
    generator = tiny.draw(1)
    noisy = torch.randn(data.latents.shape, generator=generator)
    secret = 0.5 * torch.randn(data.latents.shape[1:], generator=generator)
    smashed = symsigmoid(data.hint_latents + noisy) + secret
    hints = encoded(shipped, public).hint_latents
    found = estimate_fixed_noise(smashed, noisy, hints, symsigmoid=True, span=2.0)
    assert (found - secret).abs().median() < 5e-3
    unchanged = estimate_fixed_noise(smashed - secret, noisy, hints, symsigmoid=True, span=2.0)
    assert unchanged.abs().median() < 5e-3  # no noise, none found


def test_closed_form_without_the_label_recovers_the_hint_alone(
    shipped: Base, public: ImageSet, victims: ImageSet
) -> None:
    transcript, truth = record(shipped, victims, Defences(symsigmoid=True))
    found = attack_transcript(transcript, attack="closed_form", base=shipped, public=public, ignore=("noise",))
    assert found.images is None
    assert found.hints is not None
    data = encoded(shipped, victims)
    assert (found.hints - shipped.decode(data.hint_latents[truth.indices])).abs().max() < 5e-2


def test_closed_form_needs_the_label_or_what_the_hint_went_into(
    shipped: Base, public: ImageSet, victims: ImageSet
) -> None:
    transcript, _ = record(shipped, victims, S1)
    with pytest.raises(InputError, match="carries no noise"):
        attack_transcript(transcript, attack="closed_form", base=shipped, public=public, ignore=("noise", "smashed"))


def test_one_step_denoising_beats_no_information_early_and_fades(
    shipped: Base, public: ImageSet, victims: ImageSet
) -> None:
    transcript, truth = record(shipped, victims, Defences())
    found = psnr(attack_transcript(transcript, attack="one_step", base=shipped, public=public).images, victims, truth)
    guess = attack_transcript(transcript, attack="mean_public", base=shipped, public=public)
    early, late = truth.timesteps < 200, truth.timesteps >= 800
    assert found[early].mean() > psnr(guess.images, victims, truth)[early].mean() + 8.0
    assert found[early].mean() > found[late].mean() + 8.0


@pytest.mark.slow
def test_inverse_network_learns_and_the_label_helps_it(shipped: Base, public: ImageSet, victims: ImageSet) -> None:
    transcript, truth = record(shipped, victims, S1)
    found = {
        ignore: psnr(
            attack_transcript(
                transcript, attack="inverse_network", base=shipped, public=public, ignore=ignore, options={"steps": 120}
            ).images,
            victims,
            truth,
        )
        for ignore in (("noise",), ())
    }
    guess = psnr(
        attack_transcript(transcript, attack="mean_public", base=shipped, public=public).images, victims, truth
    )
    assert found["noise",].mean() > guess.mean() + 2.0
    late = truth.timesteps >= 700
    assert found[()][late].mean() > found["noise",][late].mean() + 2.0


@pytest.mark.parametrize("attack", sorted(ELSEWHERE))
def test_attacks_on_something_else_refuse_s1s_messages(
    shipped: Base, public: ImageSet, victims: ImageSet, attack: str
) -> None:
    transcript, _ = record(shipped, victims, S1)
    with pytest.raises(InputError, match=ELSEWHERE[attack]):
        attack_transcript(transcript, attack=attack, base=shipped, public=public)


@pytest.mark.parametrize("attack", [name for name in ON_S1 if name not in NO_INFORMATION])
def test_pure_noise_in_place_of_the_observation_gives_nothing(
    shipped: Base, public: ImageSet, victims: ImageSet, attack: str
) -> None:
    transcript, truth = record(shipped, victims, S1)
    draw = tiny.draw(7)
    noised = tuple(
        o.map(lambda v: torch.randn(v.shape, generator=draw).to(v.dtype) if v.is_floating_point() else v)
        for o in transcript.observations
    )
    knowledge = make_knowledge(transcript, shipped, public)
    found = run_attack(attack, noised, knowledge, generator=tiny.draw(), options=QUICK.get(attack))
    if attack == "prompt_guess":  # it answers with prompts alone
        right = [prompt == victims.prompts[i] for prompt, i in zip(found.prompts, truth.indices.tolist(), strict=True)]
        assert len(right) == 128
        assert sum(right) <= 6
        return
    guess = run_attack("mean_public", noised, knowledge, generator=tiny.draw())
    assert psnr(found.images, victims, truth).mean() < psnr(guess.images, victims, truth).mean() + 0.5


def test_attacks_leave_their_input_alone_and_repeat_exactly(
    shipped: Base, public: ImageSet, victims: ImageSet, tmp_path: Path
) -> None:
    transcript, _ = record(shipped, victims, S1)
    before = [{k: v.clone() for k, v in o.tensors.items()} for o in transcript.observations]
    for attack in ON_S1:
        spec = AttackSpec(attack, options=QUICK.get(attack, {}))
        for folder in ("a", "b"):
            attack_and_save(transcript, spec, 0, shipped, public, out=tmp_path / folder, cache=tmp_path / "cache")
        first, second = ((tmp_path / folder / f"{attack}-0.safetensors").read_bytes() for folder in ("a", "b"))
        assert first == second, attack
    for observation, tensors in zip(transcript.observations, before, strict=True):
        assert all(torch.equal(observation.tensors[name], value) for name, value in tensors.items())


def test_attacks_in_parallel_leave_the_files_that_attacks_in_turn_leave(
    shipped: Base, public: ImageSet, victims: ImageSet, tmp_path: Path
) -> None:
    transcript, _ = record(shipped, victims, S1)
    specs = [AttackSpec("mean_public", seeds=1), AttackSpec("closed_form", seeds=1), AttackSpec("random_public")]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as those in parallel have
    try:
        for folder, workers in (("turn", 1), ("parallel", 2)):
            out, cache = tmp_path / folder, tmp_path / f"cache of {folder}"
            found = attack_all(transcript, specs, shipped, public, out=out, cache=cache, workers=workers)
            assert list(found) == [
                ("mean_public", 0),
                ("closed_form", 0),
                *(("random_public", seed) for seed in range(3)),
            ]
    finally:
        torch.set_num_threads(before)
    files = sorted((tmp_path / "turn").glob("*.safetensors"))
    assert len(files) == 5
    assert all(path.read_bytes() == (tmp_path / "parallel" / path.name).read_bytes() for path in files)
    assert len(list((tmp_path / "parallel").glob("*.timing.json"))) == 5


def test_saved_reconstructions_carry_their_threat_model(
    shipped: Base, public: ImageSet, victims: ImageSet, tmp_path: Path
) -> None:
    transcript, _ = record(shipped, victims, S1)
    spec = AttackSpec("one_step", seeds=1)
    attack_and_save(transcript, spec, 0, shipped, public, out=tmp_path, cache=tmp_path)
    saved = load_reconstruction(tmp_path / "one_step-0.safetensors")
    assert saved.knowledge == "timesteps + noisy_latents"
    assert dict(saved.threat_model)["receives"] == "timesteps, noisy_latents, smashed, noise"
    assert dict(saved.threat_model)["knows the defences"] == str(S1)
    guess = attack_and_save(transcript, AttackSpec("mean_public"), 0, shipped, public, out=tmp_path, cache=tmp_path)
    assert guess.knowledge == "nothing"


def test_bad_calls_say_what_to_do(shipped: Base, base: Base, public: ImageSet, victims: ImageSet) -> None:
    transcript, _ = record(shipped, victims, S1)
    with pytest.raises(InputError, match="no attack is called 'psychic'; there are mean_public"):
        attack_transcript(transcript, attack="psychic", base=shipped, public=public)
    with pytest.raises(InputError, match="stepz"):
        attack_transcript(transcript, attack="inverse_network", base=shipped, public=public, options={"stepz": 1})
    with pytest.raises(InputError, match="no such observation field"):
        attack_transcript(transcript, attack="closed_form", base=shipped, public=public, ignore=("gradient",))
    with pytest.raises(InputError, match="recorded with base model"):
        attack_transcript(transcript, attack="closed_form", base=base, public=public)
    with pytest.raises(InputError, match="the public data 16: give others"):
        attack_transcript(transcript, attack="closed_form", base=shipped, public=tiny.small_set(4, size=16))
    empty = replace(transcript, observations=())
    with pytest.raises(InputError, match="no messages to attack"):
        attack_transcript(empty, attack="closed_form", base=shipped, public=public)


@pytest.mark.parametrize("defences", [Defences(), Defences(feature_noise=0.3, matched=True)], ids=str)
def test_the_u_shaped_split_leaks_its_noise_to_1e_4_and_its_images_with_it(
    shipped: Base, public: ImageSet, victims: ImageSet, defences: Defences
) -> None:
    config = TrainConfig(scheme="u_shaped", defences=defences, batch_size=32, published_key=0)
    scheme = make_scheme(shipped, config, make_clients(shipped, victims, config), victims.hints)
    steps = [scheme.step(number, 1e-3) for number in range(2)]
    transcript = Transcript(
        Header("test", "shapes", "u_shaped", defences, victims.size, shipped.digest, 1),
        tuple(from_bytes(step.message or b"") for step in steps),
    )
    noise, indices = (torch.cat([getattr(s.truth, name) for s in steps]) for name in ("noise", "indices"))
    knowledge = make_knowledge(transcript, shipped, public)
    found = labelled(transcript.observations, knowledge).need("noise")
    assert (found - noise).norm() / noise.norm() <= 1e-4
    if not defences.feature_noise:
        solved = attack_transcript(transcript, attack="closed_form", base=shipped, public=public)
        images = victims.images[indices]
        ceiling = metrics.psnr_db(shipped.decode(shipped.encode(images)), images)
        assert (metrics.psnr_db(torch.as_tensor(solved.images), images).mean() - ceiling.mean()).abs() < 0.5
        assert solved.used == ("timesteps", "noisy_latents", "noise_pred", "noise_pred_gradient", "smashed")


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("label", [False, True])
def test_a_latent_view_is_latents_plus_gaussian_noise_of_the_stated_size(
    shipped: Base, public: ImageSet, victims: ImageSet, matched: bool, label: bool
) -> None:
    defences = Defences(feature_noise=0.5, matched=matched)
    transcript, truth = record(shipped, victims, defences)
    knowledge = make_knowledge(transcript, shipped, public)
    seen = labelled(transcript.observations, knowledge)
    view, std = latent_view(seen if label else seen.without("noise"), knowledge)
    clean = encoded(shipped, victims).latents[truth.indices]
    scaled = (view - clean) / std
    assert scaled.std().item() == pytest.approx(1.0, rel=0.02)  # 32,768 draws: standard error 0.4 %
    timesteps, alphas = matching_timesteps(std, knowledge)
    assert torch.equal(shipped.alphas_cumprod[timesteps], alphas.flatten())
    inside = (std > 0.1).flatten() & (std < 10).flatten()
    torch.testing.assert_close(((1 - alphas) / alphas).sqrt()[inside], std[inside], rtol=0.02, atol=0)


def test_an_attacker_can_be_denied_what_defences_are_on(shipped: Base, public: ImageSet, victims: ImageSet) -> None:
    transcript, _ = record(shipped, victims, Defences(feature_noise=0.5, matched=True))
    knowledge = make_knowledge(transcript, shipped, public, ignore=("defences",))
    assert knowledge.defences == Defences()
    assert dict(knowledge.describe(transcript.observations, ()))["knows the defences"] == "no"


PROTECTED = Defences(timestep_floor=800, feature_noise=1.0, matched=True, hint_noise=1.0, coarse_hints=3)


@pytest.mark.parametrize("defences", [Defences(coarse_hints=3), Defences(coarse_hints=3, symsigmoid=True)], ids=str)
def test_what_coarse_hints_keep_is_solved_for(
    shipped: Base, public: ImageSet, victims: ImageSet, defences: Defences
) -> None:
    transcript, truth = record(shipped, victims, defences)
    knowledge = make_knowledge(transcript, shipped, public)
    found = hint_latents(labelled(transcript.observations, knowledge), transcript.observations, knowledge)
    wanted = low_frequencies(encoded(shipped, victims).hint_latents[truth.indices], 3)
    assert (torch.as_tensor(found) - wanted).abs().max() < 1e-2
    assert wanted.abs().max() > 1


def test_noised_hints_are_guessed_from_public_ones_and_never_from_themselves(
    shipped: Base, public: ImageSet, victims: ImageSet
) -> None:
    transcript, truth = record(shipped, victims, PROTECTED)
    wanted = victims.hints[truth.indices]
    found = {
        name: attack_transcript(transcript, attack=name, base=shipped, public=public, options=options)
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
