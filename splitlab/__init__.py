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

from splitlab.abreast import n_workers  # noqa: E402
from splitlab.artefacts import load_reconstruction, save_reconstruction  # noqa: E402
from splitlab.attacks import ATTACKS, attack_all, attack_and_save, attack_transcript  # noqa: E402
from splitlab.base import Base, encoded, load_base  # noqa: E402
from splitlab.canvas import show_images  # noqa: E402
from splitlab.config import parse  # noqa: E402
from splitlab.data import ImageSet, load  # noqa: E402
from splitlab.errors import InputError  # noqa: E402
from splitlab.evaluate import evaluate_all  # noqa: E402
from splitlab.figures import draw_figures  # noqa: E402
from splitlab.inversion import INVERSIONS  # noqa: E402
from splitlab.inversion.external import attack_gradient  # noqa: E402
from splitlab.params import load_params, load_split, section  # noqa: E402
from splitlab.paths import CACHE, ROOT, resolve  # noqa: E402
from splitlab.pretrain import PretrainConfig, pretrain  # noqa: E402
from splitlab.split_config import AttackSpec, Defences, TrainConfig  # noqa: E402
from splitlab.study_config import EvaluateConfig  # noqa: E402
from splitlab.survey import SurveyConfig, record_survey, utility  # noqa: E402
from splitlab.survey_attack import attack_survey  # noqa: E402
from splitlab.train import train  # noqa: E402
from splitlab.types import Knowledge, Observation, Reconstruction, Truth  # noqa: E402
from splitlab.update_scores import evaluate_updates  # noqa: E402
from splitlab.update_survey import UpdateConfig, attack_updates, record_updates  # noqa: E402
from splitlab.wire import Transcript, read_server, read_transcript  # noqa: E402

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
