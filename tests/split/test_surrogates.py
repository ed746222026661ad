from dataclasses import replace

import pytest
import torch
from guided import generate_guided
from matched_parts import asked_layout
from world import shipped, tiny

from splitlab import ROOT, Defences, TrainConfig, load
from splitlab.core.errors import InputError
from splitlab.core.seeds import Key
from splitlab.data.colours import are_shapes
from splitlab.diffusion.base import encoded
from splitlab.diffusion.controlnet import LatentHintControlNet, control_pipeline, generate, latent_hint_controlnet
from splitlab.diffusion.metrics import draw_galleries, iou, outline_mask
from splitlab.split.attacks.surrogate_posterior import same_image
from splitlab.split.client import client_send
from splitlab.split.defences import disguised
from splitlab.split.defences.borrowed_colours import LEAST_CONTRAST, borrowed_prompt, colours_of, discs, in_colours
from splitlab.split.defences.hint_layout_noise import laid_out, layout, rings, sent_layout
from splitlab.split.defences.random_symmetry import SYMMETRIES, every_turn
from splitlab.split.identification import identified_as_sent, identified_by_both
from splitlab.split.messages import Knowledge
from splitlab.split.server import run_attack
from splitlab.split.train import make_clients
from splitlab.split.wire import from_bytes

DISGUISE = Defences(feature_noise=1.0, matched=True, timestep_floor=800, borrowed_colours=True, hint_layout_noise=0.2)
DATA = tiny.small_set(40, size=32)


def draws(n, seed=0):
    return [tiny.draw(1000 * seed + i) for i in range(n)]


def test_a_ring_says_its_layout():
    numbers = torch.tensor([[0.5, 0.5, 0.5], [0.4, 0.6, 0.3], [0.55, 0.45, 0.7]])
    torch.testing.assert_close(layout(rings(numbers, 32)), numbers, atol=0.01, rtol=0)


def test_what_is_asked_for_without_noise_is_the_hints_own_disc():
    shown = sent_layout(asked_layout(DATA.hints, 0.2, control=1e9), 0.2)
    again = torch.stack([outline_mask(ring) for ring in rings(shown, 32)])
    own = torch.stack([outline_mask(hint) for hint in DATA.hints])
    assert iou(again, own).mean() > 0.9  # rings that the picture cuts off are taken for smaller ones


def test_the_noise_on_a_layout_has_the_size_it_says():
    hints = rings(torch.tensor([[0.5, 0.45, 0.3]]), 32).expand(2000, -1, -1, -1)  # hardly ever cut off by the border
    errors = sent_layout(laid_out(hints, 0.1, draws(2000)), 0.1) - layout(hints)
    assert errors.mean(0).abs().max() < 0.02  # a line has a width, which small rings read as extent
    torch.testing.assert_close(errors.std(0), torch.full((3,), 0.1), rtol=0.1, atol=0)


def test_borrowed_colours_keep_the_disc_and_nothing_else_of_the_image():
    prompts = [borrowed_prompt(draw) for draw in draws(len(DATA))]
    assert are_shapes(prompts)
    disc, ground = colours_of(prompts)
    assert (disc - ground).div(2).square().sum(1).sqrt().min() >= LEAST_CONTRAST - 1e-6
    new = in_colours(DATA.images, DATA.prompts, prompts)
    torch.testing.assert_close(discs(new, prompts), discs(DATA.images, DATA.prompts), atol=1e-4, rtol=0)
    torch.testing.assert_close(in_colours(DATA.images, DATA.prompts, DATA.prompts), DATA.images, atol=0.02, rtol=0)
    other = tiny.small_set(40, size=32, seed=1)  # the same places in other colours look alike
    swapped = in_colours(in_colours(DATA.images, DATA.prompts, other.prompts), other.prompts, prompts)
    torch.testing.assert_close(swapped, new, atol=1e-4, rtol=0)


def test_disguises_are_drawn_once_per_image_from_a_secret_key():
    one, again, other = (disguised(DATA, DISGUISE, key=Key.published(seed)) for seed in (1, 1, 2))
    assert one.digest == again.digest != other.digest
    assert one.prompts == again.prompts != other.prompts
    assert torch.equal(one.hints, again.hints)
    assert not torch.equal(one.hints, other.hints)
    assert torch.equal(disguised(DATA.subset(range(5)), DISGUISE, key=Key.published(1)).images, one.images[:5])


def test_guidance_one_asks_for_the_layout_whose_estimate_is_what_is_wanted():
    asked = layout(asked_layout(DATA.hints, 0.2, control=1.0))
    wanted = layout(DATA.hints)
    whole = (wanted[:, 2] > 0.2) & ((wanted[:, :2] - 0.5).abs().max(1).values + wanted[:, 2] / 2 < 0.45)
    torch.testing.assert_close(asked[whole], wanted[whole], atol=0.01, rtol=0)
    assert asked_layout(DATA.hints, 0.0, control=4.0) is DATA.hints


def test_the_eight_turns_of_a_picture_are_all_there_are():
    picture = torch.rand(1, 3, 4, 4, generator=tiny.draw())
    turns = every_turn(picture)
    assert len(turns) == SYMMETRIES
    assert len({tuple(one.flatten().tolist()) for one in turns}) == SYMMETRIES
    for one in turns:  # a group: turned once more, no new one comes about
        again = every_turn(one)
        assert all((turns == other).flatten(1).all(1).any() for other in again)


def test_image_and_hint_are_turned_alike_once_and_by_a_secret():
    defences = Defences(random_symmetry=True)
    sent, again, other = (disguised(DATA, defences, key=Key.published(seed)) for seed in (1, 1, 2))
    assert sent.prompts == DATA.prompts
    assert torch.equal(sent.images, again.images)
    assert not torch.equal(sent.images, other.images)
    images, hints = every_turn(DATA.images), every_turn(DATA.hints)
    used = set()
    for i in range(len(DATA)):
        alike = [
            by
            for by in range(SYMMETRIES)
            if torch.equal(images[by, i], sent.images[i]) and torch.equal(hints[by, i], sent.hints[i])
        ]
        assert alike
        used |= set(alike)
    assert used == set(range(SYMMETRIES))


def test_turned_samples_are_recognised_in_whatever_turn():
    defences = Defences(borrowed_colours=True, random_symmetry=True)
    sent = disguised(DATA, defences, key=Key.published(1))
    gallery_indices = draw_galleries(len(DATA), torch.arange(len(DATA)), 20, tiny.draw())
    known = identified_as_sent(sent.images, sent.hints, DATA, sent.prompts, gallery_indices, defences)
    assert set(known) == {"image", "hint", "both"}
    assert all(share.float().mean() > 0.9 for share in known.values())
    still = replace(defences, random_symmetry=False)
    assert identified_as_sent(None, sent.hints, DATA, sent.prompts, gallery_indices, still)["hint"].float().mean() < 0.5
    noise = torch.rand(DATA.images.shape, generator=tiny.draw()) * 2 - 1
    assert (
        identified_by_both(noise, noise, DATA.images, DATA.hints, gallery_indices, random_symmetry=True).float().mean()
        < 0.3
    )


def test_without_these_defences_nothing_changes():
    defences = Defences(feature_noise=1.0, matched=True, timestep_floor=800, hint_noise=1.0, hide_prompts=True)
    assert disguised(DATA, defences, key=Key.published(1)) is DATA
    assert str(defences) == "timestep_floor=800 feature_noise=1 matched hint_noise=1 hide_prompts"


def test_one_image_sent_twice_shows_the_same_layout(base):
    config = tiny.config(defences=DISGUISE, batch_size=4)
    (client,) = make_clients(base, tiny.small_set(4), config)
    found = []
    for step in range(2):
        message, truth = client_send(client, step, 4)
        seen = from_bytes(message)
        found.append((seen.need("smashed") - seen.need("noisy_latents"))[truth.indices.argsort()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hint_layout_noise": -0.1}, "hint_layout_noise is a standard deviation"),
     ({"hint_layout_noise": 0.1, "hint_noise": 1.0}, "protects the hint by itself"),
     ({"borrowed_colours": True, "hide_prompts": True}, "say nothing of the image")],
)  # fmt: skip
def test_contradictions_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Defences(**options)


def test_conventional_split_learning_is_refused():
    with pytest.raises(InputError, match="for schemes 'split', 'u_shaped'"):
        TrainConfig(scheme="split_gradients", defences=Defences(hint_layout_noise=0.1))
    with pytest.raises(InputError, match="random_symmetry"):
        TrainConfig(scheme="split_gradients", defences=Defences(random_symmetry=True))


def test_prompts_without_colours_are_refused():
    with pytest.raises(InputError, match="which say what to recolour"):
        disguised(replace(DATA, prompts=("a face",) * len(DATA)), Defences(borrowed_colours=True), key=Key.published(1))


def test_no_control_is_the_base_and_more_of_it_changes_more(base):

    model = latent_hint_controlnet(base).eval()
    for block in model.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight, std=0.1, generator=tiny.draw())
    data = tiny.small_set(3)
    pictures = {
        control: generate_guided(base, model, data.prompts, data.hints, control=control, generator=tiny.draw(), steps=4)
        for control in (0.0, 1.0, 3.0)
    }
    plain = base.pipeline(
        list(data.prompts), height=16, width=16, num_inference_steps=4, guidance_scale=2.0, generator=tiny.draw(),
        output_type="pt",
    ).images * 2 - 1  # fmt: skip
    torch.testing.assert_close(pictures[0.0], torch.as_tensor(plain), atol=1e-3, rtol=0)
    change = [(pictures[control] - pictures[0.0]).abs().mean() for control in (1.0, 3.0)]
    assert 0 < change[0] < change[1]


def test_guidance_one_without_text_guidance_is_the_pipeline(base):
    model = latent_hint_controlnet(base).eval()
    torch.nn.init.normal_(model.controlnet_mid_block.weight, std=0.1, generator=tiny.draw())
    data = tiny.small_set(2)
    ours = generate_guided(
        base, model, data.prompts, data.hints, control=1.0, generator=tiny.draw(), steps=4, guidance_scale=1.0
    )
    pipeline = control_pipeline(base, model)
    theirs = generate(pipeline, data.prompts, data.hints, generator=tiny.draw(), steps=4, guidance_scale=1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert isinstance(model, LatentHintControlNet)


@shipped.needs_shipped
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("noise", [0.02, 5.0])
def test_the_attacker_in_the_know_recognises_what_the_noise_leaves(noise, turned):
    base, private = shipped.base(), shipped.victims(64)
    defences = replace(DISGUISE, hint_layout_noise=noise, random_symmetry=turned)
    public = shipped.public(600)
    (client,) = make_clients(base, private, TrainConfig(defences=defences, batch_size=64, published_key=0))
    message, truth = client_send(client, 0, 64)
    knowledge = Knowledge(base, "split", defences, private.size, public)
    found = run_attack("surrogate_posterior", [from_bytes(message)], knowledge, generator=tiny.draw())
    gallery_indices = draw_galleries(64, truth.indices, 64, tiny.draw())
    prompts = disguised(private, defences, key=Key.published(0)).prompts
    sent = tuple(prompts[i] for i in truth.indices)
    known = identified_as_sent(found.images, found.hints, private, sent, gallery_indices, defences)
    share = known["hint"].float().mean()
    assert (share > (0.25 if turned else 0.5)) if noise < 1 else (share < 0.15)
    disc, ground = colours_of([prompts[i] for i in truth.indices])
    corner = torch.as_tensor(found.images)[:, :, 0, 0] - ground[..., 0, 0]
    assert corner.abs().max() < (disc - ground).abs().max()  # the borrowed colours are read off exactly


@shipped.needs_shipped
@pytest.mark.parametrize("once", [False, True])
def test_messages_of_one_disguise_are_put_together(once):
    base, private = shipped.base(), shipped.victims(64)
    defences = replace(DISGUISE, random_symmetry=True, feature_noise=3.0, timestep_floor=600, per_image_noise=once)
    (client,) = make_clients(base, private, TrainConfig(defences=defences, batch_size=32, published_key=0))
    sent = [client_send(client, step, 32) for step in range(24)]
    messages, truth = [from_bytes(message) for message, _ in sent], torch.cat([told.indices for _, told in sent])
    knowledge = Knowledge(base, "split", defences, 32, shipped.public(600))
    every = run_attack("surrogate_posterior", messages, knowledge, generator=tiny.draw(), options={"sharpness": 1.0})
    first = run_attack(
        "surrogate_posterior", messages[:2], knowledge, generator=tiny.draw(), options={"sharpness": 1.0}
    )
    images, alone = torch.as_tensor(every.images), torch.as_tensor(first.images)
    for index in range(64):
        assert torch.equal(*images[(truth == index).nonzero()[:2, 0]])
    prompts = disguised(private, defences, key=Key.published(0)).prompts
    seen, shown = discs(images, [prompts[i] for i in truth]), discs(alone, [prompts[i] for i in truth[:64]])
    gallery = every_turn(discs(private.images, private.prompts))

    def error(found, indices):
        return (found[None] - gallery[:, indices]).square().mean((2, 3, 4)).min(0).values.mean().item()

    together, apart = error(seen, truth), error(shown, truth[:64])
    assert (0.99 * apart < together < 1.01 * apart) if once else (together < 0.95 * apart)


def test_messages_are_of_one_image_if_client_prompt_and_layout_are():
    shown = torch.tensor([[0.5, 0.5, 0.3], [0.501, 0.5, 0.3], [0.5, 0.5, 0.4], [0.5, 0.5, 0.3], [0.5, 0.5, 0.3]])
    prompts = ("red", "red", "red", "blue", "red")
    first, labels = same_image(shown, prompts, torch.tensor([0, 0, 0, 0, 1]))
    assert first.tolist() == [0, 2, 3, 4]
    assert labels.tolist() == [0, 0, 1, 2, 3]
    first, labels = same_image(shown, (), torch.zeros(5, dtype=torch.int64))
    assert first.tolist() == [0, 2]
    assert labels.tolist() == [0, 0, 1, 0, 0]


@shipped.needs_shipped
def test_turned_photographs_are_recovered_also_where_their_plain_encodings_are_cached(tmp_path):
    base, public = shipped.base(), load(ROOT / "data/public/photos.zip", limit=64)
    private = public.subset(range(16))  # so that somebody who weighs them in the right turn knows them
    encoded(base, public, cache=tmp_path)
    defences = Defences(feature_noise=0.1, matched=True, random_symmetry=True)
    (client,) = make_clients(
        base, private, TrainConfig(dataset="photos", defences=defences, batch_size=16, published_key=0)
    )
    message, truth = client_send(client, 0, 16)
    knowledge = Knowledge(base, "split", defences, private.size, public, cache=tmp_path)
    found = run_attack("surrogate_posterior", [from_bytes(message)], knowledge, generator=tiny.draw())
    assert found.images.shape == found.hints.shape == (16, 3, 32, 32)
    gallery_indices = draw_galleries(16, truth.indices, 16, tiny.draw())
    known = identified_as_sent(found.images, found.hints, private, (), gallery_indices, defences)
    assert known["image"].float().mean() > 0.8


@shipped.needs_shipped
def test_the_attack_on_surrogates_is_for_clients_that_send_them():
    base, public = shipped.base(), shipped.public(8)
    knowledge = Knowledge(base, "split", Defences(), 32, public)
    with pytest.raises(InputError, match="take nearest_public instead"):
        run_attack("surrogate_posterior", [], knowledge, generator=tiny.draw())
