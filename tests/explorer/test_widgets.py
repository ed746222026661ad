import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from world import names
from world.project import opened

from splitlab.core import checkpoint
from splitlab.core.paths import ROOT
from splitlab.core.pixels import to_uint8
from splitlab.diffusion import metrics
from splitlab.explorer import AttackPanel, Explorer, Gallery, PlannerPanel, PlaygroundPanel, explore, markup
from splitlab.explorer.explore import Artefacts
from splitlab.explorer.playground import Playground
from splitlab.explorer.run_view import comparison, sample_scores
from splitlab.split.defences import DEFENCES, Defences


@pytest.fixture
def project(explored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(explored, tmp_path / "project"))


@pytest.fixture
def artefacts(project: Path) -> Artefacts:
    return opened(project)


@pytest.fixture
def explorer(artefacts: Artefacts) -> Explorer:
    return Explorer(artefacts)


def files(project: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file() and ".cache" not in path.parts
    }


def test_only_attacked_runs_are_offered_and_described_in_words(explorer: Explorer):
    assert list(explorer.run.options) == ["plain", "guarded"]
    assert "defences" in explorer.about.value
    assert "none" in explorer.about.value
    explorer.run.value = "guarded"
    for words in ("S1 split (nothing returns)", "2 clients", "timesteps from 200 up", "fixed noise per client"):
        assert words in explorer.about.value


def test_the_attack_that_identifies_most_is_shown_first(explorer: Explorer):
    strengths = explorer.view.strengths
    guesses = {"mean_public", "random_public"}
    most = max(own.share for name, own in strengths.items() if name not in guesses)
    assert explorer.attack.value not in guesses
    assert strengths[explorer.attack.value].share == most
    assert "strongest attack" in explorer.about.value


def unscored(project: Path, *, but: int) -> None:
    """Leave `plain` with scores of its sample `but` alone, as the survey's transcripts have them of a part."""
    tensors, meta = checkpoint.load(project / "scores/plain.safetensors")
    for value in tensors.values():
        value[[place for place in range(len(value)) if place != but]] = torch.nan
    checkpoint.save(project / "scores/plain.safetensors", tensors, meta)


def test_a_sample_that_was_not_scored_is_said_to_be_so_by_every_attack(project: Path):
    unscored(project, but=2)
    explorer = Explorer(opened(project))
    view, samples = explorer.view, explorer.view.within(0, 1000)
    assert explorer.position == 2, "the explorer begins with a sample that was scored"
    assert "not scored" not in explorer.scores.value
    explorer.sample.value = (samples.index(2) + 1) % len(samples)
    assert list(view.attempts)
    for attack in view.attempts:
        explorer.attack.value = attack
        shown = explorer.scores.value + explorer.comparison.value
        assert "<b>not scored</b><span>identified among 10</span>" in shown
        assert "This sample was not scored: the evaluation scores the first 64" in shown
        assert explorer.comparison.value.count("<td>not scored</td>") == len(view.attempts)
        assert not re.search(r">(yes|no|nan|0 of \d)<|nan%|nan dB", shown)


def test_moving_the_sample_slider_shows_the_next_sample(explorer: Explorer):
    view, before = explorer.view, (explorer.position, explorer.pictures.value)
    explorer.sample.value += 1
    images = view.known.private.images[view.known.truth.indices]
    assert not torch.equal(images[before[0]], images[explorer.position])
    assert explorer.pictures.value != before[1]
    truth = explore.png(to_uint8(images[explorer.position]))
    assert markup.image(truth, "Private: image") in explorer.pictures.value
    assert f"t = {int(view.timesteps[explorer.position])}" in explorer.caption.value
    assert view.prompt(explorer.position) in explorer.caption.value


def test_the_slider_walks_through_the_chosen_timesteps_in_order(explorer: Explorer):
    view = explorer.view
    explorer.timesteps.value = (300, 700)
    seen = []
    for place in range(explorer.sample.max + 1):
        explorer.sample.value = place
        seen.append(int(view.timesteps[explorer.position]))
    wanted = view.timesteps[(view.timesteps >= 300) & (view.timesteps <= 700)]
    assert seen == sorted(wanted.tolist())


def test_a_sample_stays_shown_while_the_range_holds_it(explorer: Explorer):
    explorer.sample.value = 10
    position = explorer.position
    explorer.timesteps.value = (int(explorer.view.timesteps[position]) // 50 * 50, 1000)
    assert explorer.position == position


def test_a_run_with_fewer_samples_can_follow_one_with_more(explorer: Explorer):
    explorer.sample.value = explorer.sample.max
    explorer.attack.value = "random_public"
    explorer.run.value = "guarded"
    assert len(explorer.view.timesteps) == 12
    assert explorer.position in range(12)
    assert explorer.attack.value == "random_public"
    assert "of 12" in explorer.caption.value


def test_an_empty_range_is_said_to_be_empty(explorer: Explorer):
    explorer.run.value = "guarded"
    explorer.timesteps.value = (0, 100)
    assert "No recorded sample has a timestep from 0 to 100" in explorer.pictures.value
    assert explorer.comparison.value == ""
    explorer.timesteps.value = (0, 1000)
    assert "<img" in explorer.pictures.value


def test_shown_scores_are_those_of_the_evaluation(explorer: Explorer, project: Path):
    scores, _ = checkpoint.load(project / "scores" / "plain.safetensors")
    for attack in explorer.view.attempts:
        explorer.attack.value = attack
        for place in (0, 5, 11):
            explorer.sample.value = place
            sample = explorer.position
            shown = sample_scores(explorer.view, explorer.current, sample)
            assert shown["psnr_db"] == scores[f"{attack}/0/psnr_db"][sample]
            assert shown["no_info_psnr_db"] == scores["mean_public/0/psnr_db"][sample]
            assert shown["ceiling_psnr_db"] == scores["ceiling_psnr_db"][sample]
            assert f"<b>{shown['psnr_db']:.1f} dB</b><span>PSNR</span>" in explorer.scores.value
            verdict = "yes" if scores[f"{attack}/0/identified"][sample] > 0.5 else "no"
            assert f"<b>{verdict}</b><span>identified among 10</span>" in explorer.scores.value


def test_the_comparison_holds_every_attack_and_every_seed(explorer: Explorer, project: Path):
    scores, _ = checkpoint.load(project / "scores" / "plain.safetensors")
    rows = {row["attack"]: row for row in comparison(explorer.view, 3)}
    assert list(rows) == ["mean_public", "random_public", "closed_form", "inverse_network-without-noise"]
    assert rows["random_public"]["psnr_db"] == [float(scores[f"random_public/{seed}/psnr_db"][3]) for seed in (0, 1)]
    assert explorer.comparison.value.count('class="bar"') == len(rows)
    assert "noise label" in rows["closed_form"]["uses"]
    assert "noise label" not in rows["inverse_network-without-noise"]["uses"]


def test_attack_and_seed_choose_the_reconstruction_and_its_threat_model(explorer: Explorer):
    explorer.attack.value = "random_public"
    assert list(explorer.seed.options) == [0, 1]
    assert not explorer.seed.disabled
    sample, first = explorer.position, explorer.pictures.value
    tries = explorer.view.attempts["random_public"]
    assert not torch.equal(tries[0].images[sample], tries[1].images[sample])
    explorer.seed.value = 1
    assert explorer.pictures.value != first
    assert markup.image(explore.png(tries[1].images[sample]), "Reconstructed: image") in explorer.pictures.value
    explorer.attack.value = "inverse_network-without-noise"
    assert explorer.seed.disabled
    uses = dict(explorer.current.threat_model)["uses of it"]
    assert "noise," not in uses.replace("noisy_latents", "")
    assert uses in explorer.threats.value


def test_dragging_reads_no_file(explorer: Explorer, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path):
        raise AssertionError(f"read {path}")

    monkeypatch.setattr(checkpoint, "load", refuse)
    for place in range(explorer.sample.max):
        explorer.sample.value = place
    assert explorer.message.value == ""


def test_a_run_is_read_again_when_its_files_change(artefacts: Artefacts, project: Path):
    view = artefacts.view("plain")
    assert artefacts.view("plain") is view
    (project / "reconstructions/plain/closed_form-0.safetensors").unlink()
    assert "closed_form" not in artefacts.view("plain").attempts


def remove(path: str) -> Callable[[Path], None]:
    return lambda project: shutil.rmtree(project / path) if (project / path).is_dir() else (project / path).unlink()


def damage(path: str) -> Callable[[Path], None]:
    return lambda project: (project / path).write_bytes(b"not what it was")


def misplace(project: Path) -> None:
    shutil.copy(project / "reconstructions/guarded/closed_form-0.safetensors", project / "reconstructions/plain")
    tensors, meta = checkpoint.load(project / "reconstructions/plain/closed_form-0.safetensors")
    shorter = {name: value[:5] for name, value in tensors.items()}
    checkpoint.save(project / "reconstructions/plain/closed_form-0.safetensors", shorter, meta)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove("reconstructions"), "no run has been attacked yet"),
        (remove("runs/plain"), "record.json: missing"),
        (remove("runs/plain/truth.safetensors"), "truth.safetensors: no such file"),
        (remove("models"), "base model"),
        (remove("data/private"), "private"),
        (damage("reconstructions/plain/closed_form-0.safetensors"), "closed_form-0.safetensors: damaged"),
        (damage("scores/plain.safetensors"), "plain.safetensors: damaged"),
        (misplace, "of another transcript"),
    ],
)
def test_what_is_missing_is_said_with_the_command_that_makes_it(
    project: Path, spoil: Callable[[Path], None], said: str
):
    spoil(project)
    explorer = Explorer(opened(project))
    assert said in explorer.message.value
    assert "dvc" in explorer.message.value
    assert explorer._body.layout.display == "none"
    AttackPanel(explorer)


def test_a_good_run_can_be_chosen_after_a_bad_one(project: Path):
    remove("runs/plain")(project)
    explorer = Explorer(opened(project))
    explorer.run.value = "guarded"
    assert explorer.message.value == ""
    assert "<img" in explorer.pictures.value


def test_without_scores_the_pictures_are_shown_nevertheless(project: Path):
    remove("scores")(project)
    explorer = Explorer(opened(project))
    assert "<img" in explorer.pictures.value
    assert "dvc repro evaluate" in explorer.scores.value


def test_a_live_attack_scores_as_in_the_pipeline_and_writes_nothing(explorer: Explorer, project: Path):
    before = files(project)
    panel = AttackPanel(explorer)
    panel.attack.value = "closed_form"
    panel.button.click()
    panel.thread.join(60)
    assert panel.progress.bar_style == "success", panel.message.value
    assert explorer.attack.value == "live: closed_form"
    live, saved = explorer.current, explorer.view.attempts["closed_form"][0]
    assert torch.equal(live.images, saved.images)
    assert live.scores.keys() == saved.scores.keys()
    assert all(torch.equal(live.scores[name], saved.scores[name]) for name in saved.scores)
    assert files(project) == before


def test_a_live_attack_takes_fields_options_and_seed(explorer: Explorer):
    panel = AttackPanel(explorer)
    panel.attack.value = "inverse_network"
    panel.options["steps"].value, panel.options["width"].value, panel.seed.value = 3, 8, 0
    panel.fields["noise"].value = False
    panel.button.click()
    panel.thread.join(60)
    assert explorer.attack.value == "live: inverse_network-without-noise"
    assert torch.equal(explorer.current.images, explorer.view.attempts["inverse_network-without-noise"][0].images)


def test_a_live_attack_that_lacks_its_field_says_so(explorer: Explorer):
    panel = AttackPanel(explorer)
    panel.attack.value = "closed_form"
    panel.fields["noise"].value = panel.fields["smashed"].value = False
    panel.button.click()
    panel.thread.join(60)
    assert "carries no noise" in panel.message.value
    assert panel.status.value == "stopped"
    assert not panel.button.disabled


def test_a_live_attack_can_be_cancelled(explorer: Explorer):
    panel = AttackPanel(explorer)
    panel.attack.value = "inverse_network"
    panel.options["steps"].value = 1_000_000
    panel.button.click()
    panel.cancel.click()
    panel.thread.join(60)
    assert not panel.thread.is_alive()
    assert panel.status.value == "cancelled"
    assert not any(name.startswith("live") for name in explorer.view.attempts)


def test_the_gallery_shows_every_runs_pairs(artefacts: Artefacts, project: Path):
    gallery = Gallery(artefacts, shown=3)
    assert list(gallery.run.options) == ["plain", "guarded", "central"]
    tensors, meta = checkpoint.load(project / "runs/plain/samples.safetensors")
    assert gallery.pictures.value.count("<figure") == 3
    gallery.first.value = 3
    assert meta["prompts"][3] in gallery.pictures.value
    assert markup.image(explore.png(tensors["hints"][3], side=96), "hint") in gallery.pictures.value
    gallery.run.value = "central"
    assert "central" in gallery.about.value


def test_the_gallery_says_when_nothing_was_trained(project: Path):
    remove("runs")(project)
    assert "dvc repro" in Gallery(opened(project)).message.value


def test_the_playgrounds_closed_form_reaches_the_ceiling_without_defences(artefacts: Artefacts):
    playground = Playground(artefacts.base, artefacts.split("shapes", "public"), n_client=12)
    trial = playground.trial(3, 700, Defences())
    assert trial.psnr_db == pytest.approx(trial.ceiling_psnr_db, abs=0.05)
    hint = playground.images.hints[3:4]
    ceiling = metrics.psnr_db(artefacts.base.decode(artefacts.base.encode(hint)), hint)
    assert trial.hint_psnr_db == pytest.approx(float(ceiling), abs=0.05)


def test_the_hint_needs_no_label(artefacts: Artefacts):
    playground = Playground(artefacts.base, artefacts.split("shapes", "public"), n_client=12)
    defences = Defences(symsigmoid=True, half=True)
    sent, hidden = (playground.trial(3, 700, defences, send_label=label) for label in (True, False))
    assert hidden.hint_psnr_db == sent.hint_psnr_db
    assert hidden.psnr_db != sent.psnr_db
    assert hidden.size_bytes < sent.size_bytes
    label = hidden.groups[1][2][2]
    assert (label.caption, label.png, label.note) == ("noise label", None, "not sent")


PLAYED = {
    "timestep_floor": 800,
    "latent_norm": 1.0,
    "feature_noise": 0.3,
    "matched": True,
    "hint_noise": 1.0,
    "per_image_noise": True,
    "coarse_hints": 2,
    "random_symmetry": True,
    "symsigmoid": False,
    "half": False,
    "fixed_noise": 1.0,
    "key_mixing": 4,
    "patch_shuffle": 2,
    "fresh_keys": True,
    "borrowed_colours": True,
}
"""One defence after the other, each beside those before it."""


def test_every_control_of_the_playground_changes_what_is_shown(artefacts: Artefacts):
    panel = PlaygroundPanel(artefacts)
    assert panel.message.value == ""
    changes = {
        panel.image: 5,
        panel.timestep: 100,
        panel.messages: 4,
        panel.label: False,
    }
    changes |= {panel.defences[name]: value for name, value in PLAYED.items()}
    for widget, value in changes.items():
        before = panel.pictures.value + panel.scores.value
        assert widget.value != value
        widget.value = value
        assert panel.pictures.value + panel.scores.value != before, widget.description
        assert panel.message.value == "", widget.description
    assert "this attacker does not undo key_mixing, patch_shuffle, fresh_keys" in panel.scores.value


def test_the_playground_offers_all_defences_and_says_which_no_client_could_apply(artefacts: Artefacts):
    panel = PlaygroundPanel(artefacts)
    assert set(panel.defences) == set(DEFENCES)
    for name, needs in {
        "matched": "say how feature_noise is added",
        "independent_draws": "say how feature_noise is added",
        "per_image_noise": "give feature_noise or hint_noise",
        "fresh_keys": "needs a key",
    }.items():
        panel.defences[name].value = True
        assert needs in panel.message.value
        panel.defences[name].value = False
        assert panel.message.value == ""


def test_the_playgrounds_client_names_the_timesteps_of_a_matched_client(artefacts: Artefacts):
    playground = Playground(artefacts.base, artefacts.split("shapes", "public"), n_client=12)
    plain, matched = (
        playground.messages(3, 300, defences, 12).need("timesteps")
        for defences in (Defences(), Defences(feature_noise=1.0, matched=True))
    )
    assert plain[0] == 300
    alphas = artefacts.base.alphas_cumprod
    assert alphas[matched[0]].item() == pytest.approx(alphas[300].item() / 2, rel=0.02)
    floored = playground.messages(3, 300, Defences(timestep_floor=600, key_mixing=4), 12).need("timesteps")
    assert floored[:4].tolist() == [600] * 4  # no client sends less


def test_the_playground_says_when_data_or_base_are_missing(project: Path):
    remove("data/public")(project)
    panel = PlaygroundPanel(opened(project))
    assert "dvc pull" in panel.message.value


def test_the_planner_proposes_for_one_message_what_it_does_not_for_a_run(project: Path):
    panel = PlannerPanel(opened(project))
    assert panel.message.value == ""
    assert "secretly turned" in panel.proposal.value
    assert "noise drawn once" not in panel.proposal.value
    assert "random_symmetry: true" in panel.proposal.value
    panel.messages.value = 29
    assert "noise drawn once" in panel.proposal.value
    assert panel.settings.value.count('<tr class="chosen">') == 1


def test_the_planner_says_which_target_nothing_meets_and_still_shows_what_there_is(project: Path):
    panel = PlannerPanel(opened(project))
    panel.target.value = 0.05
    assert "no setting measured meets identification" in panel.message.value
    assert panel.proposal.value == ""
    assert "secretly turned" in panel.settings.value
    assert "chosen" not in panel.settings.value


def test_the_planner_says_where_its_tables_are(project: Path):
    panel = PlannerPanel(opened(project), metrics=project)
    assert "matched_client.csv" in panel.message.value
    assert panel.settings.value == panel.proposal.value == ""


def test_a_picture_is_blown_up_pixel_by_pixel():
    pixels = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    large = np.asarray(Image.open(io.BytesIO(explore.png(pixels, side=150))))
    assert large.shape == (160, 160, 3)
    assert np.array_equal(large[5::10, 5::10], pixels.permute(1, 2, 0).numpy())


def test_false_colour_is_red_above_zero_blue_below_and_one_tile_per_channel():
    maps = torch.stack([torch.full((2, 2), value) for value in (1.0, -1.0, 0.0)])
    red, green, blue = explore.false_colour(maps).int()
    assert red.shape == (4, 4)
    assert (red[:2, :2] > blue[:2, :2] + 50).all()
    assert (blue[:2, 2:] > red[:2, 2:] + 50).all()
    assert (red[2:, :2] > 240).all()
    assert (green[2:, :2] > 240).all()


def test_text_from_data_is_escaped(explorer: Explorer):
    evil = '<img src=x onerror="alert(1)">'
    private = explorer.view.known.private
    object.__setattr__(private, "prompts", (evil,) * len(private))
    explorer.sample.value += 1
    assert "onerror" in explorer.caption.value
    for shown in (
        explorer.caption.value,
        markup.gallery([(b"", b"", evil)]),
        markup.message(evil),
        markup.rows([(evil, evil)]),
    ):
        assert evil not in shown
        assert "<img src=x" not in shown


def test_only_the_explorer_imports_ipywidgets():
    importers = {
        path.parent.name
        for path in (ROOT / "splitlab").rglob("*.py")
        for name, _ in names.reached(path.read_text(), names.package_of(path, ROOT))
        if name.startswith(("ipywidgets", "splitlab.explorer"))
    }
    assert importers == {"explorer"}
