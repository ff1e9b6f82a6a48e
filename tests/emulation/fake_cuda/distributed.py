"""Scenarios of training in several processes, of which one runs and the others are pretended."""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.emulation.fake_cuda.scenario import Scenario, Watch
from tests.emulation.fake_cuda.training import BATCHES, TINY, Update, config_of

_PROCESSES = 2


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for system in TINY:
        yield f"ddp/{system}/bf16-mixed", partial(_train, recipe=TINY[system])


def _train(watch: Watch, *, recipe: str) -> None:
    """Make updates through PyTorch's wrapper, which divides the gradients into buckets and sums them in backward."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=_PROCESSES)
    try:
        update = Update(watch, config_of(recipe, "none"), "bf16-mixed")
        module = update.module
        cast(Any, module._trainer).world_size = _PROCESSES
        module.forward = module.training_step  # type: ignore[method-assign]  # as Lightning does
        with watch.unwatched():
            update.forward = DistributedDataParallel(module, device_ids=[0])
            update(BATCHES["ordinary"])
            update(BATCHES["ordinary"])  # the first update only decides on the buckets
        update(BATCHES["ordinary"], watched=True)
    finally:
        torch.distributed.destroy_process_group()
