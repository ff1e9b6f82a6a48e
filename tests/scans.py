"""Record the scans and segment sums that PyTorch runs, forward and backward."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Scans(TorchDispatchMode):
    """Within this context, notes what scans and sums floating-point tensors.

    Attributes:
        scans: Number of scans: `cumsum`, and integrate-and-fire's compiled one.
        unordered: Calls that a GPU would add up in an order that depends on the whole batch: PyTorch then calls CUB.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scans = 0
        self.unordered: list[str] = []

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and note it."""
        name = str(function)
        x = next((argument for argument in arguments if isinstance(argument, Tensor)), torch.empty(0, dtype=torch.bool))
        dtype = (options or {}).get("dtype") or x.dtype  # lengths may be whole numbers in fp64, summed as int32
        if dtype.is_floating_point:
            if name.startswith("aten.cumsum"):
                self.scans += 1
                if x.numel() == x.shape[arguments[1]]:
                    self.unordered.append(f"{name} {tuple(x.shape)}")
            elif name.startswith("fastssl_native.integrate_and_fire_scan"):
                self.scans += 1
            elif name.startswith("aten.segment_reduce") and x.dim() == 1:
                self.unordered.append(f"{name} {tuple(x.shape)}")
        return function(*arguments, **(options or {}))
