import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key, generator, source
from splitlab.privacy import draws

FIXED = Key.secret(bytes(range(32)))
"""A secret key that the tests know, so that their statistics do not vary."""


def fresh(*purpose: object) -> np.random.Generator:
    found = source(FIXED, *purpose)
    assert isinstance(found, np.random.Generator)
    return found


def test_torchs_generators_draw_what_torch_draws():
    def pair(*purpose: object) -> tuple[torch.Generator, torch.Generator]:
        return generator(*purpose), generator(*purpose)

    one, other = pair("a")
    assert torch.equal(draws.normal((3, 5), one), torch.randn(3, 5, generator=other))
    assert torch.equal(draws.uniform((7,), one), torch.rand(7, generator=other))
    assert torch.equal(draws.integers(2, 9, (7,), one), torch.randint(2, 9, (7,), generator=other))
    assert torch.equal(draws.permutation(9, one), torch.randperm(9, generator=other))
    value = torch.linspace(-1, 1, 6)
    assert torch.equal(draws.noised(value, 0.3, one), value + 0.3 * torch.randn(6, generator=other))
    one, other = pair("b")
    double = torch.randn(4, generator=other, dtype=torch.float64)
    assert torch.equal(draws.normal((4,), one, dtype=torch.float64), double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_draws_are_gaussian(dtype: torch.dtype):
    drawn = draws.normal((400, 500), fresh("normal"), dtype=dtype)
    assert (drawn.shape, drawn.dtype) == ((400, 500), dtype)
    values = drawn.double().flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.std() - 1) < 4 / (2 * len(values)) ** 0.5
    assert abs(stats.kurtosis(values)) < 4 * (24 / len(values)) ** 0.5  # of a sum of other than Gaussian draws: not 0


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (2, 0, 3), (3, 1)])
def test_any_shape_is_drawn(shape: tuple[int, ...]):
    for one in (fresh("shapes"), generator("shapes")):
        assert draws.normal(shape, one).shape == shape
        assert draws.noised(torch.zeros(shape), 1.0, one).shape == shape
        assert draws.uniform(shape, one).shape == shape
        assert draws.integers(0, 5, shape, one).shape == shape
    assert draws.permutation(0, fresh("none")).shape == (0,)


def test_draws_of_different_purposes_and_steps_are_independent():
    sources = [fresh("dp noise", step) for step in range(6)] + [fresh("dp draws", 0), source("x", FIXED.of_client(1))]
    drawn = torch.stack([draws.normal((20_000,), one, dtype=torch.float64) for one in sources])
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 5 / 20_000**0.5
    assert torch.corrcoef(drawn.square()).fill_diagonal_(0).abs().max() < 5 / 20_000**0.5
    together = (drawn > 0).long()
    cells = torch.bincount((together[:3].T * torch.tensor([1, 2, 4])).sum(1), minlength=8)
    assert stats.chisquare(cells.numpy()).pvalue > 0.01
    one = drawn[0]  # nor do draws depend on those before them
    assert abs(float(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1])) < 5 / 20_000**0.5


def test_uniform_draws_are_uniform_to_53_bits():
    drawn = draws.uniform((100_000,), fresh("uniform"), dtype=torch.float64)
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 0.01
    whole = drawn * 2.0**53
    assert torch.equal(whole, whole.round())
    assert 0.49 < (whole.long() % 2).double().mean() < 0.51  # the lowest bit is drawn as well
    single = draws.uniform((1_000_000,), fresh("single"))
    assert single.dtype == torch.float32
    assert single.max() < 1.0


def test_integers_and_orders_are_uniform():
    counts = torch.bincount(draws.integers(3, 10, (70_000,), fresh("integers")))[3:]
    assert (len(counts), int(counts.sum())) == (7, 70_000)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    orders = fresh("orders")
    drawn = [tuple(draws.permutation(4, orders).tolist()) for _ in range(12_000)]
    found = {order: drawn.count(order) for order in set(drawn)}
    assert len(found) == 24
    assert stats.chisquare(list(found.values())).pvalue > 0.01


def on_the_grid_of(value: float, released: torch.Tensor) -> float:
    """The share of outputs near 0 that are whole multiples of what float32 resolves at `value`."""
    near = released[released.abs() < 0.05].double() / float(np.spacing(np.float32(value)))
    assert len(near) > 1000
    return float((near == near.round()).double().mean())


def test_low_bits_do_not_tell_what_was_noised():
    """Noise that is rounded before it is added leaves a sum near 0 on the coarse grid of what it cancelled."""
    n, value = 2_000_000, 5.0
    clean = torch.full((n,), value)
    naive = clean + 5.0 * draws.normal((n,), fresh("naive"))
    assert on_the_grid_of(value, naive) == 1.0
    ours = draws.noised(clean, 5.0, fresh("ours"))
    assert ours.dtype == torch.float32
    assert on_the_grid_of(value, ours) < 0.3
    other = draws.noised(torch.zeros(n), 5.0, fresh("other"))
    assert on_the_grid_of(value, ours) == pytest.approx(on_the_grid_of(value, other), abs=0.03)


def test_noise_is_added_in_double_precision_with_a_width_per_entry():
    value, std = torch.zeros(2, 50_000), torch.tensor([[0.5], [2.0]])
    found = draws.noised(value, std, fresh("widths"))
    assert found.std(1).tolist() == pytest.approx([0.5, 2.0], rel=0.02)
    again = value.double() + std * draws.normal(value.shape, fresh("widths"), dtype=torch.float64)
    assert torch.equal(found, again.float())


def test_a_runs_secret_is_its_owners_alone_while_it_lasts(tmp_path: Path):
    state = tmp_path / "cache" / "dp-x.safetensors"
    before = os.umask(0o000)
    try:
        first = draws.run_key(state, None, bound_to="settings")
    finally:
        os.umask(before)
    path = tmp_path / "cache" / "dp-x.key"
    assert [p.name for p in path.parent.iterdir()] == ["dp-x.key"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert first.kind == "secret"
    assert draws.run_key(state, None, bound_to="settings") == first
    assert draws.run_key(state, None, bound_to="other settings") != first  # whose noise must not come again
    with path.open("rb") as file:
        entropy = file.read()
        assert entropy not in (first._secret, bytes(32))
        draws.end_run(state)
        file.seek(0)
        assert file.read() == bytes(32)  # overwritten in place, not only unlinked
    assert not list(path.parent.iterdir())
    assert draws.run_key(state, None, bound_to="settings") != first
    draws.end_run(state)
    draws.end_run(state)


def test_a_published_key_leaves_no_file(tmp_path: Path):
    assert draws.run_key(tmp_path / "dp-x.safetensors", 7, bound_to="settings") == Key.published(7)
    assert not list(tmp_path.iterdir())


def test_steps_whose_secret_is_gone_are_not_taken_again(tmp_path: Path):
    state, path = tmp_path / "dp-x.safetensors", tmp_path / "dp-x.key"
    state.write_bytes(b"steps")
    with pytest.raises(InputError, match=r"dp-x.key: missing; the steps that dp-x.safetensors holds drew from this"):
        draws.run_key(state, None, bound_to="settings")
    assert not path.exists()
    path.write_bytes(b"short")
    with pytest.raises(
        InputError, match=r"dp-x.key: 5 bytes, where a secret key has 32; put the run's own back, or move"
    ):
        draws.run_key(state, None, bound_to="settings")
    assert (path.read_bytes(), state.read_bytes()) == (b"short", b"steps")
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"dp-x.key: cannot be read .* it is this run's secret key"):
        draws.run_key(state, None, bound_to="settings")
    with pytest.raises(InputError, match=r"dp-x.key: cannot be written"):
        draws.end_run(state)
