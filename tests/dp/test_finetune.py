import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel
from world import tiny
from world.interrupts import Interrupt, interrupted_at

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.seeds import Key, source
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base, encoded
from splitlab.diffusion.pretrain import MAX_TOKENS, PretrainConfig, make_text_encoder, make_tokenizer, make_unet
from splitlab.diffusion.trainable import count_trainable, mark_trainable
from splitlab.dp import finetune as module
from splitlab.dp.conditioning import ClassEmbedder, denoiser, make_conditioning
from splitlab.dp.finetune import DPConfig, finetune, mechanism
from splitlab.dp.sample import hidden_states, load_tuned, sample, untuned
from splitlab.privacy import mechanisms as engine
from splitlab.privacy.accounting import PrivacyEvent, epsilon


def config(private: ImageSet, **changes) -> DPConfig:
    few = {"dataset": "tiny", "classes": tuple(sorted(set(private.prompts))), "batch_size": 4, "steps": 5}
    few |= {"noise_multiplier": 1.0, "delta": 0.01, "accountant": "rdp", "checkpoint_every": 2, "physical_batch": 3}
    few |= {"published_key": 0}
    return DPConfig(**(few | changes))


def run(base: Base, private: ImageSet, folder: Path, settings: DPConfig, **options):
    return finetune("tiny", settings, base, private, out=folder / "out", cache=folder / "cache", **options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "out").rglob("*.safetensors"))
    assert files
    return {f"{file.parent.name}/{n}": v for file in files for n, v in checkpoint.load(file)[0].items()}


@pytest.mark.parametrize("changes", [{}, {"multiplicity": 2, "trainable": "lora"}, {"noise_multiplier": 0.0}])
def test_a_resumed_run_ends_with_the_same_bits_and_the_same_record(
    base: Base, private: ImageSet, tmp_path: Path, changes: dict
):
    settings = config(private, **changes)
    whole = run(base, private, tmp_path / "whole", settings)
    for step in (3, 5):
        with pytest.raises(Interrupt):
            run(base, private, tmp_path / "parts", settings, callback=interrupted_at(step))
    parts = run(base, private, tmp_path / "parts", settings)
    assert parts == whole
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / "parts/cache").glob("dp-*"))


def test_the_accountant_counts_every_step_of_the_optimiser(
    base: Base, private: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Empty batches and the steps before an interruption included."""
    taken, sizes = [], []
    original, drawn = torch.optim.Adam.step, module.poisson_sample

    def counted(optimizer, *arguments):
        taken.append(optimizer)
        return original(optimizer, *arguments)

    def noted(*arguments, **options):
        sizes.append(len(drawn(*arguments, **options)))
        return drawn(*arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    monkeypatch.setattr(module, "poisson_sample", noted)
    settings = config(private, sample_rate=0.05, steps=8)
    with pytest.raises(Interrupt):
        run(base, private, tmp_path, settings, callback=interrupted_at(4))
    record = run(base, private, tmp_path, settings)
    assert 0 in sizes
    assert record["steps"] == len(taken) == 8
    event = {"mechanism": "gaussian", "noise_multiplier": 1.0, "sample_rate": 0.05, "steps": 8}
    assert record["events"] == [event | {"adjacency": "add_remove_one"}]
    assert record["epsilon_simulated"] == epsilon([PrivacyEvent(**record["events"][0])], 0.01, accountant="rdp")


def test_every_steps_noise_is_its_own(base: Base, private: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Noise that comes again cancels in a difference of two releases."""
    noises, original = [], module.release

    def noted(total, *arguments, expected_batch, generator):
        released = original(total, *arguments, expected_batch=expected_batch, generator=generator)
        noises.append(torch.cat([(released[n] * expected_batch - g).flatten() for n, g in total.items()]))
        return released

    monkeypatch.setattr(module, "release", noted)
    settings = config(private, steps=5)
    with pytest.raises(Interrupt):
        run(base, private, tmp_path, settings, callback=interrupted_at(2))
    run(base, private, tmp_path, settings)
    run(base, private, tmp_path, replace(settings, published_key=1))
    together = torch.corrcoef(torch.stack(noises)).fill_diagonal_(0)
    assert len(noises) == 10
    assert together.abs().max() < 6 / math.sqrt(len(noises[0]))
    assert noises[0].std() == pytest.approx(settings.max_grad_norm * settings.noise_multiplier, rel=0.05)


def test_what_was_spent_before_counts_as_well(base: Base, private: ImageSet, tmp_path: Path):
    history = (PrivacyEvent("gaussian", 2.0, 0.5, 3, "add_remove_one"),)
    settings = config(private)
    record = run(base, private, tmp_path, settings, history=history)
    assert record["epsilon_simulated"] == epsilon(
        [*history, *mechanism(settings, len(private)).events(5)], 0.01, accountant="rdp"
    )
    assert record["epsilon_simulated"] > epsilon(history, 0.01, accountant="rdp")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"noise_multiplier": 0.5}, r"noise_multiplier was 1.0 and is now 0.5"),
        ({"batch_size": 3}, "sample_rate was"),
        ({"max_grad_norm": 1.0}, "max_grad_norm was"),
        ({"multiplicity": 2}, "multiplicity was"),
        ({"steps": 3}, "4 steps were taken already, more than the 3"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    base: Base, private: ImageSet, tmp_path: Path, changes: dict, says: str
):
    settings = config(private)
    with pytest.raises(Interrupt):
        run(base, private, tmp_path, settings, callback=interrupted_at(4))
    with pytest.raises(InputError, match=says):
        run(base, private, tmp_path, replace(settings, **changes))
    with pytest.raises(InputError, match="data was"):
        run(base, private.subset(range(11, -1, -1)), tmp_path, settings)
    assert run(base, private, tmp_path, replace(settings, steps=6))["events"][0]["steps"] == 6


def test_a_folder_with_other_files_is_refused_before_the_first_step_and_stays(
    base: Base, private: ImageSet, tmp_path: Path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("three years of work")
    with pytest.raises(InputError, match=r"out: it holds notes\.txt, which splitlab did not write; .*another folder"):
        run(base, private, tmp_path, config(private), callback=interrupted_at(1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_outputs_that_cannot_be_written_cost_no_step(
    base: Base, private: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "save_pretrained", full)
        with pytest.raises(InputError, match=r"No space left.*free some disk space"):
            run(base, private, tmp_path, config(private))
    assert not (tmp_path / "out").exists()
    run(base, private, tmp_path, config(private), callback=interrupted_at(1))  # there is no step left to interrupt
    assert (tmp_path / "out" / "record.json").exists()


def test_two_runs_of_one_name_do_not_share_a_checkpoint(base: Base, private: ImageSet, tmp_path: Path):
    said: list[str] = []

    def second(what: str, done: int, total: int, objective: float) -> None:
        with pytest.raises(InputError) as error:
            finetune("tiny", config(private), base, private, out=tmp_path / "other", cache=tmp_path / "cache")
        said.append(str(error.value))

    run(base, private, tmp_path, config(private, steps=1), callback=second)
    assert "a fine-tuning named 'tiny' is in progress; wait until it has ended, or give another name" in said[0]


def test_a_given_epsilon_is_met_and_not_undercut(base: Base, private: ImageSet, tmp_path: Path):
    record = run(base, private, tmp_path, config(private, epsilon=4.0, noise_multiplier=0.0))
    assert 0.97 * 4.0 <= record["epsilon_simulated"] <= 4.0
    assert record["noise_multiplier"] > 0


def test_without_privacy_the_record_says_so(base: Base, private: ImageSet, tmp_path: Path):
    record = run(base, private, tmp_path, config(private, noise_multiplier=0.0))
    assert math.isinf(record["epsilon"])
    assert record["events"] == []
    assert json.loads((tmp_path / "out/record.json").read_text()) == json.loads(json.dumps(record))


def test_the_record_holds_no_loss_of_private_samples(base: Base, private: ImageSet, tmp_path: Path):
    assert not [key for key in run(base, private, tmp_path, config(private)) if "loss" in key or "norm" in key]


def test_only_the_trained_set_moves(base: Base, private: ImageSet, tmp_path: Path):
    settings = config(private, from_block=3, ema_decay=0.0)
    record = run(base, private, tmp_path, settings)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet")
    before = dict(base.unet.named_parameters())
    moved = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    model = denoiser(base, make_conditioning(base, "class", private.prompts, classes=settings.classes))
    assert moved == set(mark_trainable(model.unet, "attention", from_block=3))
    embedder = ClassEmbedder.from_pretrained(tmp_path / "out/embedder")
    assert not torch.equal(embedder.states.weight, model.embedder.states.weight)
    count = sum(before[name].numel() for name in moved) + embedder.states.weight.numel()
    assert record["n_trainable"] == count


def test_a_step_is_the_mechanism_on_a_poisson_batch(base: Base, private: ImageSet, tmp_path: Path):
    """The first step's weights again, from the engine's parts: sampling, draws, clipping, noise, scale, optimiser."""
    settings = config(private, steps=1, multiplicity=2, ema_decay=0.0, embedder=False, from_block=5)
    run(base, private, tmp_path, settings)
    how = mechanism(settings, len(private))
    conditioning = make_conditioning(base, "class", private.prompts, classes=settings.classes, train_embedder=False)
    model = denoiser(base, conditioning)
    mark_trainable(model.unet, "attention", from_block=5)
    data = encoded(base, private).latents, conditioning.conditions
    inputs = module.draw_inputs(data, settings, how, Key.published(0), 0, base.n_timesteps)
    assert torch.equal(inputs[0][::2], inputs[0][1::2])  # one image's draws side by side
    assert not torch.equal(inputs[3][::2], inputs[3][1::2])
    released = engine.private_gradient(
        model,
        inputs,
        max_grad_norm=settings.max_grad_norm,
        noise_multiplier=1.0,
        expected_batch=4.0,
        generator=source(Key.published(0), "dp noise", 0),
        multiplicity=2,
    )
    trained = engine.trainable_parameters(model)
    optimizer = torch.optim.Adam(trained.values(), lr=settings.lr / module.WARM_UP)
    engine.step(optimizer, model, released)
    unet = dict(UNet2DConditionModel.from_pretrained(tmp_path / "out/unet").named_parameters())
    for name, parameter in trained.items():
        torch.testing.assert_close(unet[name.removeprefix("unet.")], parameter.data, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("trainable", "kind"), [("attention", "class"), ("lora", "class"), ("unet", "none"), ("attention", "text")]
)
def test_a_saved_model_generates_what_the_trained_one_would(
    base: Base, private: ImageSet, tmp_path: Path, trainable: str, kind: str
):
    settings = config(private, conditioning=kind, trainable=trainable, steps=2, lr=0.05)
    run(base, private, tmp_path, settings)
    asked = 3 if kind == "none" else private.prompts[:3]
    pictures = sample(base, tmp_path / "out", asked, generator=tiny.draw(), steps=3, batch=2)
    assert pictures.shape == (3, 3, 16, 16)
    assert pictures.abs().max() <= 1
    public = sample(base, untuned(base, kind, classes=settings.classes), asked, generator=tiny.draw(), steps=3, batch=2)
    assert not torch.allclose(pictures, public)
    loaded = load_tuned(tmp_path / "out")
    assert loaded.record["run"] == "tiny"
    again = sample(base, loaded, asked, generator=tiny.draw(), steps=3, batch=2)
    assert torch.equal(pictures, again)


def test_text_encoders_and_unets_load_in_the_users_libraries(base: Base, private: ImageSet, tmp_path: Path):
    run(base, private, tmp_path, config(private, conditioning="text", trainable="lora", lr=0.05))
    encoder = CLIPTextModel.from_pretrained(tmp_path / "out/text_encoder")
    before = dict(base.text_encoder.named_parameters())
    changed = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert not any("embedding" in name for name in changed)  # the vocabulary's tables stay public
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet")
    assert unet.state_dict().keys() == base.unet.state_dict().keys()


def test_the_defaults_train_a_small_part_of_the_shipped_base(private: ImageSet):
    """The bar: attention and embedder at most 15 % of the U-Net (the paper: about 10 %), whatever the conditioning."""
    settings, shape = DPConfig(), PretrainConfig()
    unet = make_unet(shape)
    mark_trainable(unet, settings.trainable, from_block=settings.from_block)
    n_unet, attention = sum(p.numel() for p in unet.parameters()), count_trainable(unet)
    classes = count_trainable(ClassEmbedder(10, MAX_TOKENS, shape.text_width))
    encoder = make_text_encoder(shape, make_tokenizer(tiny.PROMPTS)).named_parameters()
    layers = sum(p.numel() for name, p in encoder if "embedding" not in name)
    assert 0.08 < (attention + classes) / n_unet < 0.10
    assert (attention + layers) / n_unet <= 0.15


def test_stable_diffusions_own_layout_is_fine_tuned_as_well(sd15_base: Base, private: ImageSet, tmp_path: Path):
    settings = config(private, steps=1, sample_rate=1.0, conditioning="text", from_block=8)
    run(sd15_base, private, tmp_path, settings)
    pictures = sample(sd15_base, tmp_path / "out", private.prompts[:2], generator=tiny.draw(), steps=2, guidance=2.0)
    assert pictures.shape == (2, 3, 32, 32)
    assert torch.isfinite(pictures).all()


def test_sampling_follows_the_stock_pipeline(base: Base):
    """DDIM with guidance, from the same start: the images that diffusers' own pipeline makes."""
    prompts = [tiny.PROMPTS[0], tiny.PROMPTS[1]]
    public = untuned(base, "text")
    ours = sample(base, public, prompts, generator=tiny.draw(), steps=4, guidance=2.5)
    theirs = base.pipeline(
        prompt=prompts,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=2.5,
        latents=torch.randn(2, 4, 4, 4, generator=tiny.draw()),
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, torch.as_tensor(theirs) * 2 - 1, rtol=0, atol=1e-4)


def test_labels_and_class_prompts_ask_for_the_same(base: Base):
    public = untuned(base, "class", classes=tiny.PROMPTS[:3])
    assert torch.equal(
        hidden_states(base, public, [2, 0]), hidden_states(base, public, [tiny.PROMPTS[2], tiny.PROMPTS[0]])
    )
    for asked, says in (([3], "between 0 and 2"), (["a cat"], "'a cat' is none"), (4, "was asked for int")):
        with pytest.raises(InputError, match=says):
            hidden_states(base, public, asked)
    with pytest.raises(InputError, match="give labels or prompts, or a number"):
        hidden_states(base, untuned(base, "none"), ["x"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epsilon": 0.0}, "epsilon must be positive, got 0.0; leave it out"),
        ({"epsilon": -1.0, "noise_multiplier": 0.0}, "epsilon must be positive"),
        ({"epsilon": math.nan, "noise_multiplier": 0.0}, "epsilon must be positive"),
        ({"epsilon": 1.0}, "give one of them"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be 0 or more"),
        ({"delta": 0.0}, "delta is a probability"),
        ({"sample_rate": 1.5}, "sample_rate must lie"),
        ({"multiplicity": 0}, "multiplicity must be 1 or more"),
        ({"max_grad_norm": math.inf}, "max_grad_norm must be positive and finite"),
        ({"accountant": "moments"}, "accountant 'moments' is unknown"),
        ({"trainable": "attn"}, "trainable 'attn' is unknown"),
        ({"ema_decay": 1.0}, "ema_decay must lie"),
    ],
)
def test_contradictions_are_refused_at_construction(private: ImageSet, changes: dict, says: str):
    with pytest.raises(InputError, match=says):
        config(private, **changes)


def test_mechanisms_that_cannot_be_are_refused(private: ImageSet):
    with pytest.raises(InputError, match="batch_size 13 is larger than the data set of 12"):
        mechanism(config(private, batch_size=13), 12)
    few = config(private, epsilon=1e-3, noise_multiplier=0.0, steps=10**13, delta=1e-5)
    with pytest.raises(InputError, match="unreachable"):
        mechanism(few, 12)


def test_a_delta_that_protects_nobody_warns(private: ImageSet):
    with pytest.warns(UserWarning, match=r"delta 0.1 is not below 1/n = 0.0833.*protects nobody"):
        mechanism(config(private, delta=0.1), 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mechanism(config(private, delta=0.08), 12)


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_a_run_that_diverges_is_stopped(base: Base, private: ImageSet, tmp_path: Path, noise_multiplier: float):
    with pytest.raises(InputError, match=r"no sample's loss is finite at step [1-4]; lower lr"):
        run(base, private, tmp_path, config(private, noise_multiplier=noise_multiplier, lr=1e30))
    assert not (tmp_path / "out").exists()
