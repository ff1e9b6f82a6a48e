"""GELU and its derivative, for use inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def normal_at(x, EXACT: tl.constexpr):
    """Return the standard normal distribution's probability below x, and its density at x times sqrt(2 pi).

    EXACT is for fp32. Otherwise, half as many instructions run as with `tl.erf` and `tl.exp`. Over all numbers of 16
    bits, the absolute error is then up to 5e-7, and that of GELU up to 2e-7 max(1, |x|), in fp32 arithmetic that rounds
    each step; the approximate rsqrt and exp2 of a GPU may add as much. Below -2, the relative error is up to 2e-5; with
    `tl.erf` it is up to 1, because 1 + erf cancels. This variant uses the polynomial of csrc/common/vector_math.h with
    halved coefficients. It squares an rsqrt instead of dividing, and uses one exponential for both results.
    """
    bell = tl.exp2(x * x * -0.72134752044)
    if EXACT:
        below = 0.5 + 0.5 * tl.erf(x * 0.70710678119)
    else:
        root = tl.rsqrt(1.0 + 0.282842712 * tl.abs(x))
        t = root * root
        p = 0.02513105050
        p = p * t - 0.091450736
        p = p * t + 0.0845428185
        p = p * t - 0.00280394475
        p = p * t + 0.070715852
        p = p * t + 0.084270939
        p = p * t + 0.1039213615
        p = p * t + 0.1128347965
        p = p * t + 0.112837933
        tail = p * t * bell
        below = tl.where(x < 0, tail, 1.0 - tail)
    return below, bell


@triton.jit
def gelu_derivative(x, below, bell):
    """Return the derivative of GELU at x, from the two results of `normal_at`."""
    return below + x * bell * 0.3989422804
