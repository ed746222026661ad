"""splitlab: what can the other side reconstruct when a diffusion model is trained on private images?

What is listed in `__init__.pyi` is loaded when it is first asked for: `import splitlab` takes no time.
"""

import logging as _logging
import os as _os

import lazy_loader as _lazy_loader

# diffusers and transformers announce optional packages that splitlab does without; errors still come through.
_os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
_os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
_os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
_logging.getLogger("transformers").setLevel(_logging.ERROR)

__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
