"""Split and federated clients whose draws are secret, as they are by default."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from message_audit import audit_message
from scipy import stats
from world import tiny
from world.interrupts import Interrupt, interrupted_at
from world.secrecy import ENTROPY, FIXED, equal, holders, tensors_below, traces

from splitlab.core.seeds import Key, source
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base, encoded
from splitlab.federated.defences import share_protected
from splitlab.federated.defences.bits import Quantise
from splitlab.federated.defences.dp_sgd import PerExample
from splitlab.federated.defences.noise import GaussianNoise
from splitlab.federated.defences.soteria import Soteria
from splitlab.federated.private_client import private_update
from splitlab.privacy import draws
from splitlab.privacy.accounting import SIMULATED, composed_mu
from splitlab.split.client import Client, client_send
from splitlab.split.config import Defences, TrainConfig
from splitlab.split.defences import disguised
from splitlab.split.privacy import matched_message_event
from splitlab.split.train import make_clients, record, train
from splitlab.split.wire import from_bytes, read_truth
from splitlab.study.scoring import run_truth
from splitlab.study.update_grid import Case, ModelSpec, UpdateConfig
from splitlab.study.update_survey import record_updates

DEFENCES = (
    Defences(timestep_floor=200, symsigmoid=True, fixed_noise=0.1, half=True, hide_prompts=True),
    Defences(feature_noise=1.0, matched=True, timestep_floor=300, hint_noise=1.0, latent_norm=3.0),
    Defences(feature_noise=0.3, independent_draws=True),
    Defences(feature_noise=1.0, matched=True, coarse_hints=2, hint_noise=0.5),
    Defences(key_mixing=3, fresh_keys=True),
    Defences(key_mixing=3, hide_prompts=True),
    Defences(patch_shuffle=2, fresh_keys=True),
    Defences(patch_shuffle=2, feature_noise=0.1, symsigmoid=True),
    Defences(
        borrowed_colours=True,
        random_symmetry=True,
        hint_layout_noise=0.3,
        feature_noise=1.0,
        matched=True,
        per_image_noise=True,
    ),
)


def secret(defences: Defences | None = None, **changes) -> TrainConfig:
    return tiny.config(defences=defences or Defences(), published_key=None, **changes)


def sent(client: Client, step: int = 0) -> dict[str, torch.Tensor]:
    return from_bytes(client_send(client, step, 3)[0]).tensors


@pytest.mark.parametrize("defences", DEFENCES, ids=str)
def test_a_secret_client_sends_what_any_client_sends_with_other_draws(
    base: Base, private: ImageSet, defences: Defences
):
    (known,) = make_clients(base, private, tiny.config(defences=defences))
    one, again, other = (
        make_clients(base, private, secret(defences), key=key)[0] for key in (FIXED, FIXED, Key.secret())
    )
    first, like = sent(one), sent(known)
    assert {name: (v.dtype, v.shape) for name, v in first.items()} == {n: (v.dtype, v.shape) for n, v in like.items()}
    assert all(torch.equal(value, sent(again)[name]) for name, value in first.items())
    for stranger in (sent(other), sent(one, 1), sent(replace(one, number=1)), like):
        assert not any(torch.equal(first[name], stranger[name]) for name in ("noise", "noisy_latents", "smashed"))


def test_nothing_that_is_sent_rests_on_a_public_draw(base: Base, private: ImageSet, monkeypatch: pytest.MonkeyPatch):
    """Epochs, timesteps, label, all hidden noise, mixing keys, permutations, colours, turns and layouts."""
    asked = []

    def refused(*purpose: object):
        asked.append(purpose)
        raise AssertionError(purpose)

    for module in ("splitlab.split.client", "splitlab.core.seeds"):
        monkeypatch.setattr(f"{module}.generator", refused)
    for defences in DEFENCES:
        for client in make_clients(base, private, secret(defences, n_clients=2)):
            sent(client)
    assert not asked
    on = {f.name for f in fields(Defences) for defences in DEFENCES if getattr(defences, f.name)}
    assert on == {f.name for f in fields(Defences)}


def test_no_client_can_draw_what_another_draws(base: Base, private: ImageSet):
    first, second = make_clients(base, private, secret(DEFENCES[1], n_clients=2), key=FIXED)
    assert len({first.key, second.key, first.client_key, second.client_key, FIXED}) == 5
    posing = replace(second, key=first.key)  # who has its own key and knows the other's number
    assert not torch.equal(sent(second)["noise"], sent(posing)["noise"])


def test_hidden_noise_has_the_size_that_is_claimed(base: Base):
    data, sigma = encoded(base, tiny.small_set(300)), 0.7
    owner = Client(0, base, data, torch.arange(300), Defences(feature_noise=sigma, hint_noise=0.4), FIXED)
    message, truth = client_send(owner, 0, 300)
    seen = from_bytes(message)
    noisy = base.noised(data.latents[truth.indices], truth.noise, truth.timesteps)
    feature = seen.need("noisy_latents") - noisy
    hint = seen.need("smashed") - seen.need("noisy_latents") - data.hint_latents[truth.indices]
    for noise, std in ((feature, sigma), (hint, 0.4)):
        assert stats.kstest(noise.flatten().numpy() / std, "norm").pvalue > 0.01
    parts = torch.stack([feature.flatten(), hint.flatten(), truth.noise.flatten()])
    assert torch.corrcoef(parts).fill_diagonal_(0).abs().max() < 5 / parts.shape[1] ** 0.5


def explained(message: bytes, latents: torch.Tensor, hint: torch.Tensor, base: Base) -> float:
    """The share of `smashed` that a candidate image explains to the last bit, for who knows the hint."""
    seen = from_bytes(message)
    noisy = base.noised(latents, seen.need("noise"), seen.need("timesteps"))
    released = seen.need("noisy_latents")
    return float(((hint + noisy) + (released - noisy) == seen.need("smashed")).float().mean())


def test_rounding_does_not_tell_which_image_was_noised(base: Base):
    """A published run's `smashed` is computed from what the noise hides, and its last bits show that."""
    defences, n = Defences(feature_noise=1.0), 12
    pair = encoded(base, tiny.small_set(2))
    hint = pair.hint_latents[:1].expand(n, -1, -1, -1)
    shares = {}
    for kind, key in (("published", Key.published(0)), ("secret", FIXED)):
        repeated = type(pair)(*(value[:1].expand(n, *value.shape[1:]) for value in vars(pair).values()))
        message, _ = client_send(Client(0, base, repeated, torch.arange(n), defences, key), 0, n)
        shares[kind] = [explained(message, pair.latents[i].expand(hint.shape), hint, base) for i in (0, 1)]
    true, false = shares["published"]
    assert true == 1.0 > false  # certainty, whatever the noise
    true, false = shares["secret"]
    assert abs(true - false) < 0.15
    assert true < 0.95
    seen = from_bytes(message)  # nothing but the hint and what was sent is in it
    assert torch.equal(seen.need("smashed"), (hint.double() + seen.need("noisy_latents").double()).float())


def test_an_audit_of_secret_messages_stays_below_the_claim(base: Base):
    defences = Defences(feature_noise=3.0, matched=True, latent_norm=2.0, timestep_floor=400)
    data = encoded(base, tiny.small_set(1))
    far = 2.0 * data.latents / data.latents.norm()  # as far apart as the bound allows
    neighbours = type(data)(torch.cat([far, -far]), data.hint_latents.repeat(2, 1, 1, 1), data.text.repeat(2, 1, 1))
    claim = composed_mu([matched_message_event(defences, base.alphas_cumprod, norm=2.0)])
    assert 0.3 * claim < audit_message(base, defences, neighbours, key=FIXED) < claim


@pytest.mark.parametrize("scheme", ["split", "u_shaped", "federated", "split_gradients"])
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    base: Base, private: ImageSet, heldout: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
):
    monkeypatch.setattr(draws.secrets, "token_bytes", lambda n: ENTROPY[:n])
    config = secret(scheme=scheme, n_clients=2, steps=8)
    if scheme == "split":
        config = replace(config, defences=Defences(borrowed_colours=True, random_symmetry=True, feature_noise=0.1))
    given = ("mine", config, base, private, heldout)
    whole = train(*given, out=tmp_path / "whole/out", cache=tmp_path / "whole/cache")
    folders = {"out": tmp_path / "parts/out", "cache": tmp_path / "parts/cache"}
    for step in (1, 4):
        with pytest.raises(Interrupt):
            train(*given, **folders, callback=interrupted_at(step))
    assert train(*given, **folders) == whole
    assert equal(tensors_below(tmp_path / "whole/out"), tensors_below(tmp_path / "parts/out"))
    monkeypatch.undo()
    train(*given, **folders)
    assert not equal(tensors_below(tmp_path / "whole/out"), tensors_below(tmp_path / "parts/out"))


def test_a_trainings_secret_is_found_nowhere(
    base: Base,
    private: ImageSet,
    heldout: ImageSet,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    used, original = [ENTROPY], Key.derived

    def noted(key: Key, *purpose: object) -> Key:
        found = original(key, *purpose)
        used.append(found._secret)
        return found

    monkeypatch.setattr(draws.secrets, "token_bytes", lambda n: ENTROPY[:n])
    monkeypatch.setattr(Key, "derived", noted)
    given = ("mine", secret(DEFENCES[-1]), base, private, heldout)
    with pytest.raises(Interrupt):
        train(*given, out=tmp_path / "out", cache=tmp_path / "cache", callback=interrupted_at(5))
    assert [name.rpartition(".")[2] for name in holders(tmp_path, used)] == ["key"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").glob("train-*")} == {0o600}
    found = train(*given, out=tmp_path / "out", cache=tmp_path / "cache")
    assert holders(tmp_path, used) == []
    assert not list((tmp_path / "cache").glob("train-*"))
    cached = {path.name.split("-")[2][:8] for path in (tmp_path / "cache").glob("encoded-*")}
    assert cached == {heldout.digest[:8]}  # no later run could use what this key disguised
    assert (tmp_path / "out/truth.safetensors").stat().st_mode & 0o777 == 0o600
    shown = capfd.readouterr()
    assert not any(traces(text.encode(), one) for text in (shown.out, shown.err, repr(found)) for one in used)


def test_what_a_secret_client_sent_in_place_of_its_prompts_is_kept_with_the_truth(
    base: Base, private: ImageSet, heldout: ImageSet, tmp_path: Path
):
    """Its evaluator cannot draw it again."""
    config = secret(Defences(borrowed_colours=True), record_messages=4)
    train("mine", config, base, private, heldout, out=tmp_path / "out", cache=tmp_path / "cache")
    truth = run_truth(tmp_path / "out", base, private).truth
    own = tuple(private.prompts[i] for i in truth.indices.tolist())
    assert len(truth.prompts) == len(own) == 12
    assert truth.prompts != own
    assert all(text.endswith("background") for text in truth.prompts)
    known = tiny.config(defences=config.defences)
    record("known", known, base, private, transcript=tmp_path / "transcript", truth=tmp_path / "truth")
    told = disguised(private, known.defences, key=Key.published(0)).prompts
    found = read_truth(tmp_path / "truth")
    assert found.prompts == tuple(told[i] for i in found.indices.tolist())


def test_a_trainings_record_says_what_its_epsilon_rests_on(
    base: Base, private: ImageSet, heldout: ImageSet, tmp_path: Path
):
    noised = Defences(feature_noise=3.0, hint_noise=3.0, latent_norm=2.0, hide_prompts=True)
    found = {}
    for name, config in (("secret", secret(noised)), ("published", tiny.config(defences=noised))):
        out, cache = tmp_path / name, tmp_path / "cache"
        found[name] = train(name, config, base, private, heldout, out=out, cache=cache)["privacy"]
    assert found["secret"]["epsilon"] == found["published"]["epsilon_simulated"] > 0
    assert "epsilon" not in found["published"]
    assert (found["published"]["note"], found["published"]["randomness"]) == (SIMULATED, "published")
    plain = train("plain", tiny.config(), base, private, heldout, out=tmp_path / "plain", cache=tmp_path / "cache")
    assert plain["privacy"]["epsilon"] is None
    assert plain["privacy"]["why"]


def test_recordings_and_updates_of_one_config_differ(base: Base, private: ImageSet, tmp_path: Path):
    for name in ("one", "other"):
        files = {kind: tmp_path / name / f"{kind}.safetensors" for kind in ("transcript", "truth")}
        record("mine", secret(), base, private, **files)
    assert not equal(tensors_below(tmp_path / "one"), tensors_below(tmp_path / "other"))
    case = Case(model="pixel", dataset="tiny", timesteps=(-1,), defences=("none", "noise=1"), attacks=())
    config = UpdateConfig(models={"pixel": ModelSpec(kind="pixel", size=8, channels=(8, 16))}, cases=(case,), seeds=2)
    splits = {"private": private, "public": tiny.small_set(12, seed=2), "heldout": tiny.small_set(4, seed=3)}
    for name in ("three", "four"):
        record_updates(config, base, lambda _, split: splits[split], out=tmp_path / name)
    one, other = (tensors_below(tmp_path / name / "sent") for name in ("three", "four"))
    assert not any(torch.equal(one[name], other[name]) for name in one if not name.endswith("bias"))
    granted = tensors_below(tmp_path / "three/granted")
    first, second = (granted[f"pixel-tiny-tdrawn-b1/{seed}.safetensors/noise"] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "three/truth").rglob("*.safetensors")} == {0o600}


@pytest.mark.parametrize(
    "defence", [GaussianNoise(0.5), PerExample(1e-3, 2.0), Quantise(4, stochastic=True), Soteria(0.5)], ids=str
)
def test_federated_defences_draw_from_secret_keys(base: Base, defence):
    model, truth = tiny_unet(), tiny.update_truth(n=2)
    how = {"alphas_cumprod": tiny.ALPHAS}
    one, again, other = (
        share_protected(model, truth, defence, generator=source("update", key), **how)
        for key in (FIXED, FIXED, FIXED.of_client(1))
    )
    assert all(torch.equal(value, again.gradients[name]) for name, value in one.gradients.items())
    assert any(not torch.equal(value, other.gradients[name]) for name, value in one.gradients.items())


def test_a_federated_clients_noise_is_its_own(base: Base):
    truth, how = tiny.update_truth(base, n=2), {"alphas_cumprod": base.alphas_cumprod, "max_grad_norm": 1e-4}
    clean = private_update(base.unet, truth, noise_multiplier=0.0, generator=source("x", FIXED), **how)
    noises = []
    for number in (0, 1):
        draw = source("dp share", FIXED.of_client(number), 0)
        noisy = private_update(base.unet, truth, noise_multiplier=50.0, generator=draw, **how)
        noises.append(torch.cat([(noisy.gradients[n] - g).flatten() for n, g in clean.gradients.items()]))
    together = torch.stack(noises)
    assert together.std().item() == pytest.approx(50.0 * 1e-4 / 2, rel=0.05)
    assert abs(float(torch.corrcoef(together)[0, 1])) < 5 / together.shape[1] ** 0.5


def tiny_unet():
    from splitlab.federated.client import pixel_unet

    return pixel_unet(8, seed=0, channels=(8, 16))
