"""Camera files for tests, written by numpy alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from geoalign.geometry.trajectory import CameraTrajectory


def write_c2w(path: Path, camera: CameraTrajectory) -> None:
    """``c2w`` and ``intrinsics`` ``[F, 4]`` of one camera path as npz or JSON."""
    arrays = {"c2w": camera.c2w.double().numpy(), "intrinsics": camera.intrinsics.double().numpy()}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        path.write_text(json.dumps({key: value.tolist() for key, value in arrays.items()}))
