import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.split.config import Defences
from splitlab.split.messages import Knowledge, Observation, senders, stack


def message(client: int = 0, sequence: int = 0, *, batch: int = 2, value: float = 1.0) -> Observation:
    latents = torch.full((batch, 4, 2, 2), value)
    return Observation(
        client, sequence, torch.arange(batch), latents, latents + 1, latents + 2, torch.zeros(batch, 3, 5)
    )


def test_without_drops_the_named_fields_and_no_other():
    left = message().without("noise", "timesteps")
    assert set(left.tensors) == {"noisy_latents", "smashed", "encoder_hidden_states"}
    assert torch.equal(left.need("smashed"), message().need("smashed"))


def test_without_refuses_a_field_that_does_not_exist():
    with pytest.raises(InputError, match=r"no such observation field: \['nosie'\]; fields: .*noise"):
        message().without("nosie")


def test_need_says_which_message_lacks_what():
    with pytest.raises(InputError, match="message 7 of client 3 carries no noise; it carries timesteps, noisy_latents"):
        message(3, 7).without("noise").need("noise")


def test_batch_size_of_a_message_and_of_an_empty_one():
    assert message(batch=5).batch_size == 5
    assert Observation(0, 0).batch_size == 0


def test_float_widens_what_fp16_narrowed():
    half = message().map(lambda t: t.half() if t.is_floating_point() else t.to(torch.int16))
    wide = half.float()
    assert wide.need("noise").dtype == torch.float32
    assert wide.need("timesteps").dtype == torch.int64
    assert torch.equal(wide.need("noise"), message().need("noise"))  # small integers are exact in fp16


def test_stack_keeps_the_order_of_arrival_and_senders_align():
    messages = [message(1, 0, value=1.0), message(0, 0, value=2.0, batch=3)]
    whole = stack(messages)
    assert whole.need("noisy_latents")[:, 0, 0, 0].tolist() == [1, 1, 2, 2, 2]
    assert senders(messages).tolist() == [1, 1, 0, 0, 0]
    assert (whole.client, whole.sequence) == (-1, -1)


def test_stack_refuses_messages_of_two_protocols_and_an_empty_transcript():
    with pytest.raises(InputError, match=r"message 4 of client 1 carries .* one protocol at a time"):
        stack([message(), message(1, 4).without("noise")])
    with pytest.raises(InputError, match="transcript is empty"):
        stack([])


def test_an_observation_cannot_be_changed():
    with pytest.raises(AttributeError):
        message().noise = None  # type: ignore[misc]


def test_knowledge_describes_the_threat_model(base: Base):
    knowledge = Knowledge(base, "split", Defences(half=True), 16, tiny.small_set(3), ignored=("noise",))
    rows = dict(knowledge.describe([message()], ("timesteps", "noisy_latents")))
    assert rows["receives"] == "timesteps, noisy_latents, smashed, noise, encoder_hidden_states"
    assert rows["uses of it"] == "timesteps, noisy_latents"
    assert rows["knows the defences"] == "half"
    assert rows["public images"] == "3 of 16x16 pixels"
    assert dict(knowledge.describe([message()], ()))["uses of it"] == "nothing"
