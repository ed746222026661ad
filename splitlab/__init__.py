"""splitlab: what can the other side reconstruct when a diffusion model is trained on private images?"""

import gc as _gc
import logging as _logging
import os as _os

_gc.disable()  # until all is imported: looking for garbage among modules took three tenths of the time
# diffusers and transformers announce optional packages that splitlab does without; errors still come through.
_os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
_os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
_os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
_logging.getLogger("transformers").setLevel(_logging.ERROR)

from splitlab.core.config import parse  # noqa: E402
from splitlab.core.errors import InputError  # noqa: E402
from splitlab.core.parallel import n_workers  # noqa: E402
from splitlab.core.paths import CACHE, ROOT, resolve  # noqa: E402
from splitlab.data.image_set import ImageSet, load  # noqa: E402
from splitlab.diffusion.base import Base, encoded, load_base  # noqa: E402
from splitlab.diffusion.pretrain import PretrainConfig, pretrain  # noqa: E402
from splitlab.federated.attacks import INVERSIONS  # noqa: E402
from splitlab.federated.attacks.external import attack_gradient  # noqa: E402
from splitlab.params import load_params, load_split, section  # noqa: E402
from splitlab.report.figures.run_figures import draw_figures  # noqa: E402
from splitlab.report.figures.style import show_images  # noqa: E402
from splitlab.split.artefacts import load_reconstruction, save_reconstruction  # noqa: E402
from splitlab.split.attacks import ATTACKS, attack_all, attack_and_save, attack_transcript  # noqa: E402
from splitlab.split.config import AttackSpec, Defences, TrainConfig  # noqa: E402
from splitlab.split.messages import Knowledge, Observation, Reconstruction, Truth  # noqa: E402
from splitlab.split.train import train  # noqa: E402
from splitlab.split.wire import Transcript, read_server, read_transcript  # noqa: E402
from splitlab.study.config import EvaluateConfig  # noqa: E402
from splitlab.study.evaluate import evaluate_all  # noqa: E402
from splitlab.study.survey import SurveyConfig, record_survey, utility  # noqa: E402
from splitlab.study.survey_attack import attack_survey  # noqa: E402
from splitlab.study.update_scores import evaluate_updates  # noqa: E402
from splitlab.study.update_survey import UpdateConfig, attack_updates, record_updates  # noqa: E402

_gc.freeze()
_gc.enable()

__all__ = [
    "ATTACKS",
    "CACHE",
    "INVERSIONS",
    "ROOT",
    "AttackSpec",
    "Base",
    "Defences",
    "EvaluateConfig",
    "ImageSet",
    "InputError",
    "Knowledge",
    "Observation",
    "PretrainConfig",
    "Reconstruction",
    "SurveyConfig",
    "TrainConfig",
    "Transcript",
    "Truth",
    "UpdateConfig",
    "attack_all",
    "attack_and_save",
    "attack_gradient",
    "attack_survey",
    "attack_transcript",
    "attack_updates",
    "draw_figures",
    "encoded",
    "evaluate_all",
    "evaluate_updates",
    "load",
    "load_base",
    "load_params",
    "load_reconstruction",
    "load_split",
    "n_workers",
    "parse",
    "pretrain",
    "read_server",
    "read_transcript",
    "record_survey",
    "record_updates",
    "resolve",
    "save_reconstruction",
    "section",
    "show_images",
    "train",
    "utility",
]
