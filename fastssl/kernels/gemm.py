"""Matrix products of packed frames on the CPU, with the faster of PyTorch's two libraries, MKL and oneDNN.

In fp32, `aten::mm` calls MKL, which uses AVX-512 on Intel processors only. On an AMD Zen 5 it is half as fast as
oneDNN. In bf16, `aten::mm` already calls oneDNN, but a direct call is 3 to 14 % faster and applies GELU at no cost.

Autograd cannot differentiate the direct call. Use these functions inside a `torch.autograd.Function` or without
gradients.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# With fewer rows than this, a product gives a row different bits than a larger product does (measured, see the tests).
STABLE_ROWS = 12
_STABLE_ROWS_ONEDNN = 2


def _onednn_is_faster() -> bool:
    """Return whether oneDNN is faster than MKL on this machine, as on AMD processors with AVX-512."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    processors = Path("/proc/cpuinfo")
    return processors.exists() and "AuthenticAMD" in processors.read_text()


ONEDNN_IS_FASTER = _onednn_is_faster()


def nt(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    gelu: bool = False,
) -> Tensor:  # (M, N)
    """Compute x @ weight.T + bias, then GELU if `gelu`; the bits of a row do not depend on the other rows.

    Args:
        x: (M, K) rows.
        weight: (N, K) weight.
        bias: (N,) bias, or None.
        gelu: Whether to apply the exact GELU to the result.

    Returns:
        (M, N) in the dtype of `x`.
    """
    rows = x.shape[0]
    onednn = takes_onednn(x)
    stable_rows = _STABLE_ROWS_ONEDNN if onednn else STABLE_ROWS
    if rows < stable_rows:
        return nt(F.pad(x, (0, 0, 0, stable_rows - rows)), weight, bias, gelu=gelu)[:rows]
    if onednn:
        return _onednn(x, weight, bias, "gelu" if gelu else "none")
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def nn(
    x: Tensor,  # (M, N)
    weight: Tensor,  # (N, K)
) -> Tensor:  # (M, K)
    """Compute x @ weight; the bits of a row do not depend on the other rows."""
    return nt(x, weight.t())


def tn(
    x: Tensor,  # (M, N)
    y: Tensor,  # (M, K)
) -> Tensor:  # (N, K)
    """Compute x.T @ y: a sum over rows, such as the gradient of a weight."""
    # In bf16, PyTorch transposes the operands faster than oneDNN does.
    if takes_onednn(x) and x.dtype == torch.float32 and min(*x.shape, y.shape[1]) > 0:
        return _onednn(x.t(), y.t(), None)
    return x.t() @ y


def takes_onednn(x: Tensor) -> bool:
    """Return whether products with `x` call oneDNN directly."""
    return ONEDNN_IS_FASTER and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Compute activation(x @ weight.T + bias) with oneDNN, also inside `torch.compile`."""
    # For a weight that is neither row-major nor column-major, oneDNN uses a kernel that is a thousand times slower.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    if torch.compiler.is_compiling():
        opaque: Tensor = torch.ops.fastssl_gemm.onednn(x, weight, bias, activation)
        return opaque
    return _onednn_kernel(x, weight, bias, activation)


def _onednn_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    # The last argument is the GELU algorithm: "none" is the exact one.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return out


# Inductor can compile oneDNN's product only if the weight is a constant. It does not look inside a custom operator, so
# the product is wrapped in one.
_LIBRARY = torch.library.Library("fastssl_gemm", "DEF")
_LIBRARY.define("onednn(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor")
_LIBRARY.impl("onednn", _onednn_kernel, "CPU")
torch.library.register_fake(
    "fastssl_gemm::onednn", lambda x, weight, bias, activation: x.new_empty(x.shape[0], weight.shape[0])
)
