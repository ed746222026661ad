"""Private fine-tuning by a grid: which part of the model, at which ε, and what its samples are then worth."""

import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core import checkpoint
from splitlab.core.config import Count, Natural, Settings, one_of, parse, reseeded
from splitlab.core.seeds import generator
from splitlab.data.image_set import ImageSet, digest
from splitlab.data.overlap import refuse_overlap
from splitlab.diffusion.base import Base
from splitlab.dp.attacks.membership import membership_auc
from splitlab.dp.conditioning import labels_of
from splitlab.dp.finetune import DPConfig, finetune
from splitlab.dp.public import warped_copies
from splitlab.dp.sample import Tuned, load_tuned, sample, untuned
from splitlab.privacy.accounting import epsilon_words, recorded_epsilon
from splitlab.privacy.audit import audit
from splitlab.study.config import GRIDS
from splitlab.study.dp_evaluate import Classifier, frechet_distance, joint_accuracy, train_classifier

COLUMNS = (
    *("dataset", "trainable", "n_trainable", "epsilon", "randomness", "delta", "noise_multiplier", "max_grad_norm"),
    *("sample_rate", "steps", "multiplicity", "seed", "downstream_acc", "frechet", "features", "mia_auc"),
    *("audit_epsilon_lb", "step_s", "peak_rss_mb", "conditioning", "n", "n_test", "n_samples"),
)

PUBLIC, START, REAL = "public base", "public start", "real images"
"""What stands for a trainable set in the contrast rows: the base; what fine-tuning starts from, where that is the base
fine-tuned on more public images; and no generator at all."""

CONTRASTS = (PUBLIC, START, REAL)

VOTES = 3
"""Classifiers per model, whose probabilities are averaged: one alone varies by a few points from seed to seed."""

MANY = 100
"""Public prompts up to which a classifier that tells them apart serves as the eyes of the Fréchet distance."""

LoadSplit = Callable[[str, str], ImageSet]
"""`(dataset, split) -> data`."""


@dataclass(frozen=True)
class DPCell:
    """One way to fine-tune, at several ε.

    Attributes:
        trainable: a key of `splitlab.diffusion.trainable.TRAINABLE`.
        epsilons: guarantees; `.inf`: not private.
        options: other fields of `DPConfig` that differ from `DPSurveyConfig.common`.
        grids: the grids it belongs to.
    """

    trainable: str = "attention"
    epsilons: tuple[float, ...] = (math.inf,)
    options: dict[str, Any] = field(default_factory=dict)
    grids: tuple[str, ...] = GRIDS


@dataclass(frozen=True)
class DPSurveyConfig(Settings):
    """Which models are fine-tuned and how they are judged.

    Attributes:
        grid: "default" or "full".
        common: what all runs share.
        cells: the runs.
        start: fields of `DPConfig` that differ from `common`, for fine-tuning the base on warped public images of the
            same classes first, without privacy: what all runs start from. Empty: they start from the base.
        warps: copies of each public image for that; the first one too is warped.
        warp_std: see `splitlab.dp.public.warped`.
        seeds: runs per cell, which differ in every draw; so do their samples and classifiers.
        test_split: the split that classifiers are tested on; private, and never trained on.
        withheld: in place of `test_split`, this many private images are kept from all training and tested on; 0: none.
        n_samples: images generated per run.
        sample_steps: of DDIM.
        classifier_steps: of every classifier that judges.
    """

    grid: Annotated[str, one_of(GRIDS)] = "default"
    common: DPConfig = field(default_factory=DPConfig)
    cells: tuple[DPCell, ...] = ()
    start: dict[str, Any] = field(default_factory=dict)
    warps: int = 5
    warp_std: float = 0.15
    seeds: Count = 3
    test_split: str = "private-test"
    withheld: Natural = 0
    n_samples: Count = 1000
    sample_steps: Count = 20
    classifier_steps: Count = 600

    @property
    def runs(self) -> dict[str, DPConfig]:
        """The grid's runs by name."""
        found = {}
        for cell in (cell for cell in self.cells if self.grid in cell.grids):
            for epsilon, seed in product(cell.epsilons, range(self.seeds)):
                own: dict[str, Any] = {"trainable": cell.trainable, "epsilon": float(epsilon)}
                values = vars(reseeded(self.common, seed)) | own | cell.options
                run = parse(DPConfig, values, where=f"dp, options of {cell.trainable}")
                found[f"{cell.trainable}-{epsilon:g}-{seed}"] = run
        return found


@dataclass(frozen=True)
class Judge:
    """Everything a model is judged by.

    Attributes:
        base: the public models.
        private: what the models were fine-tuned on.
        test: real data of the same kind, for classifiers and as non-members.
        classes: the prompts of the classes; empty for models that are not class-conditional.
        eyes: a classifier trained on public data, whose features the Fréchet distance uses; None: the VAE's latents.
        config: the survey.
        start: what all runs start from; None: the base.
    """

    base: Base
    private: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    eyes: Classifier | None
    config: DPSurveyConfig
    start: Tuned | None = None

    @property
    def key(self) -> str:
        """Name all that a row depends on besides its model, so that a row of other judges is not taken for it."""
        config = self.config
        how = (config.n_samples, config.sample_steps, config.classifier_steps, VOTES)
        start = self.start.record if self.start else None
        return digest({"how": how, "base": self.base.digest, "start": start, "test": self.test.digest})[:12]

    @property
    def features(self) -> str:
        """Name the features of the Fréchet distance."""
        return "classifier of public images" if self.eyes else "latents of the public VAE, 4 x 4"

    def asked(self) -> list[int] | list[str] | int:
        """Return what to generate: all classes alike, the test split's prompts in turn, or so many images."""
        n = self.config.n_samples
        if self.config.common.conditioning == "none":
            return n
        if self.config.common.conditioning == "class":
            return [i % len(self.classes) for i in range(n)]
        prompts = self.classes or self.test.prompts
        return [prompts[i % len(prompts)] for i in range(n)]

    def judge(self, images: Tensor, labels: Tensor | None, seed: int) -> dict[str, float]:
        """Score generated (or real) images `[n, 3, h, w]` and their labels."""
        found = {"frechet": round(frechet_distance(self.look(images), self.look(self.test.images)), 4)}
        if labels is not None:
            seeds, same = range(VOTES * seed, VOTES * (seed + 1)), {"steps": self.config.classifier_steps}
            each = [train_classifier(images, labels, n_classes=len(self.classes), seed=one, **same) for one in seeds]
            wanted = labels_of(self.test.prompts, self.classes)
            found["downstream_acc"] = round(joint_accuracy(each, self.test.images, wanted), 4)
        return found

    def look(self, images: Tensor) -> Tensor:
        """Return features `[n, d]`."""
        if self.eyes:
            return self.eyes.features(images)
        return F.adaptive_avg_pool2d(self.base.encode(images), 4).flatten(1)


def make_judge(config: DPSurveyConfig, base: Base, load: LoadSplit, *, cache: Path) -> Judge:
    """Load the data, train the classifier whose features are compared, and make what all runs start from.

    Only public images go into the last two. The classifier tells the public split's prompts apart, where they are few.
    """
    dataset, classes = config.common.dataset, config.common.classes
    private, public = load(dataset, "private"), load(dataset, "public")
    if config.withheld:
        order = torch.randperm(len(private), generator=generator("withheld")).tolist()
        private, test = private.subset(order[config.withheld :]), private.subset(order[: config.withheld])
    else:
        test = load(dataset, config.test_split)
    refuse_overlap({"private": private, "public": public, "test": test}, dataset=dataset)
    eyes, names = None, sorted(set(public.prompts))
    if 1 < len(names) <= MANY:
        labels = labels_of(public.prompts, names)
        eyes = train_classifier(public.images, labels, n_classes=len(names), seed=0, steps=config.classifier_steps)
    start = public_start(config, base, public, cache=cache) if config.start else None
    return Judge(base, private, test, classes, eyes, config, start)


def public_start(config: DPSurveyConfig, base: Base, public: ImageSet, *, cache: Path) -> Tuned:
    """Fine-tune the base on warped public images, or load what an earlier call made of it; nothing in it is secret."""
    options: dict[str, Any] = {"trainable": "unet", "published_key": config.common.seed}
    run = parse(DPConfig, vars(config.common) | options | config.start, where="dp, start")
    data = warped_copies(public, config.warps, std=config.warp_std)
    folder = cache / "dp" / f"start-{digest({'run': run, 'base': base.digest, 'data': data.digest})[:16]}"
    if not (folder / "record.json").exists():
        finetune(folder.name, run, base, data, out=folder, cache=folder.parent)
    return load_tuned(folder)


def dp_survey(
    config: DPSurveyConfig, base: Base, load: LoadSplit, *, cache: Path
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Fine-tune, generate and judge every run of the grid; what was done before is read from `cache`.

    Returns a table of `COLUMNS`, and per row of pictures its label and ten generated images `[10, 3, h, w]`.
    """
    judge = make_judge(config, base, load, cache=cache)
    rows, pictures = _contrasts(judge, cache / "dp" / f"{config.common.dataset}-{judge.key}")
    facts: dict[str, Any] = {"base": base.digest, "start": judge.start.record if judge.start else None}
    facts |= {"private": judge.private.digest, "test": judge.test.digest, "samples": config.n_samples}
    for name, run in (bar := tqdm(config.runs.items(), desc="DP survey")):
        bar.set_postfix_str(name)
        folder = cache / "dp" / f"{config.common.dataset}-{name}-{digest({'run': run} | facts)[:16]}"
        row, shown = _one(run, judge, folder)
        rows.append(row)
        if run.seed == 0:
            pictures[f"{run.trainable}, {epsilon_words(run.epsilon, run.randomness, digits='g')}"] = shown
    return pd.DataFrame(rows, columns=list(COLUMNS)), pictures


def _one(run: DPConfig, judge: Judge, folder: Path) -> tuple[dict[str, Any], Tensor]:
    """Do one run, or go on with what an earlier call made of it: the model, its images, its row."""
    if not (folder / "cost.json").exists():
        began = time.perf_counter()
        out, cache = folder / "model", folder.parent
        finetune(folder.name, run, judge.base, judge.private, out=out, cache=cache, start=judge.start)
        step_s = round((time.perf_counter() - began) / run.steps, 3)
        peak_rss_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        checkpoint.save_json(folder / "cost.json", {"step_s": step_s, "peak_rss_mb": peak_rss_mb})
    tuned = load_tuned(folder / "model")
    images = _generate(judge, tuned, run.seed, folder)
    done = folder / f"row-{judge.key}.json"
    if not done.exists():
        kept = ("n_trainable", "randomness", "sample_rate", "noise_multiplier")
        row = _row(judge, run, run.trainable) | {key: tuned.record[key] for key in kept}
        row["epsilon"] = recorded_epsilon(tuned.record)
        row |= _judged(judge, images, run.seed) | checkpoint.load_json(folder / "cost.json")
        row |= {"mia_auc": _membership(judge, tuned), "audit_epsilon_lb": _audited(run, tuned.record)}
        checkpoint.save_json(done, row)
    return checkpoint.load_json(done), images[:10]


def _contrasts(judge: Judge, cache: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Judge the public models, which have seen no private image, and the private images themselves."""
    labels = labels_of(judge.private.prompts, judge.classes) if judge.classes else None
    first = range(10) if labels is None else [int((labels == c).nonzero()[0]) for c in range(len(judge.classes))]
    rows: list[dict[str, Any]] = []
    pictures = {"real private images": judge.private.images[first]}
    models = {PUBLIC: untuned(judge.base, judge.config.common.conditioning, classes=judge.classes)}
    models |= {START: judge.start} if judge.start else {}
    for seed, name in product(range(judge.config.seeds), (*models, REAL)):
        model = models.get(name)
        images = _generate(judge, model, seed, cache / name.replace(" ", "-")) if model else judge.private.images
        done = cache / f"row-{name.replace(' ', '-')}-{seed}.json"
        if not done.exists():
            row = _row(judge, replace(judge.config.common, seed=seed), name)
            row |= {"n_trainable": 0, "epsilon": 0.0} if model else {"epsilon": math.inf}
            row |= _judged(judge, images, seed) if model else judge.judge(images, labels, seed)
            checkpoint.save_json(done, row)
        rows.append(checkpoint.load_json(done))
        if model:
            pictures.setdefault(name, images[:10])
    return rows, pictures


def _row(judge: Judge, run: DPConfig, trainable: str) -> dict[str, Any]:
    same = ("dataset", "conditioning", "delta", "max_grad_norm", "steps", "multiplicity", "seed")
    row = {name: getattr(run, name) for name in same} if trainable not in CONTRASTS else {}
    row |= {"dataset": run.dataset, "conditioning": run.conditioning, "seed": run.seed, "trainable": trainable}
    return row | {
        "features": judge.features,
        "n": len(judge.private),
        "n_test": len(judge.test),
        "n_samples": judge.config.n_samples,
    }


def _generate(judge: Judge, tuned: Tuned, seed: int, folder: Path) -> Tensor:
    """Generate the images that a model is judged by, or read those of an earlier call."""
    config = judge.config
    path = folder / f"images-{seed}-{config.n_samples}-{config.sample_steps}.safetensors"
    if not path.exists():
        draw = generator("dp samples", seed)
        images = sample(judge.base, tuned, judge.asked(), generator=draw, steps=config.sample_steps)
        checkpoint.save(path, {"images": images.half()}, {})
    return checkpoint.load(path, remedy=checkpoint.CACHED)[0]["images"].float()


def _membership(judge: Judge, tuned: Tuned) -> float:
    """Return the AUC of membership inference among as many members as others."""
    n = min(len(judge.private), len(judge.test))
    members, others = judge.private.subset(range(n)), judge.test.subset(range(n))
    return round(membership_auc(judge.base, tuned, members, others, start=judge.start, draws=4), 4)


def _audited(run: DPConfig, record: Mapping[str, Any]) -> float | None:
    """Return the lower bound on ε of canaries under the run's own mechanism; None where nothing is claimed."""
    if not record["noise_multiplier"]:
        return None
    same = {name: record[name] for name in ("sample_rate", "steps", "delta")}
    found = audit(record["noise_multiplier"], multiplicity=run.multiplicity, seed=run.seed, **same)
    return round(found.lower_bound, 4)


def _judged(judge: Judge, images: Tensor, seed: int) -> dict[str, float]:
    labels = torch.arange(len(images)) % len(judge.classes) if judge.classes else None
    return judge.judge(images, labels, seed)
