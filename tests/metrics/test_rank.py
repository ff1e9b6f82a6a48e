"""Test the effective rank: its formula, and that a stream gives the same value."""

import math

import pytest
import torch
from torch import Tensor

from fastssl.metrics import GramMatrix, effective_rank


def matrix_with(singular_values: Tensor, rows: int, seed: int = 0) -> Tensor:
    """Return a (rows, D) fp64 matrix with these singular values."""
    random = torch.Generator().manual_seed(seed)
    width = len(singular_values)
    left = torch.linalg.qr(torch.randn(rows, width, dtype=torch.float64, generator=random)).Q
    right = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=random)).Q
    matrix: Tensor = left * singular_values @ right.T
    return matrix


def test_formula() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3, abs=1e-12)
    assert effective_rank(torch.tensor([5.0])) == 1
    # By hand: p is 3/4 and 1/4. With squared singular values it would be 9/10 and 1/10.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.tensor([0.3, 0.1], dtype=torch.float64)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, math.nan], [1.0, -1.0], [math.inf], [[1.0]]])
def test_formula_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError, match="singular_values: "):
        effective_rank(torch.tensor(values))


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5])
def test_known_spectrum_from_a_stream(decay: float) -> None:
    spectrum = 7.0 * decay ** torch.arange(24, dtype=torch.float64)
    shares = spectrum / spectrum.sum()
    expected = math.exp(-sum(p * math.log(p) for p in shares.tolist()))
    matrix = matrix_with(spectrum, 600)
    stream, at_once = GramMatrix(24), GramMatrix(24)
    at_once.update(matrix)
    for portion in matrix.split((1, 200, 0, 399)):
        stream.update(portion)
    assert stream.rows == 600
    assert effective_rank(at_once.singular_values()) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(stream.singular_values()) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(stream.singular_values().flip(0), spectrum, rtol=1e-6, atol=1e-6)


def test_nothing_is_centred() -> None:
    constant = GramMatrix(8)
    constant.update(torch.full((50, 8), 3.0))
    assert effective_rank(constant.singular_values()) == pytest.approx(1, abs=1e-9)


def test_singular_values_of_zero_stay_zero() -> None:
    # Rounding errors in the Gram matrix must not count as hundreds of small directions.
    gram = GramMatrix(256)
    gram.update(matrix_with(torch.tensor([4.0, 4.0] + 254 * [0.0], dtype=torch.float64), 400))
    assert effective_rank(gram.singular_values()) == pytest.approx(2, abs=1e-6)


def test_bad_rows() -> None:
    gram = GramMatrix(4)
    with pytest.raises(ValueError, match=r"rows: expected \(n, 4\), got \(3, 5\)"):
        gram.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        gram.singular_values()
    gram.update(torch.tensor([[1.0, 2.0, math.nan, 0.0]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        gram.singular_values()
