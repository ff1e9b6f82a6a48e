"""Download a model's config and weights from the Hugging Face Hub."""

import re
from pathlib import Path

from fastssl.models.folder import COMPRESSOR_FILE, PREPROCESSOR_FILES, language_files

_SAFETENSORS = [COMPRESSOR_FILE, "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def may_be_id(name: str) -> bool:
    """Return whether a name has the form of a model's name on the Hub, such as "facebook/hubert-base-ls960"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def download(name: str, *, cached: bool = False, language: str | None = None) -> Path:
    """Download the configs and weights of a model on the Hub, or find them in the local cache.

    Pickled weights are downloaded only if the model has none in safetensors.

    Args:
        name: Name of the model, such as "facebook/hubert-base-ls960".
        cached: Download nothing: the model must be in the local cache.
        language: Language whose adapters are wanted too, of a model that has several.

    Returns:
        The folder with the files, in the cache of huggingface_hub.

    Raises:
        ValueError: huggingface_hub is not installed, the Hub cannot be reached, it has no such model, or the model is
            gated.
    """
    adapters = [] if language is None else list(language_files(language))
    missing = f"{name}: no such file or folder here"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{missing}; to load it from the Hub, run `pip install huggingface_hub`") from None
    try:
        folder = Path(
            snapshot_download(
                name,
                allow_patterns=["config.json", *PREPROCESSOR_FILES, *_SAFETENSORS, *adapters],
                local_files_only=cached,
            )
        )
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=_PICKLES, local_files_only=cached))
    except (OSError, ValueError) as error:
        if cached:
            raise ValueError(f"{missing}, and a model that a file names is not downloaded") from None
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(f"{missing}, and loading from the Hub failed: {type(error).__name__}: {reason}") from error
    return folder
