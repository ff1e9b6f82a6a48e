"""Matrix products of packed frames on the CPU, by the faster of PyTorch's two libraries.

`aten::mm` is MKL's in fp32, which uses no AVX-512 on processors that are not Intel's: on an AMD Zen 5 it reaches half
of what oneDNN does. In bf16 `aten::mm` is oneDNN's already, but called directly it is 3 to 14 % faster there, and its
GELU costs nothing. None of these is for autograd to record, which
does not know oneDNN's product: they are called inside a `torch.autograd.Function` or without gradient.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Below these many rows a library computes a row with other bits than in a larger product (measured, see the tests).
STABLE_ROWS = 12
_STABLE_ROWS_ONEDNN = 2


def _onednn_is_faster() -> bool:
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
    """The product x @ weight.T, plus bias, through GELU; the bits of a row do not depend on the other rows."""
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
    """The product x @ weight; the bits of a row do not depend on the other rows."""
    return nt(x, weight.t())


def tn(
    x: Tensor,  # (M, N)
    y: Tensor,  # (M, K)
) -> Tensor:  # (N, K)
    """The product x.T @ y, the sum over frames that a weight's gradient is."""
    # In bf16 PyTorch transposes the operands faster than oneDNN does.
    if takes_onednn(x) and x.dtype == torch.float32 and min(*x.shape, y.shape[1]) > 0:
        return _onednn(x.t(), y.t(), None)
    return x.t() @ y


def takes_onednn(x: Tensor) -> bool:
    """Whether the product is oneDNN's, called directly."""
    return ONEDNN_IS_FASTER and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    # A weight that is neither row- nor column-major falls to a kernel a thousand times slower.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    if torch.compiler.is_compiling():
        opaque: Tensor = torch.ops.fastssl_gemm.onednn(x, weight, bias, activation)
        return opaque
    return _onednn_kernel(x, weight, bias, activation)


def _onednn_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    # The last argument is the algorithm of GELU: "none" is the exact one.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return out


# Inductor compiles oneDNN's product only where the weight is a constant; under a name it does not know it calls it.
_LIBRARY = torch.library.Library("fastssl_gemm", "DEF")
_LIBRARY.define("onednn(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor")
_LIBRARY.impl("onednn", _onednn_kernel, "CPU")
torch.library.register_fake(
    "fastssl_gemm::onednn", lambda x, weight, bias, activation: x.new_empty(x.shape[0], weight.shape[0])
)
