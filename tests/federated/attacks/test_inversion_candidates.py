"""Whoever holds the candidates names the sender of a clipped share; enough noise, and nothing less, prevents it."""

import pytest
import torch
from torch import Tensor
from world import tiny

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.federated.attacks.candidates import candidate_shares, flattened, likeliest, log_likelihoods
from splitlab.federated.private_client import private_update
from splitlab.federated.update import UpdateTruth
from splitlab.privacy.mechanisms import add_noise

BOUND, K = 1e-3, 12


@pytest.fixture(scope="module")
def everyone(base: Base) -> tuple[Tensor, Tensor]:
    """Latents and texts of the candidates."""
    return torch.rand((K, 4, 4, 4), generator=tiny.draw()) * 2 - 1, base.encode_prompts(tiny.PROMPTS[:K])


def share(base: Base, everyone: tuple[Tensor, Tensor], index: int, *, sigma: float = 0.0, seed: int = 0) -> Tensor:
    clean, text = (value[index : index + 1] for value in everyone)
    truth = UpdateTruth(clean, torch.tensor([300]), noise()[None], text)
    settings = {"alphas_cumprod": base.alphas_cumprod, "max_grad_norm": BOUND, "noise_multiplier": sigma}
    return flattened(private_update(base.unet, truth, generator=tiny.draw(seed), from_block=1, **settings))


def noise() -> Tensor:
    return torch.randn((4, 4, 4), generator=tiny.draw(7))


def known(base: Base, everyone: tuple[Tensor, Tensor], **options: int) -> Tensor:
    settings = {"alphas_cumprod": base.alphas_cumprod, "max_grad_norm": BOUND, "from_block": 1} | options
    return candidate_shares(base.unet, *everyone, timestep=300, noise=noise(), **settings)


def test_candidates_share_what_a_client_shares_and_the_model_stays(base: Base, everyone):
    """Two ways: all candidates in chunks here, one client at a time in `private_update`."""
    before = [p.clone() for p in base.unet.parameters()]
    rows = known(base, everyone, physical_batch=5)
    for index in (0, 7, K - 1):
        torch.testing.assert_close(rows[index], share(base, everyone, index), rtol=1e-4, atol=1e-9)
    assert (rows.double().norm(dim=1) <= BOUND * (1 + 1e-6)).all()
    assert all(torch.equal(a, b) for a, b in zip(before, base.unet.parameters(), strict=True))


def test_without_noise_every_sender_is_named_and_with_much_nobody(base: Base, everyone):
    rows = known(base, everyone)
    bare = torch.stack([share(base, everyone, i) for i in range(K)])
    for sigma, least, most in ((0.0, K, K), (0.02, K - 2, K), (300.0, 0, K // 2)):
        shares = add_noise({"all": bare}, std=sigma * BOUND, generator=tiny.draw())["all"]
        found = likeliest(log_likelihoods(shares, rows, std=sigma * BOUND))
        assert least <= int((found == torch.arange(K)).sum()) <= most


def test_the_likelihood_is_the_gaussians(base: Base, everyone):
    """Differences between candidates equal those of torch's own normal distribution."""
    rows, std = known(base, everyone).double(), 0.1 * BOUND
    seen = share(base, everyone, 3, sigma=0.1).double()
    wanted = torch.distributions.Normal(rows, std).log_prob(seen).sum(1)
    found = log_likelihoods(seen[None], rows, std=std)[0]
    torch.testing.assert_close(found - found[0], wanted - wanted[0], rtol=1e-6, atol=1e-6)


def test_more_shares_of_one_client_tell_more(base: Base, everyone):
    bare = share(base, everyone, 5).expand(64, -1)
    shares = add_noise({"all": bare}, std=BOUND, generator=tiny.draw())["all"]
    scores = log_likelihoods(shares, known(base, everyone), std=BOUND)
    assert int(likeliest(scores.sum(0, keepdim=True))) == 5
    assert (likeliest(scores) == 5).sum() < 60


def test_equal_candidates_are_no_identification(base: Base, everyone):
    clean, text = everyone
    twins = (torch.cat([clean[:1], clean]), torch.cat([text[:1], text]))
    scores = log_likelihoods(share(base, everyone, 0)[None], known(base, twins), std=0.0)
    assert int(likeliest(scores)) == -1


def test_shares_of_another_trained_set_are_refused(base: Base, everyone):
    with pytest.raises(InputError, match="same trainable"):
        log_likelihoods(share(base, everyone, 0)[None], known(base, everyone, from_block=0), std=1.0)
