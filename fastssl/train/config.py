"""The settings of a pre-training run, as shown by `--help`, set by a recipe and kept in RUN/config.yaml."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastssl.data.rules import OLDEST_RULES, RULES
from fastssl.files import write_text
from fastssl.kernels.randomness import OLDEST_RANDOMNESS, RANDOMNESS
from fastssl.models.bounds import bounded, check_bounds
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.folder import changed_settings
from fastssl.names import restored, stored
from fastssl.train.systems import DEFAULT_SYSTEM, SYSTEMS
from fastssl.train.yaml_file import read_yaml

#: Settings that may change with `--resume`, because they do not change the batches or the arithmetic of later updates.
#: The exception is `max_steps`: changing it moves the end of the learning rate's decay, which is its purpose.
RESUMABLE = (
    "audio",
    "output",
    "recipe",
    "card.data",
    "card.language",
    "card.license",
    "data.max_bad_fraction",
    "data.num_workers",
    "quality.every",
    "quality.layers",
    "quality.max_frames",
    "quality.minutes",
    # The teacher may have moved; the checkpoint has a hash of its weights.
    "teacher",
    "trainer.accelerator",
    "trainer.accumulation",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.devices",
    "trainer.keep_every",
    "trainer.log_every",
    "trainer.max_steps",
    "trainer.num_nodes",
    "trainer.progress",
    "trainer.timeout_minutes",
    "trainer.val_check_interval",
)


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and how to form batches.

    Args:
        max_duration_s: Seconds of audio per batch and process, counted after cropping.
        max_utterances: Largest number of utterances per batch and process; null sets no limit.
        crop_s: Crop recordings to this many seconds, at a random place on every draw; null trains on whole recordings.
        min_duration_s: Leave out recordings shorter than this many seconds, or shorter than a crop.
        window_s: Read longer recordings in windows of this many seconds, drawn in proportion to their duration.
        valid: Recordings to hold out and score: a fraction of AUDIO, or a folder or manifest. Its recordings are not
            trained on even if AUDIO contains them. 0 holds out nothing.
        channel: Channel to read; null averages all channels.
        labels: Folder that `fastssl label` wrote for AUDIO, for HuBERT or WavLM to predict; null makes labels from MFCC
            first.
        segments: Folder that `fastssl label --segment_ms` wrote for AUDIO; its segments teach a compressor where to
            fire. null leaves that to the objective.
        noise: Folder, manifest or shar directory of noise recordings, for a system that mixes noise into its input;
            null mixes without noise.
        fixed_crops: Crop a recording at the same place in every epoch.
        teacher_cache: Folder for the teacher's frames of each crop, which are computed once and then read; needs
            fixed_crops, or whole recordings (crop_s null).
        max_bad_fraction: Stop training when more than this fraction of the recordings cannot be used.
        num_workers: Number of processes that decode audio for each training process; null chooses by the number of
            cores.
        rules: Version of the rules by which recordings are found and decoded. A run keeps its version; 1 repeats a run
            from before versions were recorded.
    """

    max_duration_s: float = bounded(87.5, above=0)
    max_utterances: int | None = bounded(None, least=1)
    crop_s: float | None = bounded(15.625, above=0)
    min_duration_s: float = bounded(2.0, least=0)
    window_s: float = bounded(60.0, above=0)
    valid: float | str = bounded(0.01, least=0, below=1)
    channel: int | None = bounded(None, least=0)
    labels: str | None = None
    segments: str | None = None
    noise: str | None = None
    fixed_crops: bool = False
    teacher_cache: str | None = None
    max_bad_fraction: float = bounded(0.05, least=0, most=1)
    num_workers: int | None = bounded(None, least=0, ceiling=1024)
    rules: int = bounded(RULES, least=OLDEST_RULES, most=RULES)

    def __post_init__(self) -> None:
        check_bounds(self, "data.")
        if self.crop_s is not None and self.crop_s > self.max_duration_s:
            raise ValueError(
                f"data.crop_s: must be at most data.max_duration_s={self.max_duration_s}, got {self.crop_s}"
            )
        if self.teacher_cache is not None and self.crop_s is not None and not self.fixed_crops:
            raise ValueError("data.teacher_cache: crops that change cannot be cached; add --data.fixed_crops true")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled weight decay; the learning rate rises linearly, then falls linearly to 0 at max_steps.

    Args:
        lr: Peak learning rate.
        betas: Decay rates of Adam's averages of the gradient and of its square.
        eps: Number added to the denominator of the update.
        weight_decay: Decoupled weight decay, on all parameters.
        warmup_updates: Updates until the learning rate peaks.
        clip_norm: Largest gradient norm; larger gradients are scaled down to it. null does not clip.
    """

    lr: float = bounded(5e-4, above=0)
    betas: tuple[float, float] = bounded((0.9, 0.98), least=0, below=1)
    eps: float = bounded(1e-6, above=0)
    weight_decay: float = bounded(0.01, least=0)
    warmup_updates: int = bounded(32_000, least=0)
    clip_norm: float | None = bounded(None, above=0)

    def __post_init__(self) -> None:
        check_bounds(self, "optimizer.")

    def lr_factor(self, update: int, max_steps: int) -> float:
        """Return the factor that multiplies the peak learning rate at an update. It is not 0 before `max_steps`.

        Args:
            update: Number of the update, from 0.
            max_steps: The update at which the factor reaches 0.
        """
        if update < self.warmup_updates:
            return (update + 1) / self.warmup_updates
        return max(0.0, (max_steps - update) / max(1, max_steps - self.warmup_updates))


@dataclass(frozen=True)
class TrainerConfig:
    """How long to train, on which devices, and how often to report.

    Args:
        max_steps: Number of optimiser updates.
        accumulation: Number of batches that each process accumulates per update.
        precision: Precision of the arithmetic; bf16-mixed and 16-mixed keep weights and loss in fp32.
        accelerator: Where to train; auto uses CUDA's GPUs if there are any, else the CPU.
        devices: Number of processes on this machine, one per device.
        num_nodes: Number of machines.
        log_every: Updates between two rows of metrics.csv.
        val_check_interval: Updates between two scores of the held-out recordings.
        checkpoint_every: Updates between two checkpoints; the last two are kept.
        checkpoint_minutes: Save a checkpoint after this many minutes if checkpoint_every updates take longer; null sets
            no limit.
        keep_every: Updates between checkpoints that are kept for good; null keeps only the last two.
        timeout_minutes: End a run of several processes when one has waited this many minutes for another. The others
            also wait while the first one makes labels or measures quality.
        progress: Show a progress bar on a terminal.
    """

    max_steps: int = bounded(400_000, least=1)
    accumulation: int = bounded(1, least=1)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = bounded(1, least=1, ceiling=1024)
    num_nodes: int = bounded(1, least=1, ceiling=65_536)
    log_every: int = bounded(10, least=1)
    val_check_interval: int = bounded(1000, least=1)
    checkpoint_every: int = bounded(1000, least=1)
    checkpoint_minutes: float | None = bounded(10.0, above=0)
    keep_every: int | None = bounded(None, least=1)
    timeout_minutes: float = bounded(30.0, above=0, most=525_600)
    progress: bool = True

    def __post_init__(self) -> None:
        check_bounds(self, "trainer.")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"trainer.keep_every: must be a multiple of trainer.checkpoint_every={self.checkpoint_every}, "
                f"got {self.keep_every}"
            )


@dataclass(frozen=True)
class QualityConfig:
    """How often to measure the encoder without labels on the held-out recordings, and how thoroughly.

    Args:
        every: Updates between two measurements; null measures nothing.
        minutes: Minutes of held-out audio to measure on, always the same recordings.
        layers: Layers to measure; null measures all.
        max_frames: Number of frames for k-means, drawn at random from all.
    """

    every: int | None = bounded(None, least=1)
    minutes: float = bounded(60.0, above=0)
    layers: tuple[int, ...] | None = bounded(None, least=0)
    max_frames: int = bounded(102_400, least=1)

    def __post_init__(self) -> None:
        check_bounds(self, "quality.")


@dataclass(frozen=True)
class CardConfig:
    """What the model card says about data and weights, besides what the run knows itself.

    Args:
        license: Licence of the weights, as the Hugging Face Hub names it (apache-2.0, cc-by-4.0, other); null says
            none.
        language: Languages of the training data, as ISO 639 codes.
        data: Names of the training data; those of the form owner/name are data sets on the Hub.
    """

    license: str | None = None
    language: tuple[str, ...] = ()
    data: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [code for code in self.language if not re.fullmatch("[a-z]{2,3}", code)]
        if wrong:
            raise ValueError(f"card.language: must be codes of two or three letters, such as en, got {wrong[0]!r}")


@dataclass(frozen=True)
class PretrainConfig:
    """All settings of a run; `RUN/config.yaml` contains them, except `output`.

    Args:
        audio: Folder of recordings (WAV, FLAC, Ogg, MP3, ...; 4 kHz or more, any number of channels; subfolders too),
            Lhotse manifest (.jsonl.gz), or Lhotse shar directory.
        output: Folder of the run; it must be new or empty, except with --resume.
        seed: Seed of all randomness in the run.
        randomness: Version of the random draws of dropout. A run keeps its version; 1 repeats a run from before
            versions were recorded.
        init: Transformers folder, model name on the Hub, or earlier run whose weights to start from, with a new
            optimiser; by default, weights are random.
        recipe: Recipe that the settings started from, for the model card.
        system: Name of the objective, such as wav2vec2 or hubert; the recipe sets it.
        teacher: Encoder to distil: a run of `fastssl pretrain`, a Transformers folder, a model name on the Hub, or a
            fairseq checkpoint; only for distillation.
        model: The encoder and its objective.
        data: What to train on, and how to form batches.
        optimizer: Adam with decoupled weight decay; the learning rate rises linearly, then falls linearly to 0 at
            max_steps.
        trainer: How long to train, on which devices, and how often to report.
        quality: How often to measure the encoder without labels on the held-out recordings, and how thoroughly.
        card: What the model card says about data and weights, besides what the run knows itself.

    Raises:
        ValueError: A value is out of bounds, `model` is the config of another system, or a setting is given that this
            system does not use, such as labels or a teacher.
    """

    audio: str
    output: str
    seed: int = bounded(0, least=0, below=2**32)
    randomness: int = bounded(RANDOMNESS, least=OLDEST_RANDOMNESS, most=RANDOMNESS)
    init: str | None = None
    recipe: str | None = None
    system: str = bounded(DEFAULT_SYSTEM, choices=tuple(SYSTEMS))
    teacher: str | None = None
    model: SpeechEncoderConfig = field(default_factory=SYSTEMS[DEFAULT_SYSTEM].config_class)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    card: CardConfig = field(default_factory=CardConfig)

    def __post_init__(self) -> None:
        check_bounds(self)
        needs, expected = SYSTEMS[self.system].needs, SYSTEMS[self.system].config_class
        if type(self.model) is not expected:
            raise ValueError(
                f"model: must be a {expected.__name__} for {self.system}, got a {type(self.model).__name__}"
            )
        if self.teacher is not None and not needs.teacher:
            raise ValueError(f"teacher: {self.system} learns from audio without a teacher; leave it out")
        if self.data.teacher_cache is not None and not needs.teacher:
            raise ValueError(f"data.teacher_cache: {self.system} has no teacher; leave it out")
        if self.data.labels is not None and not needs.labels:
            raise ValueError(f"data.labels: {self.system} learns from audio alone; leave it out")
        if self.data.noise is not None and not needs.noise:
            raise ValueError(f"data.noise: {self.system} does not mix noise into its input; leave it out")
        if self.data.segments is not None and not self.model.draws_rates:
            raise ValueError("data.segments: only --model.compressor integrate-and-fire learns from segments")
        layers = self.model.num_hidden_layers
        wrong = [layer for layer in self.quality.layers or () if layer > layers]
        if wrong:
            raise ValueError(f"quality.layers: the model has layers 0 to {layers}, got {wrong[0]}")
        if self.quality.every is not None and self.data.valid == 0:
            raise ValueError("quality.every: measures held-out recordings, but data.valid=0 holds out none")


def write_config(config: PretrainConfig, path: Path) -> None:
    """Write the settings of a run as YAML, atomically; `fastssl pretrain --config` reads them.

    Args:
        config: The settings; `output` is left out.
        path: File to write; its folder must exist.

    Raises:
        WriteError: The system refused to write.
    """
    values = _values(config)
    # Otherwise a second run with these settings would write into the folder of the first.
    del values["output"]
    write_text(path, yaml.safe_dump(_each_text(values, stored), sort_keys=False))


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Bring settings from a file up to date, and restore file names.

    An earlier version called `model.gumbel_temperature` simply `temperature`. And the settings of a run, which name its
    audio, had neither `data.rules` nor `randomness`: such a run was made by the oldest versions.

    Args:
        values: Settings as parsed from a config.yaml.

    Returns:
        The settings under their current names.
    """
    values = _each_text(values, restored)
    data = values.get("data", {})
    if "audio" in values:
        values = {"randomness": OLDEST_RANDOMNESS} | values
        if isinstance(data, dict):
            values = values | {"data": {"rules": OLDEST_RULES} | data}
    model = values.get("model", {})
    if "temperature" not in values or not isinstance(model, dict):
        return values
    others = {name: value for name, value in values.items() if name != "temperature"}
    return others | {"model": {"gumbel_temperature": values["temperature"]} | model}


def check_resumable(config: PretrainConfig, path: Path) -> None:
    """Check that a run can continue with these settings: only those in `RESUMABLE` may have changed.

    Args:
        config: The settings to continue with.
        path: `RUN/config.yaml`, with the settings of the run so far.

    Raises:
        ValueError: Settings differ that must not change; the message lists all of them.
    """
    # A setting that did not exist in the version that started the run counts as having its current default.
    model = SYSTEMS[config.system].config_class()
    defaults = PretrainConfig(audio="", output="", system=config.system, model=model)
    before = _flatten(_values(defaults)) | _flatten(renamed(read_yaml(path)))
    after = _flatten(_values(config))
    fixed = {name: value for name, value in after.items() if name not in RESUMABLE}
    if changed := changed_settings(before, fixed, there="in the run"):
        raise ValueError(
            f"--resume: these settings cannot change during a run: {changed}; "
            "restore them, or start a new run with --init"
        )


def _values(config: PretrainConfig) -> dict[str, Any]:
    """Return the settings as YAML values, without `teacher` for a system that has none."""
    values: dict[str, Any] = _plain(dataclasses.asdict(config))
    if not SYSTEMS[config.system].needs.teacher:
        del values["teacher"]
    return values


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as YAML does."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return settings with `change` applied to every text among the values."""
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
