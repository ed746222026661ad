import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base, encoded
from splitlab.diffusion.controlnet import image_hint_controlnet, latent_hint_controlnet, symsigmoid
from splitlab.split.attacks.latent_view import latent_view
from splitlab.split.client import (
    Client,
    attach_hint_encoder,
    client_message,
    client_send,
    detach_hint_encoder,
    epoch_batch,
    reference_message,
    sample_bytes,
    server_loss,
)
from splitlab.split.config import Defences
from splitlab.split.messages import Knowledge
from splitlab.split.wire import from_bytes

ALL = Defences(timestep_floor=600, symsigmoid=True, fixed_noise=0.3, half=True, hide_prompts=True)
SD15_LATENTS, SD15_TEXT = (4, 64, 64), (77, 768)


def client(base: Base, data: ImageSet, defences: Defences | None = None, *, number: int = 0, key: int = 0) -> Client:
    return Client(
        number,
        base,
        encoded(base, data),
        torch.arange(100, 100 + len(data)),
        defences or Defences(),
        Key.published(key),
    )


def test_without_defences_a_message_is_what_the_paper_says(base: Base, private: ImageSet):
    sent, truth = client_send(client(base, private), 3, 4)
    received, data, chosen = from_bytes(sent), encoded(base, private), truth.indices - 100
    assert (received.client, received.sequence) == (0, 3)
    assert torch.equal(received.need("timesteps"), truth.timesteps)
    assert torch.equal(received.need("noise"), truth.noise)
    noisy = base.pipeline.scheduler.add_noise(data.latents[chosen], truth.noise, truth.timesteps)
    torch.testing.assert_close(received.need("noisy_latents"), noisy)
    torch.testing.assert_close(received.need("smashed"), noisy + data.hint_latents[chosen])
    assert torch.equal(received.need("encoder_hidden_states"), data.text[chosen])


def test_with_all_defences_a_message_is_what_each_makes_of_it(base: Base, private: ImageSet):
    defended = client(base, private, ALL)
    sent, truth = client_send(defended, 3, 4)
    received, data, chosen = from_bytes(sent), encoded(base, private), truth.indices - 100
    noisy = base.noised(data.latents[chosen], truth.noise, truth.timesteps)
    assert torch.equal(received.need("noisy_latents"), noisy.half())
    smashed = symsigmoid(data.hint_latents[chosen] + noisy) + defended.fixed_noise
    assert torch.equal(received.need("smashed"), smashed.half())
    assert received.need("timesteps").dtype == torch.int16
    assert (truth.timesteps >= 600).all()


def test_hidden_prompts_are_not_on_the_wire_in_any_form(base: Base, private: ImageSet):
    shown, truth = client_send(client(base, private), 0, 4)
    hidden, _ = client_send(client(base, private, Defences(hide_prompts=True)), 0, 4)
    text = encoded(base, private).text[truth.indices - 100].contiguous()
    assert text[0].numpy().tobytes() in shown
    assert text[0].numpy().tobytes() not in hidden
    assert b"encoder_hidden_states" not in hidden
    assert from_bytes(hidden).encoder_hidden_states is None
    assert len(shown) - len(hidden) >= text.nbytes


def test_the_timestep_floor_is_respected_by_every_message(base: Base, private: ImageSet):
    floored = client(base, private, Defences(timestep_floor=900))
    drawn = torch.cat([from_bytes(client_send(floored, step, 12)[0]).need("timesteps") for step in range(30)])
    assert drawn.min() >= 900
    assert drawn.max() <= 999
    assert len(drawn.unique()) > 80  # 360 draws from 100 values leave 3 unseen on average


def test_fixed_noise_stays_between_messages_and_differs_between_clients(base: Base, private: ImageSet):
    def noise_of(number: int, step: int, key: int = 0) -> torch.Tensor:
        sender = client(base, private, Defences(fixed_noise=0.3), number=number, key=key)
        sent, truth = client_send(sender, step, 4)
        received = from_bytes(sent)
        hints = encoded(base, private).hint_latents[truth.indices - 100]
        return received.need("smashed") - received.need("noisy_latents") - hints

    first = noise_of(0, 0)
    torch.testing.assert_close(noise_of(0, 5), first, rtol=0, atol=1e-5)
    assert (noise_of(1, 0) - first).abs().mean() > 0.1
    assert (noise_of(0, 0, key=1) - first).abs().mean() > 0.1  # another run, another secret
    own = client(base, private, Defences(fixed_noise=0.3)).fixed_noise
    torch.testing.assert_close(first[0], own, rtol=0, atol=1e-5)
    assert client(base, private).fixed_noise is None


def test_noise_drawn_once_does_not_average_out(base: Base, private: ImageSet):
    defences = Defences(feature_noise=2.0, matched=True, hint_noise=1.0, per_image_noise=True)
    owner = client(base, private, defences)
    knowledge = Knowledge(base, "split", defences, private.size, private)
    found: list[list[torch.Tensor]] = [[], []]
    for step in (0, 5):  # a whole epoch of 12 samples each
        sent, truth = client_send(owner, step, 12)
        seen = from_bytes(sent)
        view, std = latent_view(seen, knowledge)
        order = truth.indices.argsort()
        found[0].append(view[order])
        found[1].append((seen.need("smashed") - seen.need("noisy_latents"))[order])
        assert std.unique().tolist() == pytest.approx([2.0], rel=1e-4)
    for first, second in found:
        torch.testing.assert_close(first, second, rtol=1e-2, atol=2e-2)  # other timesteps and labels, the same view
    left = found[0][0] - encoded(base, private).latents
    assert left.std().item() == pytest.approx(2.0, rel=0.1)  # 768 draws: standard error 2.6 %
    other = client(base, private, defences, key=1)
    assert not torch.equal(other.sent.latents, owner.sent.latents)
    part = Client(0, base, encoded(base, private)[3:6], torch.arange(103, 106), defences, Key.published(0))
    assert torch.equal(part.sent.latents, owner.sent.latents[3:6])  # a pure function of key and sample


def test_a_defence_does_not_change_what_is_drawn(base: Base, private: ImageSet):
    # so that runs with and without a defence are paired
    plain, defended = (client_send(client(base, private, d), 2, 4)[1] for d in (Defences(), Defences(symsigmoid=True)))
    assert torch.equal(plain.noise, defended.noise)
    assert torch.equal(plain.indices, defended.indices)


def test_clients_and_steps_draw_noise_of_their_own(base: Base, private: ImageSet):
    noises = [
        client_send(client(base, private, number=number, key=key), step, 4)[1].noise
        for number, key, step in [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)]
    ]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 4
    again = client_send(client(base, private), 0, 4)[1].noise
    assert torch.equal(again, noises[0])


@pytest.mark.parametrize("batch", [1, 4, 5, 12])
def test_batches_walk_through_whole_epochs(base: Base, private: ImageSet, batch: int):
    owner = client(base, private)
    seen = torch.cat([epoch_batch(owner, step, batch) for step in range(60 // batch)])
    epochs = seen[: len(seen) // 12 * 12].reshape(-1, 12)
    assert (epochs.sort(1).values == torch.arange(12)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)  # shuffled anew


def test_the_truth_names_places_in_the_whole_data_set(base: Base, private: ImageSet):
    owner = client(base, private)
    chosen = epoch_batch(owner, 0, 4)
    _, truth = client_message(owner, 0, chosen)
    assert torch.equal(truth.indices, chosen + 100)


def test_a_batch_larger_than_the_share_is_refused(base: Base, private: ImageSet):
    with pytest.raises(InputError, match="batch_size 13 exceeds client 2's 12 samples: lower it"):
        client_send(client(base, private, number=2), 0, 13)


def test_the_loss_without_prompts_is_that_with_zeros(base: Base, private: ImageSet):
    seen = from_bytes(client_send(client(base, private), 0, 4)[0])
    zeros = torch.zeros_like(seen.need("encoder_hidden_states"))
    with_zeros = type(seen)(**(vars(seen) | {"encoder_hidden_states": zeros}))
    model = latent_hint_controlnet(base)
    with torch.no_grad():
        hidden = server_loss(base, model, seen.without("encoder_hidden_states"))
        assert hidden == server_loss(base, model, with_zeros)
        assert hidden != server_loss(base, model, seen)


def test_the_server_needs_the_noise_and_says_so(base: Base, private: ImageSet):
    seen = from_bytes(client_send(client(base, private), 0, 4)[0]).without("noise")
    with pytest.raises(InputError, match="message 0 of client 0 carries no noise"):
        server_loss(base, latent_hint_controlnet(base), seen)


def test_gradients_reach_the_controlnet_only(base: Base, private: ImageSet):
    model = latent_hint_controlnet(base)
    server_loss(base, model, from_bytes(client_send(client(base, private), 0, 4)[0])).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(p.grad is None for part in (base.unet, base.vae, base.text_encoder) for p in part.parameters())


def test_cutting_and_joining_a_hint_encoder_is_the_identity(base: Base):
    model = image_hint_controlnet(base, seed=0)
    with torch.no_grad():
        model.controlnet_cond_embedding.conv_out.weight += 0.1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draw = tiny.draw()
    noisy, text = torch.randn(2, 4, 4, 4, generator=draw), torch.randn(2, 16, 16, generator=draw)
    hint, timesteps = torch.rand(2, 3, 16, 16, generator=draw), torch.tensor([3, 900])
    with torch.no_grad():
        whole = model(noisy, timesteps, text, hint).mid_block_res_sample
        encoder = detach_hint_encoder(model)
        assert not any(name.startswith("controlnet_cond_embedding") for name in model.state_dict())
        parts = model(noisy, timesteps, text, encoder(hint)).mid_block_res_sample
    assert torch.equal(whole, parts)
    joined = attach_hint_encoder(model, encoder).state_dict()
    assert set(joined) == set(before)
    assert all(torch.equal(joined[name], value) for name, value in before.items())


def test_the_reference_message_weighs_what_s1s_released_code_sends():
    # Golden: S1's released code, field by field, at Stable Diffusion 1.5's sizes, batch 1, in bytes:
    # U-Net first block 320 x 64 x 64 fp32, smashed fp16, noise fp32, timestep int64, text 77 x 768 fp32.
    expected = {
        "unet_first_block": 5_242_880,
        "smashed": 32_768,
        "noise": 65_536,
        "timesteps": 8,
        "encoder_hidden_states": 236_544,
    }
    message = reference_message(SD15_LATENTS, SD15_TEXT, 320)
    assert {name: tensor.nbytes for name, tensor in message.items()} == expected
    assert sum(expected.values()) == 5_577_736


def test_our_message_with_every_defence_is_a_fortieth_of_it():
    size = sample_bytes(SD15_LATENTS, SD15_TEXT, ALL)
    assert size <= 131_080
    # three latents of 4 x 64 x 64 in fp16 and a 16-bit timestep, worked out by hand
    assert size == 3 * 4 * 64 * 64 * 2 + 2
    assert 5_577_736 / size > 40


def test_bytes_per_sample_are_those_of_a_real_message(base: Base, private: ImageSet):
    for defences in (Defences(), Defences(half=True), Defences(hide_prompts=True), ALL):
        received = from_bytes(client_send(client(base, private, defences), 0, 4)[0])
        payload = sum(tensor.nbytes for tensor in received.tensors.values())
        assert payload == 4 * sample_bytes(base.latent_shape(16), base.text_shape, defences)
