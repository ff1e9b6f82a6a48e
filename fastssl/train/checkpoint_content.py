"""Compare a checkpoint with what this very run would save, before Lightning and PyTorch load it.

They look at almost nothing: a state of another shape would end the run with a traceback, and one that is missing would
be left out without a word.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fastssl.reading import brief, printable

#: Keys that earlier versions did not write.
_OPTIONAL = frozenset({"scores", "scored_at", "code_counts", "unusable_noise"})
#: Settings of the optimiser that a run does not take from a checkpoint.
_SET_ANEW = ("lr", "fused")
#: The largest count. Those above are no counts of anything.
_LARGEST = 2**53


class _OtherContentError(Exception):
    """An entry is not as expected. The message begins with the entry's place."""


def check_content(checkpoint: Mapping[str, Any], trainer: Trainer, module: LightningModule) -> None:
    """Check the counts and the states of a checkpoint: all entries but the weights.

    Args:
        checkpoint: What a file contains; `check_size` has looked at its weights and the types of its entries.
        trainer: The trainer that is about to continue the run.
        module: The module to train, with an optimiser and a schedule of the learning rate.

    Raises:
        ValueError: An entry is missing or unknown, has another type or shape, or counts other updates than the rest.
    """
    try:
        _check_counts(checkpoint, trainer)
        _check_callbacks(checkpoint, trainer)
        _check_optimizer(checkpoint, module)
    except _OtherContentError as error:
        raise ValueError(f"--resume: {trainer.ckpt_path}: {error}; restore the file") from None


def _check_counts(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    update, loops, data = checkpoint["global_step"], checkpoint["loops"], checkpoint["PretrainDataModule"]
    assert trainer.datamodule is not None  # type: ignore[attr-defined]
    own = trainer.datamodule.state_dict()  # type: ignore[attr-defined]
    names = ("unusable", "unusable_noise")
    _compare(data, own | {name: _texts(data.get(name)) for name in names}, "PretrainDataModule")
    _compare(loops.get("fit_loop"), trainer.fit_loop.state_dict(), "loops.fit_loop")
    fit = loops["fit_loop"]
    steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for where, found in {
        "PretrainDataModule.updates": data["updates"],
        "loops.fit_loop, the optimizer's steps,": steps["total"]["completed"],
        "loops.fit_loop, the schedule's steps,": fit["epoch_loop.scheduler_progress"]["total"]["completed"],
    }.items():
        _expect(found == update, where, found, f"{update}, the number of updates")
    for name in ("total", "current"):
        # What was begun last may not be finished, because checkpoints are written before it is.
        found = fit["epoch_loop.batch_progress"][name].values()
        _expect(max(found) - min(found) <= 1, f"loops.fit_loop, {name} batches,", list(found), "one count")
    _expect(not fit["epoch_loop.batch_progress"]["is_last_batch"], "loops.fit_loop, is_last_batch", True, "False")
    scaler = trainer.precision_plugin.state_dict()
    if (kind := type(trainer.precision_plugin).__qualname__) in checkpoint and scaler:
        _compare(checkpoint[kind], scaler, kind)


def _check_callbacks(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    found = checkpoint["callbacks"]
    own = {one.state_key: state for one in trainer.callbacks if (state := one.state_dict())}  # type: ignore[attr-defined]
    if isinstance(monitor := found.get("Monitor"), dict):
        # These have any names, and code counts any length: there are none before the first update.
        counts = monitor.get("code_counts")
        codes = len(counts) if isinstance(counts, Tensor) and counts.ndim == 1 else 0
        own["Monitor"] |= {name: _numbers(monitor.get(name)) for name in ("scores", "window")}
        own["Monitor"] |= {"code_counts": torch.empty(codes, dtype=torch.float64, device="cpu")}
    _compare(found, own, "callbacks")


def _check_optimizer(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    update = checkpoint["global_step"]
    made: Any = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    (group,) = optimizer.param_groups
    (states,), (found,) = _one(checkpoint, "optimizer_states"), _one(checkpoint, "lr_schedulers")
    own = schedule.state_dict()
    _compare(found, own, "lr_schedulers")
    _expect(found["last_epoch"] == update, "lr_schedulers.last_epoch", found["last_epoch"], f"{update}")
    _expect(found["base_lrs"] == own["base_lrs"], "lr_schedulers.base_lrs", found["base_lrs"], f"{own['base_lrs']}")
    # Set anew: the rate from the schedule, and the kernel from the device, which may be of another kind than before.
    own_settings = optimizer.state_dict()["param_groups"][0] | {"fused": None}
    _compare(states, {"state": None, "param_groups": [own_settings]}, "optimizer_states")
    (settings,) = states["param_groups"]
    for name, value in own_settings.items():
        if name not in _SET_ANEW:
            _expect(settings[name] == value, f"optimizer_states, {name}", settings[name], f"{value}")
    for index, state in _moments(states["state"], len(group["params"]), update):
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), group["params"][index])
        where = f"optimizer_states, parameter {index}"
        _compare(state, {"step": torch.zeros((), device="cpu")} | moments, where)
        step = state["step"].item()
        _expect(0 < step <= update, f"{where}, step", step, f"1 to {update}")


def _one(checkpoint: Mapping[str, Any], name: str) -> list[Any]:
    _expect(len(checkpoint[name]) == 1, f"the number of {name}", len(checkpoint[name]), "one entry")
    return list(checkpoint[name])


def _moments(states: object, parameters: int, update: int) -> list[tuple[int, Any]]:
    """Return the states of the parameters by index; one that has never had a gradient has none."""
    where = "optimizer_states, state"
    if not isinstance(states, dict) or (update > 0 and not states):
        raise _OtherContentError(f"{where} is empty")
    for index in states:
        _expect(type(index) is int and 0 <= index < parameters, where, index, f"parameters 0 to {parameters - 1}")
    return list(states.items())


def _numbers(found: object) -> dict[str, float]:
    return {name: 0.0 for name in found if isinstance(name, str)} if isinstance(found, dict) else {}


def _texts(found: object) -> dict[str, str]:
    return {name: "" for name in found if isinstance(name, str)} if isinstance(found, dict) else {}


def _expect(is_right: bool, where: str, found: object, expected: str) -> None:
    if not is_right:
        shown = printable(brief(found))
        if isinstance(found, Tensor):
            shown = f"a tensor of shape {tuple(found.shape)} and {found.dtype}"
        raise _OtherContentError(f"{where} is {shown}, expected {expected}")


def _compare(found: object, own: object, where: str) -> None:
    """Compare types, keys, lengths and shapes; `None` where anything is allowed."""
    if isinstance(own, dict):
        _expect(isinstance(found, dict), where, found, "named values")
        assert isinstance(found, dict)
        for problem, keys in {
            "is missing": own.keys() - found.keys() - _OPTIONAL,
            "is unknown": found.keys() - own.keys(),
        }.items():
            if keys:
                raise _OtherContentError(f"{where}: {brief(min(keys, key=repr))} {problem}")
        for key, value in found.items():
            _compare(value, own[key], f"{where}.{printable(key)}")
    elif isinstance(own, (list, tuple)):
        _expect(isinstance(found, (list, tuple)) and len(found) == len(own), where, found, f"{len(own)} values")
        assert isinstance(found, (list, tuple))
        for value, expected in zip(found, own, strict=True):
            _compare(value, expected, where)
    elif isinstance(own, Tensor):
        _expect(_is_like(found, own), where, found, f"floating-point numbers of shape {tuple(own.shape)}")
    elif isinstance(own, (bool, str)):
        _expect(type(found) is type(own), where, found, "yes or no" if isinstance(own, bool) else "text")
    elif isinstance(own, int):
        _expect(type(found) is int and 0 <= found < _LARGEST, where, found, "a count")
    elif isinstance(own, float):
        _expect(isinstance(found, float) or (type(found) is int and abs(found) < _LARGEST), where, found, "a number")


def _is_like(found: object, own: Tensor) -> bool:
    """Return whether an object is a tensor of a shape, of any floating-point type, that can be written to."""
    return (
        isinstance(found, Tensor)
        and found.shape == own.shape
        and found.is_floating_point()
        and found.layout == torch.strided
        and all(stride > 0 or size <= 1 for stride, size in zip(found.stride(), found.shape, strict=True))
    )
