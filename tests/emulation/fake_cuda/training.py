"""Scenarios of training: an update of each system, as the Lightning module makes it, and an encoder's forward pass."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.recipes import recipe_model
from fastssl.data.batches import AudioBatch
from fastssl.data.segments import FrameSegments
from fastssl.eval.encode import frame_grid
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.distillation import DistillationConfig
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.pretraining import PretrainingModel
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.random import utterance_keys
from fastssl.packing import Layout, Packed
from fastssl.train.config import OptimizerConfig
from fastssl.train.module import PretrainModule
from fastssl.train.systems import SYSTEMS, build_model, system_of
from fastssl.train.teacher import Teacher
from tests.emulation.fake_cuda.pretend import begin_update
from tests.emulation.fake_cuda.scenario import Scenario, Watch

PRECISIONS: dict[str, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
#: Name of a system in a scenario -> recipe of its tiny model.
TINY = {
    "wav2vec2": "wav2vec2-tiny",
    "hubert": "hubert-tiny",
    "wavlm": "wavlm-tiny",
    "best-rq": "best-rq-tiny",
    "distillation": "distil-tiny",
}
#: The same for the published sizes.
BASE = {
    "wav2vec2": "wav2vec2-base",
    "hubert": "hubert-base",
    "wavlm": "wavlm-base",
    "best-rq": "best-rq-base",
    "distillation": "distilhubert",
}
COMPRESSORS = ("none", "integrate-and-fire")
#: Lengths in seconds of the utterances of a batch, and of another batch that must not need other kernels.
BATCHES = {"ordinary": (4.0, 7.3, 2.2), "empty": (), "one frame": (0.03,), "one utterance": (5.1,)}
_OTHER_LENGTHS = (3.1, 9.7, 2.9, 6.05)
#: An update in which layer drop keeps 10 of the 12 layers of a base model.
_UPDATE = 7
_SEED = 0


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for system, recipe in TINY.items():
        for compressor in COMPRESSORS:
            for precision in PRECISIONS:
                for batch in BATCHES:
                    yield (
                        f"train/{system}/tiny/{compressor}/{precision}/{batch}",
                        partial(_train, recipe=recipe, compressor=compressor, precision=precision, batch=batch),
                    )
    for system, recipe in BASE.items():  # the recipes' own precision
        for compressor in COMPRESSORS:
            yield (
                f"train/{system}/base/{compressor}/bf16-mixed/ordinary",
                partial(_train, recipe=recipe, compressor=compressor, precision="bf16-mixed", batch="ordinary"),
            )
    for compressor in COMPRESSORS:
        for precision in ("bf16-mixed", "16-mixed"):
            train = partial(_train, recipe=TINY["wav2vec2"], compressor=compressor, precision=precision)
            yield (
                f"train/wav2vec2/tiny/{compressor}/{precision}/two processes",
                partial(_of_two_processes, scenario=partial(train, batch="ordinary")),
            )
    for precision in (*PRECISIONS, "bf16-true"):
        yield f"encoder/wav2vec2/{precision}", partial(_encode, recipe="wav2vec2-tiny", precision=precision)
        yield f"encoder/best-rq/{precision}", partial(_encode, recipe="best-rq-tiny", precision=precision)
    raw = partial(_encode, recipe="wav2vec2-tiny", precision="bf16-mixed", normalize=True)
    yield "encoder/wav2vec2, raw audio/bf16-mixed", raw
    base = partial(_encode, recipe="wav2vec2-base", precision="bf16-mixed")
    yield "encoder/wav2vec2 base/bf16-mixed", base
    yield (
        "encoder/wav2vec2 base, 2 layers, integrate-and-fire/bf16-mixed",
        partial(base, num_hidden_layers=2, compressor="integrate-and-fire"),
    )


@contextmanager
def two_processes() -> Iterator[None]:
    """Let this process be the first of two, whose collectives send nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _of_two_processes(watch: Watch, *, scenario: Scenario) -> None:
    """Run a scenario with all that a process adds up with others, but its gradients: PyTorch's reducer is in C++."""
    with two_processes():
        scenario(watch)


def _train(watch: Watch, *, recipe: str, compressor: str, precision: str, batch: str) -> None:
    update = Update(watch, config_of(recipe, compressor), precision)
    lengths = BATCHES[batch]
    with watch.unwatched():
        update(lengths)  # the optimiser makes its state, and layouts are cached
    update(lengths, watched=True)
    if batch == "ordinary":
        with watch.no_new_variants():
            update(_OTHER_LENGTHS)
    _check_gradients(update.module)


def config_of(recipe: str, compressor: str) -> SpeechEncoderConfig:
    config: SpeechEncoderConfig = recipe_model(recipe)
    return dataclasses.replace(config, compressor=compressor)


class Update:
    """A module with its optimiser, which makes updates as Lightning does.

    Args:
        watch: Where launches and waits are recorded.
        config: The system to train.
        precision: Lightning's name of the precision.
    """

    def __init__(self, watch: Watch, config: SpeechEncoderConfig, precision: str) -> None:
        torch.manual_seed(0)
        self.watch, self.config, self.dtype = watch, config, PRECISIONS[precision]
        model = build_model(config)
        teacher = _teacher(config) if model.needs.teacher else None
        with watch.unwatched():
            model.to("cuda")
            self.scaler = torch.amp.GradScaler("cuda", enabled=self.dtype == torch.float16)
        optimizer = OptimizerConfig(clip_norm=10.0)
        self.module = PretrainModule(
            model, optimizer=optimizer, max_steps=1000, seed=_SEED, teacher=teacher, read_every=(100,)
        ).train()
        # What the module reads of Lightning's trainer.
        self.module._trainer = SimpleNamespace(  # type: ignore[assignment]
            accumulate_grad_batches=1,
            world_size=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
            global_rank=0,
            global_step=_UPDATE,
            strategy=SimpleNamespace(root_device=torch.device("cuda", 0)),
            precision_plugin=MixedPrecision("16-mixed", "cuda", self.scaler) if self.scaler.is_enabled() else None,
        )
        self.optimizer = self.module.configure_optimizers()["optimizer"]

    def __call__(self, seconds: tuple[float, ...], *, watched: bool = False) -> None:
        """Make an update with a batch of utterances of these lengths in seconds."""

        def phase(name: str) -> AbstractContextManager[None]:
            return self.watch.phase(name) if watched else nullcontext()

        with self.watch.unwatched():
            begin_update()
        batch = _pinned(self.watch, batch_of(self.module.model, seconds))
        with phase("transfer"):
            batch = batch.to("cuda", non_blocking=True)
        with phase("forward"), self._autocast():
            loss = self.module.training_step(batch, 0)
        with phase("backward"):
            self.scaler.scale(loss).backward()
        with phase("clip"):
            self.scaler.unscale_(self.optimizer)
            self.module.on_before_optimizer_step(self.optimizer)
            self.module.configure_gradient_clipping(self.optimizer)
        with phase("step"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast("cuda", self.dtype)


def _pinned(watch: Watch, batch: AudioBatch) -> AudioBatch:
    with watch.unwatched():
        return batch.pin_memory()


def _check_gradients(module: PretrainModule) -> None:
    """Check that parameters are fp32 on the GPU, so that the run above was what it seems."""
    kinds = {(parameter.device.type, parameter.dtype) for parameter in module.parameters()}
    assert kinds == {("cuda", torch.float32)}, kinds


def _teacher(config: SpeechEncoderConfig) -> Teacher:
    assert isinstance(config, DistillationConfig)
    width = config.teacher_hidden_size
    teacher = EncoderConfig(
        model_type="hubert",
        hidden_size=width,
        num_hidden_layers=config.teacher_num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=4 * width,
        conv_dim=config.conv_dim,
    )
    return Teacher(Encoder(teacher), config.targets, gives_frames=config.keeps_front_end(teacher))


def waveforms_of(seconds: tuple[float, ...]) -> Packed:
    lengths = [round(16000 * length) for length in seconds]
    generator = torch.Generator().manual_seed(len(lengths))
    return Packed(torch.randn(sum(lengths), 1, generator=generator), Layout.from_lengths(lengths))


def batch_of(model: PretrainingModel, seconds: tuple[float, ...]) -> AudioBatch:
    """Make a batch with all that a model needs, in CPU memory."""
    waveforms, ids = waveforms_of(seconds), torch.arange(len(seconds)) * 7919
    grid = frame_grid(model.config)
    frames = sum(grid.count(length) for length in waveforms.layout.lengths)
    needs, count = model.needs, len(seconds)
    noise = Packed(torch.randn(8000 * count, 1), Layout.from_lengths([8000] * count))
    return AudioBatch(
        waveforms,
        ids=ids,
        names=tuple(f"utterance {index}" for index in range(count)),
        update=_UPDATE,
        problems=(),
        labels=torch.arange(frames) % 7 if needs.labels else None,
        segments=FrameSegments(torch.full((frames,), 0.25), torch.arange(frames) % 4 == 3)
        if _segments(model)
        else None,
        noise=noise if needs.noise else None,
        draws=type(model).draw(
            model.config, waveforms.layout, utterance_keys(_SEED, _UPDATE, ids), training=model.training
        ),
    )


def _segments(model: PretrainingModel) -> bool:
    config: Any = model.config
    return bool(config.draws_rates)


def encoder_of(watch: Watch, recipe: str, precision: str, **changes: Any) -> tuple[SpeechEncoder, torch.dtype]:
    """Make a recipe's encoder, with changes to its config, for evaluation on the GPU.

    Returns:
        The encoder, and the dtype of its weights.
    """
    config = dataclasses.replace(recipe_model(recipe), **changes)
    encoder = SYSTEMS[system_of(config)](config).speech_encoder.eval()
    encoder.normalize = False  # as if data workers had done that
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with watch.unwatched():
        encoder.to("cuda", dtype)
    return encoder, dtype


def _encode(watch: Watch, *, recipe: str, precision: str, normalize: bool = False, **changes: Any) -> None:
    """Run an encoder as a user does: in inference mode, on a batch that is copied to the GPU."""
    encoder, dtype = encoder_of(watch, recipe, precision, **changes)
    autocast = PRECISIONS.get(precision)

    def forward(seconds: tuple[float, ...]) -> None:
        waveforms = waveforms_of(seconds).to("cuda")
        waveforms = Packed(waveforms.values.to(dtype), waveforms.layout)
        with nullcontext() if autocast is None else torch.autocast("cuda", autocast):
            output = encoder(waveforms, normalize=normalize)
        watch.found.notes["dtype"] = str(output.features.values.dtype)

    with torch.inference_mode():
        with watch.phase("forward"):
            forward(BATCHES["ordinary"])
        with watch.no_new_variants():
            forward(_OTHER_LENGTHS)
