"""``CameraTrajectory``: one immutable camera path (or a batch of them) in OpenCV axes and metres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.errors import DataError
from geoalign.geometry import so3

# 60 degrees of horizontal view on a 16:9 image: fx/W = 0.5/tan(30 deg), fy/H = fx/W * 16/9.
DEFAULT_INTRINSICS = (0.8660254, 1.5396007, 0.5, 0.5)

LARGEST = 1e9
"""Metres: lengths below it keep their squares, sums and products finite in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class CameraTrajectory:
    """Camera-to-world poses and intrinsics of F frames; every method returns a new object.

    Attributes:
        c2w: ``[..., F, 4, 4]`` float32 or float64, camera-to-world, OpenCV axes (x right, y down, z forward), metres.
        intrinsics: ``[..., F, 4]`` same dtype: fx, fy, cx, cy as fractions of (W, H, W, H); the principal point of a
            centred camera is (0.5, 0.5), and pixel centres lie at ``(i + 0.5) / W``.

    Construction checks shapes and dtypes only (no device synchronisation); use :meth:`validated` for outside data.
    """

    c2w: Tensor
    intrinsics: Tensor

    def __post_init__(self) -> None:
        c2w, intrinsics = self.c2w, self.intrinsics
        if c2w.ndim < 3 or c2w.shape[-2:] != (4, 4) or c2w.shape[-3] < 1:
            raise DataError(f"camera poses must be [..., frames, 4, 4], got {tuple(c2w.shape)}")
        if intrinsics.shape != (*c2w.shape[:-2], 4):
            expected = (*c2w.shape[:-2], 4)
            raise DataError(f"intrinsics must be {expected} (fx fy cx cy per frame), got {tuple(intrinsics.shape)}")
        if c2w.dtype not in (torch.float32, torch.float64) or intrinsics.dtype != c2w.dtype:
            raise DataError(f"trajectories are float32 or float64, got {c2w.dtype} poses and {intrinsics.dtype} lens")

    @classmethod
    def build(cls, c2w: Tensor, intrinsics: Tensor | Sequence[float] = DEFAULT_INTRINSICS) -> CameraTrajectory:
        """Poses ``[..., F, 4, 4]`` with intrinsics that broadcast to ``[..., F, 4]`` (for instance four numbers)."""
        lens = torch.as_tensor(intrinsics, dtype=c2w.dtype, device=c2w.device)
        return cls(c2w, lens.expand(*c2w.shape[:-2], 4))

    @classmethod
    def identity(
        cls,
        num_frames: int,
        intrinsics: Tensor | Sequence[float] = DEFAULT_INTRINSICS,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> CameraTrajectory:
        """A camera that does not move: ``[F]`` identity poses."""
        return cls.build(torch.eye(4, dtype=dtype, device=device).repeat(num_frames, 1, 1), intrinsics)

    @classmethod
    def validated(
        cls,
        c2w: Tensor,
        intrinsics: Tensor | Sequence[float] = DEFAULT_INTRINSICS,
        *,
        name: str = "trajectory",
        tolerance: float = 1e-3,
    ) -> CameraTrajectory:
        """Build from outside data, refusing what is not a camera path; rotations are then projected onto SO(3).

        Args:
            name: what the data is called in messages (a path, a key).
            tolerance: largest accepted entry of ``|R^T R - I|``; the default admits matrices printed with 4 digits.

        Raises:
            DataError: wrong shape or dtype, NaN or infinity (in float32), positions beyond ``LARGEST``, a reflection, a
                matrix that is no rotation, a last row other than (0, 0, 0, 1), focal lengths that are not positive.
        """
        try:
            trajectory = cls.build(c2w, intrinsics)
        except (DataError, RuntimeError) as error:
            raise DataError(f"{name}: {error}") from error
        poses, lens = trajectory.c2w, trajectory.intrinsics
        _refuse_frames(name, ~torch.isfinite(poses).flatten(-2).all(-1), "NaN or infinite pose")
        _refuse_frames(
            name, (poses[..., :3, 3].abs() > LARGEST).any(-1), f"position more than {LARGEST:g} m away; wrong unit?"
        )
        # In the precision that they are used in: 1e39 is infinite and 1e-50 is zero there.
        single = lens.float()
        _refuse_frames(name, ~torch.isfinite(single).all(-1), "NaN or infinite intrinsics")
        _refuse_frames(name, (single[..., :2] <= 0).any(-1), "focal length that is not positive")
        last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=poses.dtype, device=poses.device)
        _refuse_frames(name, ((poses[..., 3, :] - last).abs() > tolerance).any(-1), "last row is not 0 0 0 1")
        rotation = poses[..., :3, :3]
        _refuse_frames(name, torch.linalg.det(rotation) < 0, "reflection (determinant -1; is an axis flipped?)")
        gram = so3.matmul(rotation.transpose(-1, -2), rotation)
        residual = (gram - torch.eye(3, dtype=poses.dtype, device=poses.device)).abs().amax((-2, -1))
        _refuse_frames(name, residual > tolerance, "3x3 part is not a rotation")
        return cls(so3.rigid(so3.project(rotation), poses[..., :3, 3]), lens)

    @classmethod
    def stack(cls, items: Sequence[CameraTrajectory]) -> CameraTrajectory:
        """A batch ``[len(items), ...]`` of trajectories with equal shapes."""
        return cls(torch.stack([t.c2w for t in items]), torch.stack([t.intrinsics for t in items]))

    @classmethod
    def cat(cls, items: Sequence[CameraTrajectory]) -> CameraTrajectory:
        """Concatenate batches along the first batch dimension."""
        return cls(torch.cat([t.c2w for t in items]), torch.cat([t.intrinsics for t in items]))

    @property
    def num_frames(self) -> int:
        """F."""
        return self.c2w.shape[-3]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions before F."""
        return self.c2w.shape[:-3]

    @property
    def device(self) -> torch.device:
        """Device of the poses."""
        return self.c2w.device

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self.c2w.dtype

    @property
    def rotation(self) -> Tensor:
        """``[..., F, 3, 3]`` camera-to-world rotations."""
        return self.c2w[..., :3, :3]

    @property
    def position(self) -> Tensor:
        """``[..., F, 3]`` camera centres in metres."""
        return self.c2w[..., :3, 3]

    @property
    def w2c(self) -> Tensor:
        """``[..., F, 4, 4]`` world-to-camera."""
        return so3.invert_rigid(self.c2w)

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a single trajectory has no length; use num_frames")
        return self.batch_shape[0]

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> CameraTrajectory:
        """Index the first batch dimension (never the frames; see :meth:`frames`)."""
        if not self.batch_shape:
            raise IndexError("a single trajectory has no batch dimension; use frames(...) to select frames")
        return CameraTrajectory(self.c2w[index], self.intrinsics[index])

    def frames(self, index: slice | Tensor | Sequence[int]) -> CameraTrajectory:
        """Select frames, for instance ``frames(slice(0, None, 4))``."""
        return CameraTrajectory(self.c2w[..., index, :, :], self.intrinsics[..., index, :])

    def repeat_interleave(self, repeats: int) -> CameraTrajectory:
        """Repeat each batch element ``repeats`` times (first batch dimension)."""
        if not self.batch_shape:
            raise IndexError("a single trajectory has no batch dimension to repeat; stack it first")
        return CameraTrajectory(self.c2w.repeat_interleave(repeats, 0), self.intrinsics.repeat_interleave(repeats, 0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CameraTrajectory:
        """Copy to a device and/or to float32/float64."""
        return CameraTrajectory(self.c2w.to(device, dtype), self.intrinsics.to(device, dtype))

    def with_intrinsics(self, intrinsics: Tensor | Sequence[float]) -> CameraTrajectory:
        """The same path seen through another lens (broadcast to ``[..., F, 4]``)."""
        return CameraTrajectory.build(self.c2w, intrinsics)

    def transformed(self, transform: Tensor) -> CameraTrajectory:
        """Left-multiply all poses by rigid ``[..., 4, 4]`` (a change of the world frame)."""
        transform = transform.to(self.c2w)
        return CameraTrajectory(so3.compose(transform.unsqueeze(-3), self.c2w), self.intrinsics)

    def relative_to_first(self) -> CameraTrajectory:
        """Poses seen from frame 0: frame 0 becomes exactly the identity."""
        first = self.c2w[..., :1, :, :]
        rest = so3.compose(so3.invert_rigid(first), self.c2w[..., 1:, :, :])
        identity = torch.eye(4, dtype=self.dtype, device=self.device).expand_as(first)
        return CameraTrajectory(torch.cat((identity, rest), -3), self.intrinsics)

    def increments(self) -> tuple[Tensor, Tensor]:
        """Body-frame steps between frames: rotation vectors and moves, ``[..., F-1, 3]`` each.

        The rotation vector is ``log(R_i^T R_i+1)``, the move ``R_i^T (t_i+1 - t_i)``.
        """
        back = self.rotation[..., :-1, :, :].transpose(-1, -2)
        rotvec = so3.log(so3.matmul(back, self.rotation[..., 1:, :, :]))
        return rotvec, so3.apply(back, self.position.diff(dim=-2))

    @classmethod
    def from_increments(
        cls, rotvec: Tensor, step: Tensor, intrinsics: Tensor, *, start: Tensor | None = None
    ) -> CameraTrajectory:
        """Inverse of :meth:`increments`: integrate steps from ``start`` ``[..., 4, 4]``, by default the identity."""
        moves = so3.rigid(so3.exp(rotvec), step)
        if start is None:
            start = torch.eye(4, dtype=moves.dtype, device=moves.device).expand(*moves.shape[:-3], 4, 4)
        poses = [start]
        for move in moves.unbind(-3):
            poses.append(so3.compose(poses[-1], move))
        return cls(torch.stack(poses, -3), intrinsics)

    def path_length(self) -> Tensor:
        """``[...]`` metres travelled by the camera centre."""
        return so3.safe_norm(self.position.diff(dim=-2)).sum(-1)

    def scale_translation(self, factor: float | Tensor) -> CameraTrajectory:
        """Scale positions about frame 0's centre by ``factor`` (number or ``[...]`` over the batch); rotations stay."""
        scale = torch.as_tensor(factor, dtype=self.dtype, device=self.device)[..., None, None]
        first = self.position[..., :1, :]
        return CameraTrajectory(so3.rigid(self.rotation, first + scale * (self.position - first)), self.intrinsics)

    def scale_rotation(self, factor: float | Tensor) -> CameraTrajectory:
        """Scale every frame-to-frame rotation by ``factor`` and re-integrate from frame 0; positions stay."""
        scale = torch.as_tensor(factor, dtype=self.dtype, device=self.device)[..., None, None]
        rotvec, step = self.increments()
        turned = CameraTrajectory.from_increments(
            scale * rotvec, torch.zeros_like(step), self.intrinsics, start=self.c2w[..., 0, :, :]
        )
        return CameraTrajectory(so3.rigid(turned.rotation, self.position), self.intrinsics)

    def resample(self, num_frames: int) -> CameraTrajectory:
        """The same path in ``num_frames`` frames at equal fractions of time: slerp, linear positions and intrinsics."""
        if num_frames < 1:
            raise DataError(f"cannot resample a trajectory to {num_frames} frames; at least 1 is needed")
        last = self.num_frames - 1
        if last == 0 or num_frames == 1:
            return self.frames([0] * num_frames)
        place = torch.arange(num_frames, dtype=torch.float64) * last / (num_frames - 1)
        left = place.floor().clamp(max=last - 1).long().to(self.device)
        fraction = (place.to(self.device) - left).to(self.dtype)
        a, b = self.frames(left), self.frames(left + 1)
        rotation = so3.interpolate(a.rotation, b.rotation, fraction)
        position = torch.lerp(a.position, b.position, fraction[:, None])
        lens = torch.lerp(a.intrinsics, b.intrinsics, fraction[:, None])
        return CameraTrajectory(so3.rigid(rotation, position), lens)


def _refuse_frames(name: str, bad: Tensor, reason: str) -> None:
    """Raise ``DataError`` naming the first bad frame when any entry of ``bad`` ``[..., F]`` is set."""
    if bool(bad.any()):
        frame = int(bad.reshape(-1, bad.shape[-1]).any(0).nonzero()[0])
        raise DataError(f"{name}: frame {frame}: {reason} ({int(bad.sum())} of {bad.numel()} frames)")
