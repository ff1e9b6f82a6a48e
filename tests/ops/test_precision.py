"""Test which of PyTorch's switches decides the precision of fp32 products, however the switch was set."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from fastssl import ops
from fastssl.kernels import precision
from fastssl.kernels.dispatch import BACKENDS
from tests.ops.common import layout_of, randn

pytestmark = pytest.mark.usefixtures("switches")


@pytest.fixture
def switches() -> Iterator[None]:
    """Start from PyTorch's default switches, and restore them."""
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


def _set(place: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(place, name, value)


#: Name -> a way to set a switch, and the precisions of convolutions and of matrix products after it.
SETTINGS: dict[str, tuple[Callable[[], None], str, str]] = {
    "default": (lambda: None, "tf32", "ieee"),
    "matmul": (_set(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32", "tf32"),
    "conv": (_set(precision._CONVOLUTIONS, "fp32_precision", "ieee"), "ieee", "ieee"),
    "older_conv": (_set(torch.backends.cudnn, "allow_tf32", False), "ieee", "ieee"),
    "older_matmul": (_set(torch.backends.cuda.matmul, "allow_tf32", True), "tf32", "tf32"),
    "high": (lambda: torch.set_float32_matmul_precision("high"), "tf32", "tf32"),
}


def test_every_op_has_a_switch() -> None:
    assert precision.SWITCHES.keys() == BACKENDS.keys()


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_way_to_set_a_switch_is_followed(setting: str) -> None:
    switch, convolutions, products = SETTINGS[setting]
    switch()
    assert (precision.of_convolutions(), precision.of_matrix_products()) == (convolutions, products)


def _strided_conv() -> None:
    x, weight = (randn(*shape).float().requires_grad_() for shape in ((40, 4), (8, 4, 3)))
    values, _ = ops.strided_conv(x, weight, layout_of((25, 15)), stride=2, backend="triton")
    values.sum().backward()


def _varlen_attention() -> None:
    q = randn(20, 2, 16).float().requires_grad_()
    bias = randn(2, 5).float().requires_grad_()
    ops.varlen_attention(q, q, q, layout_of((12, 8)), distance_bias=bias, backend="triton").sum().backward()


@pytest.mark.parametrize(("setting", "found"), [("tf32", ("tf32", "tf32")), ("ieee", ("ieee", "ieee"))])
def test_the_setting_for_everything_is_followed(setting: str, found: tuple[str, str]) -> None:
    """It is what Transformers' `enable_tf32` sets. A process of its own, because nothing restores the default."""
    code = (
        f"import torch; torch.backends.fp32_precision = {setting!r}\n"
        "from fastssl.kernels import precision; from tests.ops import test_precision as calls\n"
        "if 'triton' in calls.BACKENDS['strided_conv']['cpu']: calls._strided_conv(); calls._varlen_attention()\n"
        "print(precision.of_convolutions(), precision.of_matrix_products())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()) == found


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the set of precisions of all products that Triton's interpreter computes from now on."""
    if "triton" not in BACKENDS["strided_conv"]["cpu"]:
        pytest.skip("Triton's interpreter does not run here")
    from triton.runtime.interpreter import InterpreterBuilder

    found = set()
    original = InterpreterBuilder.create_dot

    def create_dot(builder: object, a: object, b: object, c: object, input_precision: object, *rest: object) -> object:
        found.add(str(input_precision).split(".")[-1].lower())
        return original(builder, a, b, c, input_precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("op", ["strided_conv", "varlen_attention"])
def test_kernels_run_in_the_precision_of_the_op_that_they_replace(op: str, setting: str, used: set[str]) -> None:
    switch, convolutions, products = SETTINGS[setting]
    switch()
    {"strided_conv": _strided_conv, "varlen_attention": _varlen_attention}[op]()
    assert used == {convolutions if op == "strided_conv" else products}


def test_other_dtypes_and_older_gpus_have_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.precision_of("strided_conv", torch.empty(1)) == "tf32"
    assert precision.precision_of("strided_conv", torch.empty(1, dtype=torch.bfloat16)) == "ieee"
    monkeypatch.setattr(precision, "has_tf32", lambda device: False)
    assert precision.precision_of("strided_conv", torch.empty(1)) == "ieee"
    assert "no TF32" in precision.describe_fp32(torch.device("cuda"))
