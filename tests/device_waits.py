"""How often the host waits for a GPU."""

import warnings
from collections.abc import Callable

import torch


def device_waits(step: Callable[[], object]) -> list[str]:
    """What PyTorch says of each wait in a call, after one that compiles and loads everything."""
    step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
