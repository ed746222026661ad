import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from world import tiny

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet, image_set
from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import LatentHintControlNet, image_hint_controlnet, latent_hint_controlnet
from splitlab.split.client import client_send
from splitlab.split.config import SCHEMES, Defences, TrainConfig
from splitlab.split.messages import stack
from splitlab.split.train import control_scores, eval_loss, learning_rate, make_clients, train
from splitlab.split.wire import from_bytes, read_transcript, read_truth

Run = Callable[..., dict[str, Any]]

COMPARED = (
    "controlnet/diffusion_pytorch_model.safetensors",
    "transcript.safetensors",
    "truth.safetensors",
    "samples.safetensors",
    "record.json",
)
"""Everything of a run that must repeat bit for bit; `timing.json` is for what does not."""


@pytest.fixture
def run(base: Base, private: ImageSet, heldout: ImageSet, tmp_path: Path) -> Run:
    """Return a function that trains into `tmp_path / name`."""

    def go(config: TrainConfig, name: str = "out", cache: str = "cache", **options: Any) -> dict[str, Any]:
        folders = {"out": tmp_path / name, "cache": tmp_path / cache}
        return train("a run", config, base, private, heldout, **folders, **options)

    return go


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in COMPARED}


def interrupt_at(done: int) -> Callable[[str, int, int, float], None]:
    def callback(what: str, now: int, total: int, loss: float) -> None:
        if now == done:
            raise KeyboardInterrupt

    return callback


def states(tmp_path: Path, cache: str = "cache") -> list[Path]:
    return sorted((tmp_path / cache).glob("train-*"))


def test_a_run_leaves_its_outputs_and_no_checkpoint(run: Run, tmp_path: Path):
    record = run(tiny.config())
    names = {name.partition("/")[0] for name in COMPARED} | {"timing.json", "server.safetensors", ".splitlab.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert states(tmp_path) == []
    assert record == json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["config"]["steps"] == len(record["loss"]) == 6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_run_twice_is_the_same_bit_for_bit(run: Run, tmp_path: Path, scheme: str):
    run(tiny.config(scheme=scheme), "one")
    torch.manual_seed(99)  # the global random state is no part of a run
    run(tiny.config(scheme=scheme), "two", cache="another cache")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    run(tiny.config(scheme=scheme, seed=1), "three")
    assert files(tmp_path / "one") != files(tmp_path / "three")


@pytest.mark.parametrize("at", [3, 5])  # one step after a checkpoint; also in the middle of a federated turn
@pytest.mark.parametrize(
    "config",
    [
        tiny.config(defences=Defences(symsigmoid=True, fixed_noise=0.2), n_clients=2),
        tiny.config(scheme="split_gradients"),
        tiny.config(scheme="federated", n_clients=2, local_steps=3, checkpoint_every=1),
        tiny.config(scheme="central"),
    ],
    ids=lambda config: config.scheme,
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(run: Run, tmp_path: Path, config: TrainConfig, at: int):
    whole = run(config, "whole", cache="other")
    with pytest.raises(KeyboardInterrupt):
        run(config, callback=interrupt_at(at))
    assert len(states(tmp_path)) == 1
    assert not (tmp_path / "out").exists()

    reported = []
    resumed = run(config, callback=lambda what, done, total, loss: reported.append((done, loss)))
    every = config.checkpoint_every
    assert [done for done, _ in reported] == list(
        range((at - 1) // every * every + 1, 7)
    )  # it did go on, not start anew
    assert resumed == whole
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert states(tmp_path) == []


def test_a_run_interrupted_twice_still_ends_the_same(run: Run, tmp_path: Path):
    run(tiny.config(), "whole", cache="other")
    for at in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            run(tiny.config(), callback=interrupt_at(at))
    run(tiny.config())
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_an_interruption_says_where_it_goes_on(run: Run, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), callback=interrupt_at(4))
    # the callback speaks of 4 steps done; the checkpoint of that step was not written yet
    assert "interrupted at step 3; run it again to go on from step 2" in capsys.readouterr().out


def test_another_config_does_not_go_on_from_a_checkpoint(run: Run, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), callback=interrupt_at(5))
    seen: list[int] = []
    run(tiny.config(lr=3e-3), callback=lambda what, done, total, loss: seen.append(done))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(states(tmp_path)) == 1  # the other run's checkpoint is left to it


def test_a_damaged_checkpoint_is_named_and_not_trained_from(run: Run, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), callback=interrupt_at(5))
    (state,) = states(tmp_path)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"train-.*\.safetensors: damaged .*move it aside and run again"):
        run(tiny.config())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loss_that_is_not_finite_names_the_step_and_spares_earlier_outputs(run: Run, tmp_path: Path, scheme: str):
    run(tiny.config(scheme=scheme))
    before = files(tmp_path / "out")
    # A learning rate of 1e36 overflows float32 in the first forward pass after a step. With a trained hint encoder
    # it is the client's own features that overflow, and the message is refused before there is a loss.
    says = r"at step 1; lower lr \(now 1e\+36\)"
    if scheme == "split_gradients":
        says = "message 1 of client 0: smashed holds NaN or infinity; check the data and the learning rate it came from"
    with pytest.raises(InputError, match=says):
        run(tiny.config(scheme=scheme, lr=1e36, steps=60, checkpoint_every=50))
    assert files(tmp_path / "out") == before


def test_a_folder_with_other_files_is_refused_before_the_first_step_and_stays(run: Run, tmp_path: Path):
    run(tiny.config())
    (tmp_path / "out" / "notes.txt").write_text("three years of work")
    seen: list[int] = []
    with pytest.raises(InputError, match=r"out: notes\.txt was added .*name another folder"):
        run(tiny.config(), callback=lambda what, done, total, loss: seen.append(done))
    assert not seen
    assert (tmp_path / "out" / "notes.txt").read_text() == "three years of work"
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out" / ".splitlab.json").unlink()  # without it they may be anybody's
    with pytest.raises(InputError, match="which splitlab did not write"):
        run(tiny.config(seed=1))
    assert json.loads((tmp_path / "out" / "record.json").read_text())["config"]["seed"] == 0


def test_a_run_cannot_keep_its_checkpoints_in_what_it_will_replace(run: Run):
    with pytest.raises(InputError, match=r"cache \(.*\) lies in the folder to be written"):
        run(tiny.config(), cache="out/cache")


def test_what_only_the_client_may_know_is_the_owners_alone(run: Run, tmp_path: Path):
    run(tiny.config())
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), callback=interrupt_at(4))
    for path in (tmp_path / "out" / "truth.safetensors", *states(tmp_path)):
        assert path.stat().st_mode & 0o077 == 0


def test_outputs_that_cannot_be_written_cost_no_step(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tiny.config(steps=5), "whole", cache="other")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ControlNetModel, "save_pretrained", full)
        with pytest.raises(InputError, match=r"No space left.*free some disk space"):
            run(tiny.config(steps=5))
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    run(tiny.config(steps=5), callback=lambda what, done, total, loss: seen.append(done))
    assert not seen
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_full_disk_while_checkpointing_spares_the_earlier_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(tiny.config(), "whole", cache="other")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def fill_disk(what: str, done: int, total: int, loss: float) -> None:
        if done == 3:
            patch.setattr(checkpoint, "save_file", full)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"No space left.*free some disk space"):
        run(tiny.config(), callback=fill_disk)
    (state,) = states(tmp_path)
    _, meta = checkpoint.load(state)
    assert meta["step"] == 2
    run(tiny.config())  # with space again, it goes on from there
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_transcript_is_what_clients_sent_byte_for_byte(run: Run, tmp_path: Path, base: Base, private: ImageSet):
    config = tiny.config(defences=Defences(half=True, symsigmoid=True), n_clients=2, record_messages=4)
    run(config)
    clients = make_clients(base, private, config)
    sent = [client_send(clients[i % 2], i // 2, config.batch_size) for i in range(4)]
    transcript = read_transcript(tmp_path / "out" / "transcript.safetensors", base_digest=base.digest)
    assert len(transcript.observations) == 4
    for kept, (wired, _) in zip(transcript.observations, sent, strict=True):
        expected = from_bytes(wired)
        assert (kept.client, kept.sequence) == (expected.client, expected.sequence)
        assert set(kept.tensors) == set(expected.tensors)
        assert all(torch.equal(value, expected.need(name)) for name, value in kept.tensors.items())
    header = transcript.header
    assert (header.run, header.dataset, header.scheme, header.size) == ("a run", "tiny", "split", 16)
    assert (header.defences, header.n_clients) == (config.defences, 2)


def test_the_truth_is_aligned_with_the_transcript(run: Run, tmp_path: Path, base: Base, private: ImageSet):
    run(tiny.config(n_clients=3))
    seen = stack(read_transcript(tmp_path / "out" / "transcript.safetensors").observations)
    truth = read_truth(tmp_path / "out" / "truth.safetensors")
    assert torch.equal(truth.timesteps, seen.need("timesteps"))
    assert torch.equal(truth.noise, seen.need("noise"))
    latents = base.denoised(seen.need("noisy_latents"), truth.noise, truth.timesteps)
    torch.testing.assert_close(latents, base.encode(private.images[truth.indices]), rtol=1e-3, atol=1e-3)


def test_no_secret_is_in_what_the_server_gets(run: Run, tmp_path: Path, base: Base, private: ImageSet):
    config = tiny.config(defences=Defences(fixed_noise=0.3, hide_prompts=True))
    run(config)
    (client,) = make_clients(base, private, config)
    secret = client.fixed_noise.numpy().tobytes()
    images = private.images[0].numpy().tobytes()
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    noise = read_truth(tmp_path / "out" / "truth.safetensors").noise
    assert noise.numpy().tobytes() in found.pop("truth.safetensors"), "what is in a file is seen in its bytes"
    assert "transcript.safetensors" in found
    for name, content in found.items():
        assert secret not in content, name
        assert images not in content, name
        assert b"encoder_hidden_states" not in content, name


@pytest.mark.parametrize("scheme", ["central", "federated"])
def test_schemes_that_send_no_activations_leave_an_empty_transcript(run: Run, tmp_path: Path, scheme: str):
    run(tiny.config(scheme=scheme))
    assert read_transcript(tmp_path / "out" / "transcript.safetensors").observations == ()
    assert len(read_truth(tmp_path / "out" / "truth.safetensors").indices) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_trained_controlnet_loads_and_scores_as_recorded(
    run: Run, tmp_path: Path, base: Base, heldout: ImageSet, scheme: str
):
    record = run(tiny.config(scheme=scheme))
    kind = ControlNetModel if scheme == "split_gradients" else LatentHintControlNet
    model = kind.from_pretrained(tmp_path / "out" / "controlnet").eval()
    assert eval_loss(base, model, heldout) == pytest.approx(record["eval_loss"], abs=1e-6)
    assert sum(p.numel() for p in model.parameters()) == record["n_trainable"]


def test_bytes_per_sample_are_those_of_the_messages(run: Run, tmp_path: Path, base: Base, private: ImageSet):
    record = run(tiny.config())
    (client,) = make_clients(base, private, tiny.config())
    sizes = [len(client_send(client, step, 3)[0]) for step in range(6)]
    assert record["up_bytes_per_sample"] == round(sum(sizes) / 18, 2)
    assert record["down_bytes_per_sample"] == 0


def test_callbacks_hear_every_step_and_its_loss(run: Run):
    heard = []
    record = run(tiny.config(), callback=lambda *said: heard.append(said))
    assert [(what, done, total) for what, done, total, _ in heard] == [("train", i + 1, 6) for i in range(6)]
    assert [round(loss, 6) for *_, loss in heard] == record["loss"]


def test_a_batch_larger_than_a_share_is_refused_before_anything_is_written(run: Run, tmp_path: Path):
    with pytest.raises(InputError, match="batch_size 7 exceeds client 0's 6 samples"):
        run(tiny.config(batch_size=7, n_clients=2))
    assert not (tmp_path / "out").exists()


def test_more_clients_than_samples_are_refused(run: Run):
    with pytest.raises(InputError, match="cannot share 12 samples among 13 clients"):
        run(tiny.config(n_clients=13))


def test_images_that_do_not_fit_the_base_are_refused(base: Base, tmp_path: Path):
    odd, other = tiny.small_set(3, size=18), tiny.small_set(3, size=18, seed=1)
    with pytest.raises(InputError, match="18x18 pixels do not fit the VAE"):
        train("r", tiny.config(), base, odd, other, out=tmp_path / "o", cache=tmp_path / "c")


def test_clients_shares_are_disjoint_and_name_their_places(base: Base, private: ImageSet):
    clients = make_clients(base, private, tiny.config(n_clients=5))
    assert torch.cat([client.indices for client in clients]).tolist() == list(range(12))
    assert [client.number for client in clients] == list(range(5))
    whole = base.encode(private.images)
    for client in clients:
        torch.testing.assert_close(client.data.latents, whole[client.indices])


def test_the_learning_rate_warms_up_and_decays_to_zero():
    config = TrainConfig(steps=100, lr=2.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(2.0 / 5)  # a fifth of the 5-step warm-up
    assert max(rates) == rates[4]
    assert rates[50] == pytest.approx(1.0)  # half-way down the cosine
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 2e-3
    assert learning_rate(0, replace(config, steps=1)) == 2.0


def test_the_evaluation_is_alike_for_all_controlnets(base: Base, heldout: ImageSet):
    # untrained ones add nothing, so every kind has the loss of the plain U-Net
    latent = eval_loss(base, latent_hint_controlnet(base).eval(), heldout)
    torch.manual_seed(5)
    assert eval_loss(base, latent_hint_controlnet(base).eval(), heldout) == latent
    assert eval_loss(base, image_hint_controlnet(base, seed=0).eval(), heldout) == pytest.approx(latent, rel=1e-6)


def test_control_is_scored_by_overlap_only_where_there_are_shapes(heldout: ImageSet):
    truth = tiny.small_set(6, size=32)
    own = control_scores(truth.images, truth)
    assert own["control_iou"] > 0.9
    pixels = ((truth.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    others = image_set(pixels, pixels, ["a photograph of a cat"] * 6)
    assert control_scores(truth.images, others)["control_iou"] is None
    assert math.isfinite(control_scores(truth.images, others)["control_edges"])


def test_timings_are_kept_apart_from_what_repeats(run: Run, tmp_path: Path):
    record = run(tiny.config(scheme="split_gradients"))
    timing = json.loads((tmp_path / "out" / "timing.json").read_text())
    assert timing["client_s_per_sample"] > 0
    assert timing["server_s_per_sample"] > 0
    assert torch.__version__.startswith(timing["versions"]["torch"].partition("+")[0])
    assert not set(timing) & set(record)
