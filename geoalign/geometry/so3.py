"""Rotations and rigid motions in plain torch: exponential and logarithm that stay exact near 0 and near pi.

All functions are batched over leading dimensions, keep float32 or float64, and are differentiable everywhere (at the
two kinks, angle 0 and angle pi, the returned subgradient is finite). Matrix products are written as elementwise sums:
a ``bmm`` may be lowered to TF32, whose rounding alone turns a 0.25 degree rotation into a 0.5 degree error, and the
angle always comes from ``atan2``, because ``arccos`` of a trace has no digits left near 0. Quaternions are xyzw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Below this squared angle the series replace the closed forms; the coefficient lists are long enough for float64 there.
_SERIES_BELOW = 0.09
_SINC = (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800)  # sin x / x
_HALF_VERSINE = (1 / 2, -1 / 24, 1 / 720, -1 / 40320, 1 / 3628800, -1 / 479001600)  # (1 - cos x) / x^2
_THIRD = (1 / 6, -1 / 120, 1 / 5040, -1 / 362880, 1 / 39916800, -1 / 6227020800)  # (x - sin x) / x^3
_INVERSE_JACOBIAN = (  # (1 - (x/2) cot(x/2)) / x^2
    1 / 12,
    1 / 720,
    1 / 30240,
    1 / 1209600,
    1 / 47900160,
    691 / 1307674368000,
    1 / 74724249600,
)
_ATAN = tuple((-1) ** k / (2 * k + 1) for k in range(12))  # atan(x) / x


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of small matrices ``[..., n, k] @ [..., k, m]`` as elementwise sums (never TF32, never a BLAS call)."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """``[..., n, k] @ [..., k] -> [..., n]`` as elementwise sums, see :func:`matmul`."""
    return (matrix * vector.unsqueeze(-2)).sum(-1)


def safe_norm(vector: Tensor) -> Tensor:
    """Euclidean norm over the last dimension with subgradient 0 (not NaN) at the zero vector."""
    squared = vector.square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def hat(vector: Tensor) -> Tensor:
    """``[..., 3]`` to the skew matrix ``[..., 3, 3]`` with ``hat(a) @ b == cross(a, b)``."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))


def vee(matrix: Tensor) -> Tensor:
    """Axial vector of the antisymmetric part, ``[..., 3, 3] -> [..., 3]``; inverse of :func:`hat`."""
    m = (matrix - matrix.transpose(-1, -2)) / 2
    return torch.stack((m[..., 2, 1], m[..., 0, 2], m[..., 1, 0]), -1)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _split(squared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask of the series branch, and angle and squared angle with harmless values there (so no NaN gradient)."""
    small = squared < _SERIES_BELOW
    guarded = torch.where(small, 1.0, squared)
    return small, guarded.sqrt(), guarded


def exp(rotvec: Tensor) -> Tensor:
    """Rotation matrix ``[..., 3, 3]`` of a rotation vector ``[..., 3]`` in radians (Rodrigues)."""
    return _exp_and_jacobian(rotvec)[0]


def _exp_and_jacobian(rotvec: Tensor) -> tuple[Tensor, Tensor]:
    """``exp`` and the left Jacobian V of SO(3), both ``[..., 3, 3]``."""
    squared = rotvec.square().sum(-1)
    small, angle, guarded = _split(squared)
    half = torch.sin(angle / 2)
    a = torch.where(small, _polynomial(squared, _SINC), torch.sin(angle) / angle)
    b = torch.where(small, _polynomial(squared, _HALF_VERSINE), 2 * half * half / guarded)
    c = torch.where(small, _polynomial(squared, _THIRD), (angle - torch.sin(angle)) / (guarded * angle))
    k = hat(rotvec)
    k2 = matmul(k, k)
    identity = torch.eye(3, dtype=rotvec.dtype, device=rotvec.device)
    rotation = identity + a[..., None, None] * k + b[..., None, None] * k2
    jacobian = identity + b[..., None, None] * k + c[..., None, None] * k2
    return rotation, jacobian


def quaternion_from_matrix(rotation: Tensor) -> Tensor:
    """Unit quaternion ``[..., 4]`` (xyzw, w >= 0) of ``[..., 3, 3]``.

    The outer product ``4 q q^T`` is linear in the matrix; its row with the largest diagonal, normalised, is the
    quaternion. No branch loses digits, and the gradient is finite for every rotation.
    """
    m = rotation
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    rows = torch.stack(
        (
            torch.stack((1 + xx - yy - zz, xy, xz, wx), -1),
            torch.stack((xy, 1 - xx + yy - zz, yz, wy), -1),
            torch.stack((xz, yz, 1 - xx - yy + zz, wz), -1),
            torch.stack((wx, wy, wz, 1 + xx + yy + zz), -1),
        ),
        -2,
    )
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = torch.take_along_dim(rows, best[..., None, None].expand(*best.shape, 1, 4), -2).squeeze(-2)
    row = row / row.square().sum(-1, keepdim=True).sqrt()
    return torch.where(row[..., 3:] < 0, -row, row)


def matrix_from_quaternion(quaternion: Tensor) -> Tensor:
    """``[..., 3, 3]`` of a quaternion ``[..., 4]`` (xyzw, any non-zero norm)."""
    x, y, z, w = (quaternion / quaternion.square().sum(-1, keepdim=True).sqrt()).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z),
        2 * (x * y - z * w),
        2 * (x * z + y * w),
        2 * (x * y + z * w),
        1 - 2 * (x * x + z * z),
        2 * (y * z - x * w),
        2 * (x * z - y * w),
        2 * (y * z + x * w),
        1 - 2 * (x * x + y * y),
    )
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def log(rotation: Tensor) -> Tensor:
    """Rotation vector ``[..., 3]`` in radians, norm in [0, pi], of ``[..., 3, 3]``; at pi either sign is right."""
    quaternion = quaternion_from_matrix(rotation)
    vector, scalar = quaternion[..., :3], quaternion[..., 3]
    squared = vector.square().sum(-1)
    small, norm, _ = _split(squared)
    cosine = torch.where(small, scalar, 1.0)
    series = _polynomial(squared / cosine.square(), _ATAN) / cosine
    closed = torch.atan2(norm, torch.where(small, 1.0, scalar)) / norm
    return vector * (2 * torch.where(small, series, closed)).unsqueeze(-1)


def angle(rotation: Tensor) -> Tensor:
    """Rotation angle ``[...]`` in radians, [0, pi], of ``[..., 3, 3]``: ``atan2(2 |vee(R)|, tr(R) - 1)``."""
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.atan2(2 * safe_norm(vee(rotation)), trace - 1)


def relative_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle of ``a^T b`` in radians, ``[..., 3, 3], [..., 3, 3] -> [...]``."""
    return angle(matmul(a.transpose(-1, -2), b))


def project(matrix: Tensor) -> Tensor:
    """Nearest rotation (Frobenius) to ``[..., 3, 3]``; use it to remove rounding, not to hide a reflection."""
    u, _, vt = torch.linalg.svd(matrix)
    sign = torch.linalg.det(matmul(u, vt)).sign()
    flip = torch.ones_like(matrix[..., 0])
    flip[..., 2] = sign
    return matmul(u * flip.unsqueeze(-2), vt)


def rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """Homogeneous ``[..., 4, 4]`` from ``[..., 3, 3]`` and ``[..., 3]``."""
    top = torch.cat((rotation, translation.unsqueeze(-1)), -1)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=top.dtype, device=top.device).expand(*top.shape[:-2], 1, 4)
    return torch.cat((top, bottom), -2)


def invert_rigid(transform: Tensor) -> Tensor:
    """Inverse of rigid ``[..., 4, 4]`` by transposition (no linear solve, exact rotation)."""
    rotation_t = transform[..., :3, :3].transpose(-1, -2)
    return rigid(rotation_t, -apply(rotation_t, transform[..., :3, 3]))


def compose(a: Tensor, b: Tensor) -> Tensor:
    """Product of rigid transforms ``[..., 4, 4]``; the last row stays exactly (0, 0, 0, 1)."""
    rotation = matmul(a[..., :3, :3], b[..., :3, :3])
    return rigid(rotation, apply(a[..., :3, :3], b[..., :3, 3]) + a[..., :3, 3])


def se3_exp(twist: Tensor) -> Tensor:
    """Rigid transform ``[..., 4, 4]`` of a twist ``[..., 6]`` = (translation part in metres, rotation vector)."""
    rotation, jacobian = _exp_and_jacobian(twist[..., 3:])
    return rigid(rotation, apply(jacobian, twist[..., :3]))


def se3_log(transform: Tensor) -> Tensor:
    """Twist ``[..., 6]`` of a rigid ``[..., 4, 4]``; inverse of :func:`se3_exp` for rotation angles up to pi."""
    rotvec = log(transform[..., :3, :3])
    squared = rotvec.square().sum(-1)
    small, theta, guarded = _split(squared)
    closed = (1 - theta / 2 * torch.cos(theta / 2) / torch.sin(theta / 2)) / guarded
    d = torch.where(small, _polynomial(squared, _INVERSE_JACOBIAN), closed)
    k = hat(rotvec)
    translation = transform[..., :3, 3]
    k_t = apply(k, translation)
    rho = translation - k_t / 2 + d.unsqueeze(-1) * apply(k, k_t)
    return torch.cat((rho, rotvec), -1)


def interpolate(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    """Geodesic from rotation ``a`` to ``b`` (``[..., 3, 3]``) at ``fraction`` ``[...]`` (slerp)."""
    return matmul(a, exp(log(matmul(a.transpose(-1, -2), b)) * fraction.unsqueeze(-1)))
