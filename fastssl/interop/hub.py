"""Models of the Hugging Face Hub: which files are needed, and their download."""

import re
from pathlib import Path

from fastssl.models.folder import COMPRESSOR_FILE

_SAFETENSORS = [COMPRESSOR_FILE, "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def may_be_id(name: str) -> bool:
    """Whether it looks like the name of a model on the Hub, as "facebook/hubert-base-ls960"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def download(name: str) -> Path:
    """The folder of a model of the Hub: its configs and weights alone, from the cache where they are there.

    Raises:
        ValueError: huggingface_hub is not installed, the Hub cannot be reached, or it has no such model; or the model
            is gated.
    """
    missing = f"{name}: there is no such file or folder here"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{missing}; to look for it on the Hub: pip install huggingface_hub") from None
    try:
        folder = Path(
            snapshot_download(name, allow_patterns=["config.json", "preprocessor_config.json", *_SAFETENSORS])
        )
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=_PICKLES))
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(f"{missing}, and the Hub did not give it: {type(error).__name__}: {reason}") from error
    return folder
