"""Device helpers that the kernels share: norms of rows, the valid rows of a ring, the temperature, softplus."""

import triton
import triton.language as tl
from fastssl.kernels import interpreted

# The interpreter miscalculates in bfloat16 (casts are exact), so there every tile is widened when it is loaded.
INTERPRETED = tl.constexpr(interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
EPS = tl.constexpr(1e-12)  # of F.normalize
FLOOR = tl.constexpr(-1e30)  # a maximum over nothing: below every logit, and FLOOR - FLOOR is 0, not NaN
HUGE = tl.constexpr(1e30)
DOWN = tl.constexpr(2.0**-66)
UP = tl.constexpr(2.0**66)


@triton.jit
def widen(x: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """`x` in float32 if asked for or interpreted, else as it is."""
    if WIDEN or INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """`x` rounded to `dtype`, the type of the matrix product's other side."""
    x = x.to(dtype)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def squares(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Two sums of squares, as they are and scaled down: one of them does not overflow."""
    x = x.to(tl.float32)
    small = x * DOWN
    return tl.sum(x * x, axis), tl.sum(small * small, axis)


@triton.jit
def root(plain: tl.tensor, scaled: tl.tensor) -> tl.tensor:
    """The norm that belongs to the two sums of `squares`."""
    return tl.where(plain < HUGE, tl.sqrt(plain), tl.sqrt(scaled) * UP)


@triton.jit
def norm(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Norms along `axis`, right also where squares overflow."""
    plain, scaled = squares(x, axis)
    return root(plain, scaled)


@triton.jit
def inverse(norms: tl.tensor) -> tl.tensor:
    """What F.normalize multiplies with; NaN stays NaN, which `tl.maximum` would drop."""
    return 1.0 / tl.where(norms < EPS, EPS, norms)


@triton.jit
def largest(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The largest absolute value."""
    return tl.max(tl.abs(x.to(tl.float32)), axis)


@triton.jit
def power_of_two(most: tl.tensor) -> tl.tensor:
    """The power of two p with 1 ≤ p·most < 2, where `most` is what `largest` found in a row (at least eps).

    Rows scaled by it keep every bit, in half precision too, and their norms are below 2·√D: so the product with another
    row overflows only from norms of 1.7e38/√D on. Of a norm it must not be taken: the compiler may sum twice, in two
    layouts and orders, and where one sum is just below 1 and the other is 1 the two powers differ by a factor of 2. A
    maximum is the same in every order.
    """
    exponent = tl.maximum(most, EPS).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(0x7F000000 - exponent, 0x00800000).to(tl.float32, bitcast=True)  # normal, or it would be 0


@triton.jit
def unit_row(x: tl.tensor) -> tl.tensor:
    """x/‖x‖ and ‖x‖ of one row; scaled first, for the inverse of a huge norm would be a denormal."""
    length = norm(x, 0)
    scale = power_of_two(largest(x, 0))
    return (x * scale) * (inverse(length) / scale), length


@triton.jit
def unit_rows(x: tl.tensor) -> tl.tensor:
    """x/‖x‖ and ‖x‖ of each row; scaled first, for the inverse of a huge norm would be a denormal."""
    length = norm(x, 1)
    scale = power_of_two(largest(x, 1))
    return (x * scale[:, None]) * (inverse(length) / scale)[:, None], length


@triton.jit
def through_norm(gradient: tl.tensor, unit: tl.tensor, along: tl.tensor, norms: tl.tensor) -> tl.tensor:
    """The gradient of a row from that of its direction `unit`; `along` is their product gradient·unit."""
    tangent = (gradient - along * unit) / tl.maximum(norms, EPS)
    return tl.where(norms > EPS, tangent, gradient / EPS)


@triton.jit
def inverse_temperature(temperature: tl.tensor, temperature_tensor: tl.tensor) -> tl.tensor:
    """1/T, from the device if there is a tensor."""
    if temperature_tensor is not None:
        temperature = tl.load(temperature_tensor).to(tl.float32)
    return 1.0 / temperature


@triton.jit
def ring(first: tl.tensor, count: tl.tensor, capacity: tl.tensor) -> tl.tensor:
    """Where the valid rows of a ring begin, in 0…capacity-1, and how many there are; `first` may be any integer."""
    start = capacity * 0
    valid = capacity
    if first is not None:
        size = capacity.to(tl.int64)
        at = tl.load(first).to(tl.int64)
        valid = tl.minimum(tl.maximum(tl.load(count).to(tl.int64), 0), size).to(capacity.dtype)
        start = modulo(at, size).to(capacity.dtype)
    return start, valid


@triton.jit
def modulo(at: tl.tensor, size: tl.tensor) -> tl.tensor:
    """`at` mod `size` in 0…size-1, both of 64 bits; `at` may be any integer, `size` 0."""
    if (at < 0) | (at >= size):  # rarely: a division of 64 bits takes long
        at = at % tl.maximum(size, 1)
        at = tl.where(at < 0, at + size, at)  # the device's remainder has the sign of `at`
    return at


@triton.jit
def log1p(y: tl.tensor) -> tl.tensor:
    """log(1+y) for 0 ≤ y ≤ 1, to the last digits of a small y too: 2·artanh(y/(2+y)) as a series."""
    z = y / (2.0 + y)
    w = z * z
    series = 1.0 / 17
    series = series * w + 1.0 / 15
    series = series * w + 1.0 / 13
    series = series * w + 1.0 / 11
    series = series * w + 1.0 / 9
    series = series * w + 1.0 / 7
    series = series * w + 1.0 / 5
    series = series * w + 1.0 / 3
    return 2.0 * z * (series * w + 1.0)


@triton.jit
def softplus_and_sigmoid(x: tl.tensor) -> tl.tensor:
    """log(1+eˣ) and its derivative; both are 0 at -∞."""
    small = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + log1p(small), tl.where(x >= 0, 1.0, small) / (1.0 + small)
