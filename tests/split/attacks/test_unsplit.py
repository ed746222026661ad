"""UnSplit on a client of unknown weights: it gets at hints, says when there is nothing to get at, and is honest."""

from dataclasses import replace

import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base
from splitlab.split.attacks.unsplit import calibrated, hint_encoder, total_variation, unsplit
from splitlab.split.config import Defences
from splitlab.split.hijacker import Pilot
from splitlab.split.messages import Knowledge, Observation
from splitlab.split.server import run_attack

FAST = {"epochs": 2, "restarts": 1}


@pytest.fixture(scope="module")
def knowledge(base: Base) -> Knowledge:
    return Knowledge(base, "split_gradients", Defences(), tiny.SIZE, tiny.small_set(64, seed=5))


@pytest.fixture(scope="module")
def victims() -> ImageSet:
    return tiny.small_set(32, seed=6)


@pytest.fixture(scope="module")
def sent(knowledge: Knowledge, victims: ImageSet) -> list[Observation]:
    """Two messages of a client whose weights nobody told the attacker, trained until hints pass through it."""
    client, hints = hint_encoder(knowledge, seed=77), knowledge.public.hints
    pilot = Pilot(16, 4, sigmas=(1.0,))
    pilot.fit(hints)
    optimizer = torch.optim.Adam(client.parameters(), lr=2e-3)
    for _ in range(150):
        loss = torch.nn.functional.mse_loss(client((hints + 1.0) / 2.0), pilot(hints))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        smashed = client((victims.hints + 1.0) / 2.0)
    return [Observation(0, i, smashed=part) for i, part in enumerate((0.5 * smashed / smashed.std()).split(16))]


def correlation(hints: torch.Tensor, truth: torch.Tensor, mean: torch.Tensor) -> float:
    """Return the mean correlation of what distinguishes hints from the mean hint."""
    found, wanted = ((part - mean).flatten(1) for part in (hints, truth))
    return torch.cosine_similarity(found, wanted).mean().item()


def test_unsplit_finds_hints_of_a_client_it_does_not_know(
    knowledge: Knowledge, victims: ImageSet, sent: list[Observation]
) -> None:
    found = unsplit(sent, knowledge, generator=tiny.draw(), epochs=60, restarts=1, batch=16, calibrate=False)
    assert found.hints is not None
    assert found.hints.shape == victims.hints.shape
    assert found.hints.abs().max() <= 1
    assert (found.images, found.used, found.n_evals) == (None, ("smashed",), 60)
    assert found.objective[-1] < 0.2 * found.objective[0]
    mean = knowledge.public.hints.mean(0, keepdim=True)
    assert correlation(found.hints, victims.hints, mean) > 0.35  # 0.5 when written
    assert correlation(found.hints, victims.hints.roll(1, 0), mean) < 0.15  # its own hint, no other's
    blank = mean.expand_as(victims.hints)
    assert metrics.mse(found.hints, victims.hints).mean() < metrics.mse(blank, victims.hints).mean()


def test_pure_noise_gives_no_hints(knowledge: Knowledge, victims: ImageSet) -> None:
    noise = Observation(0, 0, smashed=torch.randn(32, 16, 4, 4, generator=tiny.draw(3)))
    found = unsplit([noise], knowledge, generator=tiny.draw(), epochs=20, restarts=1, calibrate=False)
    mean = knowledge.public.hints.mean(0, keepdim=True)
    assert abs(correlation(found.hints, victims.hints, mean)) < 0.15
    blank = metrics.mse(mean.expand_as(victims.hints), victims.hints).mean()
    assert metrics.mse(found.hints, victims.hints).mean() > 0.95 * blank


def test_it_repeats_tells_of_progress_and_leaves_its_input(knowledge: Knowledge, sent: list[Observation]) -> None:
    before = [observation.need("smashed").clone() for observation in sent]
    told: list[tuple[str, int, int]] = []
    first, second = (
        unsplit(sent, knowledge, generator=tiny.draw(), callback=lambda *now: told.append(now[:3]), epochs=2)
        for _ in range(2)
    )
    assert torch.equal(first.hints, second.hints)
    assert told[:4] == [("unsplit", i, 4) for i in (1, 2, 3, 4)]
    assert all(torch.equal(kept, o.need("smashed")) for kept, o in zip(before, sent, strict=True))


def test_the_restart_of_the_smallest_misfit_is_kept(knowledge: Knowledge, sent: list[Observation]) -> None:
    misfits: list[float] = []
    found = unsplit(sent, knowledge, generator=tiny.draw(), callback=lambda *now: misfits.append(now[3]), epochs=3)
    assert found.objective[-1] == min(misfits[2], misfits[5])


@pytest.mark.parametrize("zeros", [slice(None), slice(0, 1)])
def test_messages_of_an_untrained_client_are_refused(knowledge: Knowledge, zeros: slice) -> None:
    smashed = torch.randn(4, 16, 4, 4, generator=tiny.draw())
    smashed[zeros] = 0.0
    with pytest.raises(InputError, match=r"all zero in \d of 4 samples.*record_from"):
        unsplit([Observation(0, 0, smashed=smashed)], knowledge, generator=tiny.draw(), **FAST)


def test_bad_calls_say_what_to_do(knowledge: Knowledge, sent: list[Observation]) -> None:
    with pytest.raises(InputError, match="scheme 'split' has none"):
        unsplit(sent, replace(knowledge, scheme="split"), generator=tiny.draw(), **FAST)
    lacking = [Observation(0, 0, timesteps=torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(InputError, match="carries no smashed"):
        unsplit(lacking, knowledge, generator=tiny.draw(), **FAST)
    with pytest.raises(InputError, match="no messages"):
        unsplit([], knowledge, generator=tiny.draw(), **FAST)
    with pytest.raises(InputError, match="restarts must be 1 or more"):
        run_attack("unsplit", sent, knowledge, generator=tiny.draw(), options={"restarts": 0})


def test_coloured_hints_are_searched_in_colour(knowledge: Knowledge, sent: list[Observation]) -> None:
    public = knowledge.public
    coloured = replace(public, hints=public.hints * torch.tensor([1.0, 0.5, 0.2]).view(1, 3, 1, 1))
    grey = unsplit(sent, knowledge, generator=tiny.draw(), **FAST).hints
    found = unsplit(sent, replace(knowledge, public=coloured), generator=tiny.draw(), **FAST).hints
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert not torch.equal(found[:, 0], found[:, 1])


def test_calibrated_hints_have_public_brightness_in_the_order_found(
    knowledge: Knowledge, victims: ImageSet, sent: list[Observation]
) -> None:
    one = knowledge.public.hints[:, :1]
    shuffled = one.flatten()[torch.randperm(one.numel(), generator=tiny.draw())].view_as(one).expand(-1, 3, -1, -1)
    assert torch.equal(calibrated(shuffled * 0.01 + 0.3, knowledge.public.hints), shuffled)
    faint, clear = (
        unsplit(sent, knowledge, generator=tiny.draw(), calibrate=calibrate, **FAST).hints
        for calibrate in (False, True)
    )
    assert torch.equal(clear, calibrated(faint, knowledge.public.hints))


def test_total_variation_of_a_step() -> None:
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1.0
    assert total_variation(step).item() == pytest.approx(4 / 12)  # 4 of the 12 horizontal neighbours differ by 1
