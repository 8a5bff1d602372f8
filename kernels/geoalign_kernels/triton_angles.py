"""Device functions for angles: sine, cosine and logarithm without slow paths, rotation of pairs, camera phases.

They keep to what Triton 3.6 to 3.9 have in common and use no fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def polynomial_sincos(r):
    """(sin, cos) of |r| <= pi/4; minimax polynomials, 2e-9 and 1e-10 before rounding."""
    z = r * r
    sine = r + r * z * (-0.16666649281978607 + z * (0.008331923745572567 + z * -0.0001948872086359188))
    cosine = 1.0 - 0.5 * z + z * z * (0.04166664555668831 + z * (-0.0013887305976822972 + z * 2.443120138195809e-05))
    return sine, cosine


@triton.jit
def turn_quadrant(sine, cosine, quadrant):
    """(sin, cos) of r + quadrant * pi/2 from those of r."""
    swap = (quadrant & 1) == 1
    s = tl.where(swap, cosine, sine)
    c = tl.where(swap, sine, cosine)
    return tl.where((quadrant & 2) == 2, -s, s), tl.where(((quadrant + 1) & 2) == 2, -c, c)


@triton.jit
def sincos(angle):
    """(sin, cos) for |angle| < 8192 rad, about 1 ulp; no slow path, hence no stack frame and no fp64.

    pi/2 is subtracted in three parts whose leading ones have few mantissa bits, so that n * part is exact.
    """
    n = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = ((angle - n * 1.5703125) - n * 4.837512969970703e-4) - n * 7.549789948768648e-8
    s, c = polynomial_sincos(r)
    return turn_quadrant(s, c, n.to(tl.int32))


@triton.jit
def sincos_turns(u):
    """(sin, cos) of 2 pi u for u in (0, 1); the reduction to an octant is exact."""
    n = tl.floor(u * 4.0 + 0.5)
    s, c = polynomial_sincos((u - n * 0.25) * 6.283185307179586)
    return turn_quadrant(s, c, n.to(tl.int32))


@triton.jit
def log_unit(u):
    """ln u for normal u in (0, 1], relative error of a few ulp even next to 1 (the hardware log has none there).

    u = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    tail = z * (0.3333333432674408 + z * (0.20000000298023224 + z * (0.1428571492433548 + z * 0.1111111119389534)))
    return 2.0 * (s + s * tail) + exponent.to(tl.float32) * 0.6931471805599453


@triton.jit
def rotate(x, cosine, sine, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Multiplies adjacent pairs of x [ROWS, CHUNK] by cosine + i sine [ROWS, CHUNK/2]."""
    real, imaginary = tl.split(tl.reshape(x, (ROWS, CHUNK // 2, 2)))
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return tl.reshape(turned, (ROWS, CHUNK))


@triton.jit
def cross_pairs(x, y, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Im(conj(x) y) of adjacent pairs: [ROWS, CHUNK/2]."""
    x_real, x_imaginary = tl.split(tl.reshape(x, (ROWS, CHUNK // 2, 2)))
    y_real, y_imaginary = tl.split(tl.reshape(y, (ROWS, CHUNK // 2, 2)))
    return x_real * y_imaginary - x_imaginary * y_real


@triton.jit
def phase_offsets(c, HEAD: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr):
    """(head, camera pair, valid) of the CHUNK/2 pairs of chunk c; the PAIRS phases act on the last pairs of a head."""
    i = tl.arange(0, CHUNK // 2)
    pair = i % (HEAD // 2) - (HEAD // 2 - PAIRS)
    return (c * CHUNK // HEAD) + i // (HEAD // 2), pair, pair >= 0


@triton.jit
def load_angle(
    Position, Phase, b, s, ok, c, sign, strides,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """position + sign * phase of chunk c: [ROWS, CHUNK/2]; VECTOR phases in a row start at a multiple of VECTOR."""
    head, pair, valid = phase_offsets(c, HEAD, PAIRS, CHUNK)
    angle = tl.zeros((s.shape[0], CHUNK // 2), tl.float32)
    if Position is not None:
        i = tl.arange(0, CHUNK // 2) % (HEAD // 2)
        angle += tl.load(Position + s[:, None] * (HEAD // 2) + i[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
    if Phase is not None:
        at = b * strides[0] + s[:, None] * strides[1] + (head * strides[2] + pair)[None, :]
        at = tl.max_contiguous(tl.multiple_of(at, (1, VECTOR)), (1, VECTOR))
        angle += sign * tl.load(Phase + at, mask=ok[:, None] & valid[None, :], other=0.0).to(tl.float32)
    return angle


@triton.jit
def load_turn(
    Phase, b, s, ok, c, sign, strides,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(sin, cos) of sign * phase of chunk c. Load them before the rows they turn: Triton then brings the angles to the
    layout of the rows through shared memory, and not the rows to that of the angles and back."""
    return sincos(load_angle(None, Phase, b, s, ok, c, sign, strides, HEAD, PAIRS, CHUNK, VECTOR))


@triton.jit
def store_angles(
    DPhase, angles, b, s, ok, tokens, sign, HEADS,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the camera pairs, dense [B, S, H, PAIRS]."""
    VECTOR: tl.constexpr = 2 - PAIRS % 2
    for c in tl.static_range(CHUNKS):
        head, pair, valid = phase_offsets(c, HEAD, PAIRS, CHUNK)
        at = (b * tokens + s[:, None]) * (HEADS * PAIRS) + (head * PAIRS + pair)[None, :]
        at = tl.max_contiguous(tl.multiple_of(at, (1, VECTOR)), (1, VECTOR))
        tl.store(DPhase + at, (sign * angles[c]).to(DPhase.dtype.element_ty), mask=ok[:, None] & valid[None, :])


def phase_vector(*phases: Tensor | None) -> int:
    """2 if all phases of a head may be read in aligned pairs, else 1."""
    present = [p for p in phases if p is not None]
    even = not any(v % 2 for p in present for v in (p.shape[3], *p.stride()[:3], p.data_ptr() // p.element_size()))
    return 2 if even else 1


def phase_operand(phase: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int], int]:
    """(tensor with a dense last dimension, strides of batch, token and head with 0 where broadcast, P)."""
    if phase is None:
        return None, (0, 0, 0), 1
    phase = phase if phase.stride(3) == 1 else phase.contiguous()
    strides = [0 if size == 1 else stride for size, stride in zip(phase.shape[:3], phase.stride()[:3], strict=True)]
    return phase, (strides[0], strides[1], strides[2]), phase.shape[3]
