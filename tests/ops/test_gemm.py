import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import gemm
from tests.ops.common import assert_as_good_as

SHAPES = [(40, 64, 32), (1, 16, 8), (5, 8, 24), (300, 24, 7), (13, 1, 1), (0, 8, 4)]
EVERY_SHAPE = pytest.mark.parametrize(("rows", "inner", "width"), SHAPES)


@pytest.fixture(params=[True, False], ids=["onednn", "aten"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", request.param)
    return bool(request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_SHAPE
def test_products(library: bool, rows: int, inner: int, width: int, dtype: torch.dtype) -> None:
    shapes = [(rows, inner), (width, inner), (width,), (rows, width)]
    x, weight, bias, y = (draw(*shape, dtype=dtype) for shape in shapes)
    exact = [tensor.double() for tensor in (x, weight, bias, y)]
    nt, nn, tn = gemm.nt(x, weight, bias), gemm.nn(y, weight), gemm.tn(y, x)
    assert_as_good_as(nt, x @ weight.t() + bias, exact[0] @ exact[1].t() + exact[2], "nt")
    activated, sums = gemm.nt(x, weight, bias, gelu=True), exact[0] @ exact[1].t() + exact[2]
    assert_as_good_as(activated, F.gelu(x @ weight.t() + bias), F.gelu(sums), "nt, gelu")
    assert_as_good_as(nn, y @ weight, exact[3] @ exact[1], "nn")
    assert_as_good_as(tn, y.t() @ x, exact[3].t() @ exact[0], "tn")


def test_operands_may_be_views(library: bool) -> None:
    x, weight = draw(50, 96).view(-1).unfold(0, 48, 24), draw(32, 90)[:, 10:58]
    assert_as_good_as(gemm.nt(x, weight), x @ weight.t(), x.double() @ weight.double().t(), "nt")
    grad = draw(len(x), 64)[:, ::2]
    assert_as_good_as(gemm.tn(grad, x), grad.t() @ x, grad.double().t() @ x.double(), "tn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("inner", "width"), [(64, 48), (192, 130), (513, 16)])
def test_bits_of_a_row_do_not_depend_on_the_others(
    library: bool, inner: int, width: int, gelu: bool, dtype: torch.dtype
) -> None:
    x, weight = draw(400, inner, dtype=dtype), draw(width, inner, dtype=dtype)
    everything = gemm.nt(x, weight, gelu=gelu)
    for rows in (1, 2, 3, 7, 11, 12, 13, 40, 111, 399):
        assert torch.equal(gemm.nt(x[5 : 5 + rows].clone(), weight, gelu=gelu), everything[5 : 5 + rows]), rows


def test_compiles_without_a_graph_break(library: bool) -> None:
    x, weight, bias = draw(20, 16), draw(8, 16), draw(8)
    compiled = torch.compile(gemm.nt, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, weight, bias), gemm.nt(x, weight, bias))
