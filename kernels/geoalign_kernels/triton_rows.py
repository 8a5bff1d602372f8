"""Tiles of the row kernels: a program holds a few rows whole, in float32, as a tuple of chunks.

A row of D elements is ``chunks`` pieces of ``chunk`` columns, the largest power of two that divides D: 1536 = 3 x 512
keeps every lane busy, where one padded tile of 2048 would idle a quarter of them.

Shapes in the bodies: R rows and C columns of a chunk; a row is a tuple of chunks ``[R, C]``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.dispatch import UnsupportedInput
from geoalign_kernels.triton_angles import cross_pairs, rotate, sincos

ROWS = 2
"""Rows of a program: with four warps each lane holds 16 bytes of a 512-column chunk of one row, and five blocks of the
heavier kernels share a multiprocessor where wider ones leave room for two."""
MAX_CHUNK = 1024
MAX_CHUNKS = 8
LANE_ELEMENTS = 8  # one 16-byte access of bf16 per lane


class RowPlan(NamedTuple):
    """How a row kernel tiles: ``rows`` x ``chunk`` elements a step, ``chunks`` steps a row."""

    rows: int
    chunk: int
    chunks: int
    warps: int

    def grid(self, tokens: int, batch: int) -> tuple[int, int]:
        """Programs of a launch, each over ``rows`` tokens of one sample."""
        return -(-tokens // self.rows), batch

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of every row kernel, and its number of warps."""
        return {
            "WIDTH": self.chunk * self.chunks, "ROWS": self.rows, "CHUNK": self.chunk, "CHUNKS": self.chunks,
            "num_warps": self.warps,
        }  # fmt: skip


def plan_rows(width: int, multiple_of: int = 1) -> RowPlan:
    """Tile for rows of ``width`` elements whose chunks must hold whole groups of ``multiple_of`` (a head).

    Raises:
        UnsupportedInput: ``width`` has no power-of-two divisor that fits.
    """
    chunk = min(width & -width, MAX_CHUNK)
    chunks = width // chunk
    if chunks > MAX_CHUNKS or chunk % multiple_of or chunk < 2:
        raise UnsupportedInput(f"rows of {width} in groups of {multiple_of} do not split into power-of-two chunks")
    warps = max(1, min(8, ROWS * chunk // (32 * LANE_ELEMENTS)))
    return RowPlan(ROWS, chunk, chunks, warps)


@triton.jit
def row_tile(tokens, ROWS: tl.constexpr):
    """(sample, tokens [ROWS], which of them exist) of this program; 64-bit, because rows times width may pass 2^31."""
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return tl.program_id(1).to(tl.int64), s, s < tokens


@triton.jit
def load_chunk(X, b, s, ok, strides, c, CHUNK: tl.constexpr):
    """Chunk c of the rows s in float32: [ROWS, CHUNK], zero where a row does not exist."""
    at = b * strides[0] + s[:, None] * strides[1] + (c * CHUNK + tl.arange(0, CHUNK))[None, :]
    return tl.load(X + at, mask=ok[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_chunk(Y, y, b, s, ok, strides, c, CHUNK: tl.constexpr):
    """Rounds y to the element type of Y and writes it to chunk c of the rows s."""
    at = b * strides[0] + s[:, None] * strides[1] + (c * CHUNK + tl.arange(0, CHUNK))[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=ok[:, None])


@triton.jit
def load_rows(X, b, s, ok, strides, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Whole rows as a tuple of float32 chunks."""
    row = ()
    for c in tl.static_range(CHUNKS):
        row = row + (load_chunk(X, b, s, ok, strides, c, CHUNK),)  # noqa: RUF005 - Triton knows no unpacking
    return row


@triton.jit
def load_vector(Vector, c, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk c of a per-channel vector, addressed as [ROWS, CHUNK] so that it lands in the layout of the rows."""
    at = tl.zeros((ROWS, 1), tl.int32) + (c * CHUNK + tl.arange(0, CHUNK))[None, :]
    return tl.load(Vector + at).to(tl.float32)


@triton.jit
def dense(tokens, WIDTH: tl.constexpr):
    """(batch, token) strides of a dense [B, tokens, WIDTH]; 64-bit, because they may pass 2^31."""
    return tl.cast(tokens, tl.int64) * WIDTH, WIDTH  # no method: Triton makes an argument that is 1 a plain int


@triton.jit
def row_mean(row, WIDTH: tl.constexpr):
    """Mean over the columns of a tuple of chunks: [ROWS, 1]."""
    total = row[0]
    for c in tl.static_range(1, len(row)):
        total += row[c]
    return (tl.sum(total, 1) / WIDTH)[:, None]


@triton.jit
def row_covariance(x, x_mean, y, y_mean, WIDTH: tl.constexpr):
    """Mean over the columns of (x - x_mean) (y - y_mean) of two tuples of chunks: [ROWS, 1]."""
    total = (x[0] - x_mean) * (y[0] - y_mean)
    for c in tl.static_range(1, len(x)):
        total += (x[c] - x_mean) * (y[c] - y_mean)
    return (tl.sum(total, 1) / WIDTH)[:, None]


@triton.jit
def norm_gradient(
    Grad, x, Scale, b, s, ok, grad_strides, scale_stride, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Gradient to the rows x of their modulated LayerNorm, as a tuple of chunks."""
    grads = ()
    for c in tl.static_range(CHUNKS):
        scale = load_vector(Scale + b * scale_stride, c, ROWS, CHUNK)
        grads = grads + (load_chunk(Grad, b, s, ok, grad_strides, c, CHUNK) * (1.0 + scale),)  # noqa: RUF005
    mean, grad_mean = row_mean(x, WIDTH), row_mean(grads, WIDTH)
    inverse = tl.rsqrt(row_covariance(x, mean, x, mean, WIDTH) + eps)
    slope = row_covariance(x, mean, grads, grad_mean, WIDTH) * inverse * inverse  # [R, 1]
    result = ()
    for c in tl.static_range(CHUNKS):
        result = result + (inverse * (grads[c] - grad_mean - (x[c] - mean) * slope),)  # noqa: RUF005
    return result


@triton.jit
def norm_backward(
    DY, X, DX, Weight, weight_sum, angles, dangles, b, s, ok, dy_strides, x_strides, dx_strides, eps,
    WEIGHT: tl.constexpr, ANGLES: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dx of one normalised and rotated operand; returns the grown weight gradient and angle gradients."""
    x = load_rows(X, b, s, ok, x_strides, CHUNK, CHUNKS)
    inverse = tl.rsqrt(row_covariance(x, 0.0, x, 0.0, WIDTH) + eps)
    grads, weight_sums, angle_sums = (), (), ()
    for c in tl.static_range(CHUNKS):
        dz = load_chunk(DY, b, s, ok, dy_strides, c, CHUNK)  # [R, C]
        weight = load_vector(Weight, c, ROWS, CHUNK)
        if len(angles) > 0:
            sine, cosine = sincos(angles[c])  # [R, C/2] each
            dz = rotate(dz, cosine, -sine, ROWS, CHUNK)
        if ANGLES:
            angle_sums = angle_sums + (dangles[c] + cross_pairs(x[c] * inverse * weight, dz, ROWS, CHUNK),)  # noqa: RUF005
        if WEIGHT:
            weight_sums = weight_sums + (weight_sum[c] + dz * x[c] * inverse,)  # noqa: RUF005
        grads = grads + (dz * weight,)  # noqa: RUF005
    if DX is not None:
        slope = row_covariance(x, 0.0, grads, 0.0, WIDTH) * inverse * inverse  # [R, 1]
        for c in tl.static_range(CHUNKS):
            store_chunk(DX, inverse * (grads[c] - x[c] * slope), b, s, ok, dx_strides, c, CHUNK)
    return weight_sums, angle_sums


@triton.jit
def zero_tiles(WANTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    """A tuple of zero tiles, empty unless wanted."""
    tiles = ()
    if WANTED:
        for _ in tl.static_range(CHUNKS):
            tiles = tiles + (tl.zeros((ROWS, COLUMNS), tl.float32),)  # noqa: RUF005
    return tiles


@triton.jit
def store_vector_sum(Partial, total, b, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The sum over its rows as the partial sum of this program: [programs, WIDTH]."""
    row = Partial + (b * tl.num_programs(0) + tl.program_id(0)) * WIDTH + tl.arange(0, CHUNK)
    for c in tl.static_range(CHUNKS):
        tl.store(row + c * CHUNK, tl.sum(total[c], 0))


def dense_rows(x: Tensor) -> Tensor:
    """x [B, S, D] itself, or a copy, such that the channels are dense."""
    return x if x.stride(2) == 1 else x.contiguous()


def row_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of batch and token; zeros for an absent operand."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def vector_stride(vector: Tensor) -> int:
    """Batch stride of [B, D]; 0 for a vector that all samples share."""
    return vector.stride(0) if vector.dim() == 2 and vector.shape[0] > 1 else 0
