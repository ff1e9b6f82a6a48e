"""Precision of fp32 products on a GPU: which of PyTorch's two switches each op follows.

PyTorch has a switch for convolutions (on by default: TF32) and one for matrix products (off by default: full fp32).
An op of this package follows the switch of the PyTorch operator that it replaces, so that it costs and rounds what
that operator would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["tf32", "ieee"]
_CONVOLUTIONS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
_MATRIX_PRODUCTS: Any = torch.backends.cuda.matmul
#: op -> the switch that its Triton kernels follow. "exact" ops have no product that is worth tensor cores: they add up
#: single rows, or multiply by one-hot rows, which TF32 would round for nothing. `positional_conv` calls cuDNN, and
#: linear layers call cuBLAS, which read the same two switches themselves.
SWITCHES: dict[str, Literal["convolution", "matrix product", "exact"]] = {
    "strided_conv": "convolution",
    "positional_conv": "convolution",
    "varlen_attention": "matrix product",
    "contrastive_loss": "exact",
    "gumbel_quantize": "exact",
    "integrate_and_fire": "exact",
    "dropout_add_layer_norm": "exact",
    "bias_gelu_dropout": "exact",
}


def of_convolutions() -> Precision:
    """Return how PyTorch computes fp32 convolutions on a GPU with TF32: "tf32" by default."""
    # Only the new setting is read. It follows every write to the older `allow_tf32` and
    # `set_float32_matmul_precision`; reading those raises a RuntimeError once the new setting disagrees with them.
    return "tf32" if _CONVOLUTIONS.fp32_precision == "tf32" else "ieee"


def of_matrix_products() -> Precision:
    """Return how PyTorch computes fp32 matrix products on a GPU with TF32: "ieee", full fp32, by default."""
    return "tf32" if _MATRIX_PRODUCTS.fp32_precision == "tf32" else "ieee"


def precision_of(
    op: str,
    x: Tensor,
) -> Precision:
    """Return the precision of an op's products in `tl.dot`.

    Args:
        op: Name of the op, a key of `SWITCHES`.
        x: A tensor of the call; its dtype and device decide whether there is a choice.

    Returns:
        "tf32" if `x` is in fp32, the op's switch asks for TF32, and the GPU has it; otherwise "ieee".
    """
    switch = SWITCHES[op]
    if x.dtype != torch.float32 or switch == "exact" or not has_tf32(x.device):
        return "ieee"
    return of_convolutions() if switch == "convolution" else of_matrix_products()


def has_tf32(device: torch.device) -> bool:
    """Return whether a GPU has TF32 (compute capability 8.0); True for the CPU, where only tests run the kernels."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 8


def describe_fp32(device: torch.device) -> str:
    """Say in one line how an fp32 run computes on a GPU, for logs."""
    if not has_tf32(device):
        return "fp32 everywhere: this GPU has no TF32"
    names = {"tf32": "TF32", "ieee": "full fp32"}
    advice = "; TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 makes the products faster" if of_matrix_products() == "ieee" else ""
    return f"fp32: convolutions in {names[of_convolutions()]}, matrix products in {names[of_matrix_products()]}{advice}"


@contextmanager
def fp32_precision(
    *, convolutions: Precision | None = None, matrix_products: Precision | None = None
) -> Iterator[None]:
    """Set PyTorch's switches inside a `with` block.

    Args:
        convolutions: Precision of convolutions; None leaves it.
        matrix_products: Precision of matrix products; None leaves it.
    """
    switches = ((_CONVOLUTIONS, convolutions), (_MATRIX_PRODUCTS, matrix_products))
    before = [(switch, switch.fp32_precision) for switch, wanted in switches if wanted is not None]
    try:
        for switch, wanted in switches:
            if wanted is not None:
                switch.fp32_precision = wanted
        yield
    finally:
        for switch, precision in before:
            switch.fp32_precision = precision
