"""Count how often the host waits for a GPU."""

import warnings
from collections.abc import Callable

import torch


def device_waits(step: Callable[[], object]) -> list[str]:
    """Return PyTorch's warnings about waits in a second call; the first call compiles and loads everything."""
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
