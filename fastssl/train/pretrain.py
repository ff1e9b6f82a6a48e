"""`fastssl pretrain` and `fastssl distill`: train an encoder on a folder of audio."""

import logging
import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich import get_console
from torch.utils.data import DataLoader

from fastssl.data.batches import AudioBatch
from fastssl.eval.quality.measure import first_minutes, quality_loader
from fastssl.files import check_no_links, is_partial, make_folder
from fastssl.folder_lock import LOCK_FILE, folder_lock
from fastssl.kernels.dispatch import WHY_NO_TRITON
from fastssl.kernels.precision import describe_fp32
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.encoder import EncoderConfig
from fastssl.models.model_card import ModelCard
from fastssl.models.pretraining import NoisyConfig, PretrainingModel
from fastssl.train.card import make_card
from fastssl.train.checkpoint_callback import PeriodicCheckpoint
from fastssl.train.checkpoint_file import LAST, Checkpoint, find_checkpoint, has_checkpoint, set_aside
from fastssl.train.checkpoints import AtomicCheckpointIO, check_size, initialise, save_encoder
from fastssl.train.config import PretrainConfig, TrainerConfig, check_resumable, write_config
from fastssl.train.data import PretrainDataModule
from fastssl.train.metrics_file import read_metrics
from fastssl.train.module import PretrainModule, TrainingError
from fastssl.train.monitors import Monitor, RunProgress
from fastssl.train.peers import Peers
from fastssl.train.quality_callback import QualityMonitor, quality_columns
from fastssl.train.report import draw_report, summarise
from fastssl.train.run_labels import RunLabels, attach_given
from fastssl.train.run_log import log_to, quiet_lightning
from fastssl.train.stopping import Stopped
from fastssl.train.systems import SYSTEMS, build_model
from fastssl.train.teacher import Teacher, open_teacher
from fastssl.train.teacher_cache import TeacherCache

logger = logging.getLogger(__name__)


def is_first_process() -> bool:
    """Return whether this process writes the run's folder, from the variables that Lightning, torchrun or SLURM set."""
    ranks = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ]
    return int(ranks[0] if ranks else 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


def pretrain(config: PretrainConfig, *, resume: bool = False) -> None:
    """Train an encoder, and write it and everything about the run to the folder `config.output`.

    The folder gets config.yaml, checkpoints/, logs/ (TensorBoard files and the log), metrics.csv, report.png, and
    encoder/ in Transformers' layout. During training, encoder/ is updated with each checkpoint.

    Args:
        config: Settings of the run.
        resume: Continue the run in `config.output` from its last checkpoint, as if it had not stopped.

    Raises:
        ValueError: A setting is wrong, the audio or the teacher cannot be used, this machine lacks the devices, or the
            folder is in use, not empty (without `resume`), or contains no run with these settings or no usable
            checkpoint (with `resume`).
        WriteError: The system refused to write, for example because the disk is full.
        TrainingError: The loss became NaN or infinite, too many recordings cannot be used, or another process of the
            run ended early.
        Stopped: SIGINT or SIGTERM has ended the run after an update and a checkpoint.
    """
    run = Path(config.output)
    _check_devices(config.trainer)
    if not is_first_process():
        _pretrain(config, run, resume=resume, first=False)
        return
    _check_begun(run, resume=resume)
    with folder_lock(run, option="--output"):
        _pretrain(config, run, resume=resume, first=True)


def _pretrain(config: PretrainConfig, run: Path, *, resume: bool, first: bool) -> None:
    teacher = None
    if SYSTEMS[config.system].needs.teacher:
        config, teacher = open_teacher(config)
    if first:
        _check_folder(run, config, resume=resume)
    data = PretrainDataModule(
        config.audio,
        config.data,
        normalize=config.model.do_normalize,
        seed=config.seed,
        accumulation=config.trainer.accumulation,
        noise_share=cast(NoisyConfig, config.model).noise_share if SYSTEMS[config.system].needs.noise else 0.0,
        draw=partial(SYSTEMS[config.system].draw, config.model),
    )
    takes_labels = SYSTEMS[config.system].needs.labels or config.data.segments is not None
    given = attach_given(config, data) if takes_labels else {}
    resume_from = find_checkpoint(run, name=f"--resume: {run}") if resume else None
    check_size(config.model, None if resume_from is None else resume_from.path)
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    complete = initialise(model, config.init) if config.init is not None and resume_from is None else True
    if teacher is not None and config.init is None and resume_from is None:
        model.start_from_teacher(teacher.encoder)
    if takes_labels:
        data.beside.append(RunLabels(run, config, data, given))
    if teacher is not None and config.data.teacher_cache is not None:
        cache = TeacherCache(config, data, teacher)
        data.beside.append(cache)
        if first:
            cache.open()  # before anything is written, raises an error if the cache belongs to other settings
    if first:
        # Before anything else: a folder with a config.yaml can be resumed, and a folder without is as good as empty.
        write_config(config, run / "config.yaml")
        make_folder(run / "logs")
        if resume_from is not None and resume_from.damage is not None:
            set_aside(run / "checkpoints" / LAST)
    with log_to(run / "logs" / "pretrain.log", enabled=first), quiet_lightning():
        if first:
            _describe(config, data, model, complete=complete, resume_from=resume_from)
        _fit(config, run, data, model, teacher, resume_from=resume_from)


def _fit(
    config: PretrainConfig,
    run: Path,
    data: PretrainDataModule,
    model: PretrainingModel,
    teacher: Teacher | None,
    *,
    resume_from: Checkpoint | None,
) -> None:
    settings = config.trainer
    resume_at = None if resume_from is None else resume_from.update
    module = PretrainModule(
        model,
        optimizer=config.optimizer,
        max_steps=settings.max_steps,
        seed=config.seed,
        randomness=config.randomness,
        teacher=teacher,
        read_every=_read_every(config),
    )
    monitor = Monitor(
        run,
        data.account,
        score_names=model.score_names,
        counts_codes=model.counts_codes,
        columns=(
            *model.schedules(0),
            *(quality_columns(config.model.num_hidden_layers) if config.quality.every else ()),
        ),
        log_every=settings.log_every,
        resume_at=resume_at,
    )
    scores_every = min(settings.val_check_interval, settings.max_steps)

    def card(updates: int) -> ModelCard:
        hours = data.train_corpus.duration_s / 3600
        scores, scored_at = monitor.scores, monitor.scored_at
        return make_card(
            recipe=config.recipe,
            facts=config.card,
            data_hours=hours,
            seen_hours=monitor.audio_s / 3600,
            updates=updates,
            scores=scores,
            scored_at=scored_at,
            shown=model.shown_scores(),
        )

    checkpoints = PeriodicCheckpoint(
        run,
        model.speech_encoder,
        card=card,
        draw=partial(draw_report, run, type(model)),
        every=settings.checkpoint_every,
        minutes=settings.checkpoint_minutes,
        keep_every=settings.keep_every,
        scores_every=None if data.valid_corpus is None else scores_every,
        resume_at=resume_at,
    )
    peers = Peers(checkpoints.continuation, timeout_minutes=settings.timeout_minutes)
    devices, num_nodes = _devices(settings)
    trainer = Trainer(
        # Lightning would choose others too, such as MPS, which have no fp64.
        accelerator="cuda" if _num_gpus(settings) > 0 else "cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=_strategy(
            devices * num_nodes,
            unused_parameters=config.model.layerdrop > 0 or _is_front_end_frozen(config.model),
            timeout_minutes=settings.timeout_minutes,
        ),
        precision=settings.precision,
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulation,
        # Lightning counts batches here. The training data never ends, so the whole run is one epoch.
        val_check_interval=scores_every * settings.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        # The checkpoint callback comes last, so that checkpoints include what was measured after the same update.
        callbacks=[
            monitor,
            RunProgress(monitor, enabled=settings.progress),
            *_quality_monitor(config, data, model, monitor),
            peers,
            checkpoints,
        ],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if resume_from is None else resume_from.path)
    except SystemExit as error:  # how Lightning ends after a KeyboardInterrupt
        raise KeyboardInterrupt if isinstance(error.__context__, KeyboardInterrupt) else error from None
    except Exception as error:
        if not peers.lost:
            raise
        peers.end_children()
        raise TrainingError("another process ended or did not answer") from error
    if checkpoints.stopped_by is not None:
        if trainer.is_global_zero:
            logger.info("stopped after update %d; checkpoint saved: continue with --resume", trainer.global_step)
            checkpoints.try_to_draw()
        raise Stopped(checkpoints.stopped_by)
    if trainer.is_global_zero:
        save_encoder(model.speech_encoder, run / "encoder", card=card(trainer.global_step))
        checkpoints.try_to_draw()
        get_console().print(summarise(run, type(model), data.account))
        logger.info("encoder: %s", run / "encoder")


def _quality_monitor(
    config: PretrainConfig, data: PretrainDataModule, model: PretrainingModel, monitor: Monitor
) -> list[QualityMonitor]:
    """Make the callback that measures the encoder on held-out recordings; no callback if `quality.every` is null."""
    settings = config.quality
    if settings.every is None or data.valid_corpus is None:
        return []

    def held_out() -> DataLoader[AudioBatch]:
        # At this point, recordings without labels have been left out.
        assert data.valid_corpus is not None
        cuts = first_minutes(data.valid_corpus.cuts, settings.minutes)
        return quality_loader(cuts, normalize=config.model.do_normalize, channel=config.data.channel)

    callback = QualityMonitor(
        model.speech_encoder,
        held_out,
        monitor.write,
        every=settings.every,
        layers=settings.layers,
        max_frames=settings.max_frames,
        seed=config.seed,
        paused=monitor.paused,
    )
    return [callback]


def _check_begun(run: Path, *, resume: bool) -> None:
    """Check, before the folder is locked, that it is a folder or missing or, with `resume`, that it contains a run."""
    if resume and not (run / "config.yaml").is_file():
        raise ValueError(f"--resume: {run} contains no run to continue (looked for {run / 'config.yaml'})")
    if run.exists() and not run.is_dir():
        raise ValueError(f"--output: {run} is not a folder; choose another")


def _check_folder(run: Path, config: PretrainConfig, *, resume: bool) -> None:
    """Check that the folder is empty or, with `resume`, that it contains a run that can continue."""
    if resume:
        # The run may come from somebody else.
        check_no_links(run, ("checkpoints", "encoder", "labels", "labels-valid", "logs", "segments-valid"))
        # Without a checkpoint, nothing has been trained yet, and all settings may change.
        if has_checkpoint(run):
            check_resumable(config, run / "config.yaml")
            if (run / "metrics.csv").exists():
                read_metrics(run / "metrics.csv")  # raises an error here, where no other process waits yet
    elif any(not is_partial(path) and path.name != LOCK_FILE for path in run.iterdir()):
        raise ValueError(
            f"--output: {run} exists and is not empty; continue the run with --resume, or choose another folder"
        )


def _describe(
    config: PretrainConfig,
    data: PretrainDataModule,
    model: PretrainingModel,
    *,
    complete: bool,
    resume_from: Checkpoint | None,
) -> None:
    """Log the data, the model and the initial weights, and what was left out of the data."""
    for problem in data.account.left_out:
        logger.warning("left out: %s", problem)
    corpora = [("training", data.train_corpus)]
    if data.valid_corpus is not None:
        corpora.append(("held out", data.valid_corpus))
    for name, corpus in corpora:
        hours = corpus.duration_s / 3600
        logger.info("%s: %d recordings, %.2f hours", name, corpus.num_recordings, hours)
    if data.noise is not None:
        logger.info("noise: %d recordings", len(data.noise.cuts))
    if data.num_overlapping:
        logger.info("not trained on, because data.valid holds them out: %d cuts of AUDIO", data.num_overlapping)
    if data.valid_corpus is not None and not isinstance(config.data.valid, str):
        held_out_s = data.valid_corpus.duration_s
        share = held_out_s / (held_out_s + data.train_corpus.duration_s)
        if share > 3 * config.data.valid:
            logger.warning(
                "%.1f %% of the audio is held out, more than data.valid (%.1f %%), because recordings are not divided",
                100 * share,
                100 * config.data.valid,
            )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("model: %.2f M parameters, %d updates", parameters / 1e6, config.trainer.max_steps)
    if _num_gpus(config.trainer) > 0 and WHY_NO_TRITON["cuda"]:
        logger.warning("plain PyTorch replaces kernels, which takes longer: %s", WHY_NO_TRITON["cuda"])
    if config.trainer.precision == "32-true" and _num_gpus(config.trainer) > 0:
        logger.info("precision: %s", describe_fp32(torch.device("cuda")))
    if config.init is not None and resume_from is None:
        logger.info("weights from %s%s", config.init, "" if complete else "; missing weights are initialised randomly")
    if resume_from is not None:
        if resume_from.damage is None:
            logger.info("continuing after update %d", resume_from.update)
        else:
            logger.warning(
                "%s; the run continues from %s, after update %d",
                *(resume_from.damage, resume_from.path.name, resume_from.update),
            )
    if config.quality.every is not None and data.valid_corpus is None:
        logger.warning("quality is not measured, because no recording is held out: there are too few")
    if config.optimizer.warmup_updates >= config.trainer.max_steps:
        logger.warning(
            "the learning rate rises for %d updates (optimizer.warmup_updates), but the run ends after %d",
            config.optimizer.warmup_updates,
            config.trainer.max_steps,
        )


def _read_every(config: PretrainConfig) -> list[int]:
    """List the numbers of updates after which something needs the results of the last one."""
    settings = config.trainer
    every = (settings.log_every, settings.checkpoint_every, settings.keep_every, settings.val_check_interval)
    return [number for number in (*every, config.quality.every, settings.max_steps) if number]


def _devices(settings: TrainerConfig) -> tuple[int, int]:
    """Return the numbers of processes per machine and of machines; under torchrun, those that it was started with."""
    if torch.distributed.is_torchelastic_launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    return settings.devices, settings.num_nodes


def _num_gpus(settings: TrainerConfig) -> int:
    """Return the number of GPUs that a run may use; 0 means that it trains on the CPU."""
    return torch.cuda.device_count() if settings.accelerator != "cpu" and torch.cuda.is_available() else 0


def _check_devices(settings: TrainerConfig) -> None:
    """Check devices and precision before the folder is written; Lightning checks later or changes them silently."""
    gpus = _num_gpus(settings)
    if settings.accelerator == "gpu" and gpus == 0:
        raise ValueError(
            "trainer.accelerator: gpu needs a GPU, but PyTorch finds none; see `fastssl info`, or choose cpu"
        )
    devices, _ = _devices(settings)
    if gpus > 0 and devices > gpus:
        raise ValueError(f"trainer.devices: must be at most the number of GPUs ({gpus}), got {devices}")
    if settings.precision == "16-mixed" and gpus == 0:
        raise ValueError("trainer.precision: 16-mixed needs a GPU; choose 32-true or bf16-mixed on the CPU")


def _is_front_end_frozen(config: SpeechEncoderConfig) -> bool:
    return isinstance(config, EncoderConfig) and config.feature_grad_mult == 0


def _strategy(world_size: int, *, unused_parameters: bool, timeout_minutes: float) -> Strategy | str:
    if world_size == 1:
        return "auto"
    return DDPStrategy(find_unused_parameters=unused_parameters, timeout=timedelta(minutes=timeout_minutes))
