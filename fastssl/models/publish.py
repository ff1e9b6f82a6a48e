"""Upload an encoder to the Hugging Face Hub."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from fastssl.reading import read_text

_CARD = "README.md"


def upload(
    write: Callable[[Path], None],
    name: str,
    *,
    readme: Path | None,
    replaces_card: bool,
    private: bool | None,
    token: str | None,
    message: str,
) -> str:
    """Upload what `write` puts into a folder to a model repository of the Hub, which is created if it does not exist.

    Args:
        write: Function that writes the files, with a README.md, to a folder that exists.
        name: Name of the repository, such as "me/my-encoder".
        readme: README.md to upload instead of the one that `write` made, or None.
        replaces_card: Whether a README.md that the repository already has is replaced.
        private: Whether a new repository is private; None leaves that to the Hub.
        token: Access token; None uses the one that `hf auth login` stored.
        message: Message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: huggingface_hub is not installed, or the Hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError("push_to_hub: needs huggingface_hub; run `pip install huggingface_hub`") from None
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        if readme is not None:
            (Path(folder) / _CARD).write_text(read_text(readme), encoding="utf-8")
        try:
            api.create_repo(name, private=private, exist_ok=True)
            keeps = not replaces_card and api.file_exists(name, _CARD)
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=[_CARD] if keeps else None
            )
        except (OSError, ValueError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise ValueError(
                f"push_to_hub: {name}: the Hub refused: {type(error).__name__}: {reason}; check the name, and that "
                "`hf auth login` or token= has a token that may write"
            ) from error
    return str(commit.commit_url)
