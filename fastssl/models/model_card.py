"""The model card of an encoder: a README.md with the front matter that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.folder import MODEL_CLASSES
from fastssl.models.multiplications import describe_compression
from fastssl.names import shown

_CLONE = Path(__file__).resolve().parents[2]
_FRONT_MATTER = """---
{facts}library_name: {library}
pipeline_tag: feature-extraction
tags:
- fastssl
- speech
- self-supervised-learning
- {model_type}
---
"""
_WITH_TRANSFORMERS = """With Transformers:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("...")  # this folder, or its name on the Hub
```

"""
_WITHOUT_COMPRESSOR = """Transformers ignores the compressor and keeps every frame, {how}.

"""
_WITH_FASTSSL = """With fastssl, which does no work on padding:

```python
import fastssl
import torch

encoder = fastssl.load_encoder("...")  # this folder, or its name on the Hub
waveforms = fastssl.Packed.pack([torch.randn(16_000), torch.randn(52_000)])  # raw audio, 16 kHz
with torch.no_grad():
    features = encoder(waveforms).features.unpack()  # each (frames, {width}){period}
```
"""


@dataclass(frozen=True)
class ModelCard:
    """Facts about an encoder's training. The card leaves out facts that are None.

    Args:
        recipe: Name of the training recipe.
        data_hours: Hours of audio in the training data.
        seen_hours: Hours of audio that training has drawn, each recording as often as it was drawn.
        license: Licence of the weights, as the Hub names it, such as "apache-2.0".
        language: Languages of the training data, as ISO 639 codes.
        data: Names of the training data; those of the form "owner/name" are data sets on the Hub.
        updates: Number of optimiser updates.
        version: Version of fastssl.
        commit: Git commit of fastssl.
        quality: Scores by name.
    """

    recipe: str | None = None
    data_hours: float | None = None
    seen_hours: float | None = None
    license: str | None = None
    language: Sequence[str] = ()
    data: Sequence[str] = ()
    updates: int | None = None
    version: str | None = None
    commit: str | None = None
    quality: Mapping[str, float] = field(default_factory=dict)

    def as_markdown(self, config: SpeechEncoderConfig, *, parameters: int, rounded_to: str | None = None) -> str:
        """Write the text of README.md, with the front matter for the Hub.

        Args:
            config: Shape of the encoder.
            parameters: Number of parameters of the encoder.
            rounded_to: Format that the weights were rounded to for inference, if they were.
        """
        in_transformers = config.model_type in MODEL_CLASSES
        normalised = "scaled to zero mean and unit variance" if config.do_normalize else "unscaled"
        facts: dict[str, str | None] = {
            "architecture": config.model_type,
            "parameters": f"{parameters / 1e6:.2f} M",
            "weights": None if rounded_to is None else f"rounded to {rounded_to} for inference, stored in fp32",
            "layers, width": f"{config.num_hidden_layers}, {config.hidden_size}",
            "input": f"16 kHz, each waveform {normalised}",
            "recipe": self.recipe,
            "licence": self.license,
            "language": ", ".join(self.language) or None,
            "training data": ", ".join(self.data) or None,
            "training audio": None if self.data_hours is None else f"{self.data_hours:.2f} hours",
            "audio seen": None if self.seen_hours is None else f"{self.seen_hours:.2f} hours",
            "updates": None if self.updates is None else f"{self.updates}",
            "fastssl": _both(self.version, None if self.commit is None else f"commit {self.commit}"),
        }
        compressed = config.compressor != "none"
        if compressed:
            facts["sequence compression"] = describe_compression(config)
        parts = [
            _FRONT_MATTER.format(
                facts=self._for_the_hub(),
                model_type=config.model_type,
                library="transformers" if in_transformers else "fastssl",
            ),
            "# Speech encoder\n\nA self-supervised speech encoder, saved by fastssl.\n",
            _table("", "", {name: fact for name, fact in facts.items() if fact is not None}),
        ]
        if self.quality:
            scores = {name: f"{value:.4g}" for name, value in self.quality.items()}
            parts.append("## Quality\n\n" + _table("score", "value", scores))
        period = "" if compressed else f", one every {config.feature_period_ms:g} ms"
        with_fastssl = _WITH_FASTSSL.format(width=config.feature_width, period=period)
        parts.append("## Use\n\n" + (self._with_transformers(config) if in_transformers else "") + with_fastssl)
        return "\n".join(parts)

    def _for_the_hub(self) -> str:
        """Return the lines of front matter that say what the weights may be used for and what they were trained on."""
        sets = [name for name in self.data if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
        lists = {"license": self.license, "language": list(self.language), "datasets": sets}
        # JSON is YAML, and quotes whatever the names contain.
        return "".join(f"{name}: {json.dumps(value)}\n" for name, value in lists.items() if value)

    @staticmethod
    def _with_transformers(config: SpeechEncoderConfig) -> str:
        if config.compressor == "none":
            return _WITH_TRANSFORMERS
        how = "as at rate 0" if config.meets_all_frames else "which this encoder was not trained for"
        return _WITH_TRANSFORMERS + _WITHOUT_COMPRESSOR.format(how=how)


def checked_out_commit(folder: Path = _CLONE) -> str | None:
    """Read the commit that is checked out in a git clone, from the files in `.git`, without running git.

    Args:
        folder: Top folder of the clone, or of a worktree of it; by default the folder that contains this package.

    Returns:
        The commit's hash; None if the folder is not a clone.
    """
    git = folder / ".git"
    try:
        if git.is_file():
            git = folder / _read(git).removeprefix("gitdir:").strip()
        head = _read(git / "HEAD").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        # A worktree has its own HEAD, but its branches are in the folder that `commondir` names.
        common = git / "commondir"
        shared = git / _read(common).strip() if common.exists() else git
        if (shared / name).exists():
            return _read(shared / name).strip()
        packed = (line.split(" ") for line in _read(shared / "packed-refs").splitlines())
        return next((parts[0] for parts in packed if parts[1:] == [name]), None)
    except OSError:
        return None


def _read(path: Path) -> str:
    """Read a file of git, which may contain a path of any bytes."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def _both(first: str | None, second: str | None) -> str | None:
    return ", ".join(part for part in (first, second) if part is not None) or None


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    for row in rows.items():
        name, value = (shown(text).replace("|", "\\|") for text in row)
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines) + "\n"
