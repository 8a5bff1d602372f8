"""What a training run keeps of an iteration for people to look at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from geoalign.data.frames import to_uint8
from geoalign.types import RetakeBatch


@dataclass(frozen=True, slots=True, eq=False)
class TrainingFilm:
    """One training sample on the host, for people to look at: the first of its rank, picked by nobody.

    Attributes:
        source, retake: uint8 ``[F, 3, H, W]``.
        target_c2w: ``[F, 4, 4]``, what was asked for.
        intrinsics: ``[F, 4]`` of the retake.
        ground_plane: ``[4]``, or None where no plane is known.
        read_c2w: ``[F, 4, 4]``, what a reward read from the retake, in axes of the target; NaN where it read nothing,
            None where no reward reads cameras.
    """

    source: NDArray[np.uint8]
    retake: NDArray[np.uint8]
    target_c2w: NDArray[np.float32]
    intrinsics: NDArray[np.float32]
    ground_plane: NDArray[np.float32] | None
    read_c2w: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, conditions: RetakeBatch, decoded: Tensor) -> TrainingFilm:
        """The first of ``conditions`` and of the ``decoded`` videos ``[R, F, 3, H, W]``."""
        target, plane = conditions.target_camera, conditions.source.ground_plane
        return cls(
            to_uint8(conditions.source.video[0]).cpu().numpy(),
            to_uint8(decoded[0]).cpu().numpy(),
            target.c2w[0].float().cpu().numpy(),
            target.intrinsics[0].float().cpu().numpy(),
            None if plane is None else plane[0].float().cpu().numpy(),
        )

    def with_camera(self, camera: Tensor | None) -> TrainingFilm:
        """The same with the camera ``[F, 4, 4]`` that was read from the retake, relative to its first frame."""
        return self if camera is None else replace(self, read_c2w=self.target_c2w[0] @ camera.float().cpu().numpy())
