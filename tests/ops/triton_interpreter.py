"""Fix Triton's interpreter (3.8), which multiplies bfloat16 matrices as integers, and truncates to bfloat16."""

from typing import Any

import numpy as np
import torch


def repair_bfloat16() -> None:
    """Make `tl.dot` multiply bfloat16 numbers, and round fp32 to the nearest bfloat16, as a GPU does."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "bfloat16_repaired"):
        return
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(source: Any) -> Any:
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return widened(source)  # same result as the original, ten times as fast
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16).reshape(source.data.shape), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.bfloat16_repaired = True
