"""Every kind of input that `changes` changes: good ones, who reads them, and who checks what is accepted."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splitlab.core import checkpoint
from splitlab.core.pixels import to_uint8
from splitlab.federated.saved import SavedInversion, load_inversion, save_inversion
from splitlab.federated.update import (
    Update,
    UpdateTruth,
    model_digest,
    read_granted,
    read_update,
    read_update_truth,
    write_update,
    write_update_truth,
)
from splitlab.split import wire
from splitlab.split.artefacts import (
    SavedReconstruction,
    load_reconstruction,
    read_record,
    read_samples,
    read_scores,
    save_reconstruction,
)
from splitlab.split.config import Adversary, Defences, TrainConfig
from splitlab.split.messages import Observation, Reconstruction, Truth
from world.fuzz import checks, mutations
from world.fuzz.changes import Kind, changed_tensors, changed_text, parts, put_together


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def messages() -> list[Observation]:
    """Return messages of every scheme and width."""
    t = torch.tensor([700, 999])
    whole = Observation(1, 5, t, noise(2, 4, 2, 2), noise(2, 4, 2, 2) + 1, noise(2, 4, 2, 2) - 1, noise(2, 3, 6))
    half = whole.map(lambda value: value.half() if value.is_floating_point() else value.to(torch.int16))
    conventional = whole.without("noise").changed(smashed=noise(2, 9, 2, 2))
    answered = whole.without("noise").changed(noise_pred=noise(2, 4, 2, 2), noise_pred_gradient=noise(2, 4, 2, 2) * 2)
    return [whole, half, conventional, answered, whole.without("encoder_hidden_states")]


def kinds(folder: Path) -> dict[str, Kind]:
    """Return every kind; files are written to `folder`."""
    place = folder / "file.safetensors"
    place.with_suffix(".seconds.json").write_text('{"cpu_s": 1.5}')

    def file(write: Callable[[Path], None]) -> bytes:
        write(place)
        return place.read_bytes()

    def reader(read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        def reads(content: bytes) -> Any:
            place.write_bytes(content)
            return read(place)

        return reads

    def tensors(originals: list[Callable[[Path], None]], read: Callable[[Path], Any], check: Any) -> Kind:
        return Kind([file(write) for write in originals], reader(read), check, changed_tensors)

    sent = [wire.to_bytes(message) for message in messages()]
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    update = Update(
        {n: noise(*p.shape) for n, p in model.named_parameters()}, "gradient", "epsilon", 8, model_digest(model)
    )
    fedavg = Update(update.map(Tensor.half).gradients, "fedavg", "epsilon", 8, "", local_steps=4, lr=0.1)
    clean = noise(2, 4, 2, 2)
    facts = UpdateTruth(
        clean, torch.tensor([3, 4]), clean + 1, noise(2, 3, 6), clean + 2, noise(2, 3, 4, 4), ("a", "b")
    )
    several = UpdateTruth(clean, torch.tensor([[3, 4], [5, 6]]), noise(2, 2, 4, 2, 2))
    granted = {"timesteps": facts.timesteps, "noise": facts.noise, "text": facts.text}
    pictures = noise(2, 3, 4, 4).clamp(-1, 1)
    made = Reconstruction(pictures, pictures, ("a", "b"), ("noise",), (2.0, 1.0), 7)
    saved = SavedReconstruction(made, Adversary("posterior"), 0, (("adversary", "server"), ("scheme", "split")))
    inverted = SavedInversion("dlg", ("noise",), pictures, ((1, 2), (3,)), (("a",), ()), ((1, pictures),), (2.0,), 7)
    config = asdict(TrainConfig(defences=Defences(feature_noise=1.0)))
    record = json.dumps({"run": "r", "config": config, "loss": [1.0, 0.5], "control_iou": 0.5}).encode()
    samples = {"images": to_uint8(pictures), "hints": to_uint8(-pictures)}
    scores = {"ceiling_psnr_db": noise(3), "dlg/0/ssim": noise(3) + 1}
    truths = [Truth(torch.arange(2), torch.tensor([700, 999]), noise(2, 4, 2, 2)) for _ in range(2)]
    return {
        "message": Kind(sent, wire.from_bytes, checks.check_message, changed_tensors),
        "transcript": tensors(list(_transcripts(sent)), wire.read_transcript, checks.check_transcript),
        "truth": tensors([lambda path: wire.write_truth(path, truths)], wire.read_truth, checks.check_truth),
        "server": tensors(
            [lambda path: checkpoint.save(path, {"decoder.weight": noise(3, 3)}, {})],
            wire.read_server,
            checks.check_server,
        ),
        "update": tensors(
            [lambda path: write_update(path, update), lambda path: write_update(path, fedavg)],
            lambda path: read_update(path, model=model),
            checks.check_update(model),
        ),
        "update truth": tensors(
            [lambda path: write_update_truth(path, facts), lambda path: write_update_truth(path, several)],
            read_update_truth,
            checks.check_update_truth,
        ),
        "granted": tensors(
            [lambda path: checkpoint.save(path, granted, {"batch_size": 2})], read_granted, checks.check_granted
        ),
        "reconstruction": tensors(
            [lambda path: save_reconstruction(path, saved)], load_reconstruction, checks.check_reconstruction
        ),
        "inversion": tensors([lambda path: save_inversion(path, inverted)], load_inversion, checks.check_inversion),
        "record": Kind([record], reader(read_record), checks.check_record, changed_text),
        "samples": tensors(
            [lambda path: checkpoint.save(path, samples, {"prompts": ["a", "b"]})], read_samples, checks.check_samples
        ),
        "scores": tensors([lambda path: checkpoint.save(path, scores, {})], read_scores, checks.check_scores),
        **_pictures(folder / "pictures"),
    }


def _transcripts(sent: list[bytes]) -> Iterator[Callable[[Path], None]]:
    whole, half, conventional, answered, hidden = sent
    for scheme, defences, first in (
        ("split", Defences(timestep_floor=600), whole),
        ("split", Defences(half=True), half),
        ("split_gradients", Defences(), conventional),
        ("u_shaped", Defences(), answered),
        ("split", Defences(hide_prompts=True), hidden),
    ):
        header = wire.Header("r", "shapes", scheme, defences, 16, "ab" * 32, 2)
        second = put_together(parts(first)[0] | {"__metadata__": {"v": "1", "c": "0", "s": "6"}}, parts(first)[1])
        yield lambda path, header=header, both=(first, second): wire.write_transcript(path, header, both)


def _pictures(folder: Path) -> dict[str, Kind]:
    """Return images, and the tables and archives that go with them; see `mutations`."""
    folder.mkdir()
    known = list(mutations.originals(folder))
    found = {}
    for kind, is_image in (("image", True), ("metadata", False)):
        chosen = [entry for entry in known if mutations.is_picture(entry[0]) == is_image]
        turns = itertools.cycle(chosen)

        def read(content: bytes, turns: Iterator[tuple[str, bytes, dict]] = turns) -> Any:
            name, _, options = next(turns)
            return mutations.read(folder, name, content, options)

        found[kind] = Kind([content for _, content, _ in chosen], read, checks.check_images, mutations.mutated)
    return found
