"""The tokenizer of a base model, loaded by itself."""

from pathlib import Path

from transformers import CLIPTextConfig, CLIPTokenizer

from splitlab.core.errors import InputError
from splitlab.diffusion.base_kinds import load_tokenizer
from splitlab.diffusion.base_source import locate


def tokenizer_of(source: str | Path) -> CLIPTokenizer:
    """Load the tokenizer of a base model alone; `model_max_length` is what the text model takes.

    Raises:
        InputError: there is no such base model, or its tokenizer or text model's configuration is damaged.
    """
    folder = locate(source)
    try:
        text = CLIPTextConfig.from_pretrained(str(folder / "text_encoder"), local_files_only=True)
    except Exception as error:  # the library raises many types
        raise InputError(f"{folder / 'text_encoder'}: no configuration can be read ({error})") from None
    return load_tokenizer(folder / "tokenizer", text)
