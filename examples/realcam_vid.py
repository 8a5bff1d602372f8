"""RealCam-Vid as clips of `geoalign benchmark`: a table with captions, and a metric camera beside each video.

    python examples/realcam_vid.py data/RealCam-Vid data/RealCam-Vid/RealCam-Vid_test.npz [VIDEOS.txt]

Writes metadata.csv and cameras/ into the folder of the videos; VIDEOS.txt names those to take, one path a line. The npz
holds pickled objects, which run code when they are read, so geoalign does not: take it from its authors only.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np


def camera(record: dict[str, Any]) -> dict[str, Any]:
    """Camera-to-world in metres: theirs are world-to-camera, and align_factor is metres per unit."""
    c2w = np.linalg.inv(np.asarray(record["camera_extrinsics"], np.float64))
    c2w[:, :3, 3] *= float(record["align_factor"])
    fx, fy, cx, cy = (float(value) for value in record["camera_intrinsics"])  # fractions of width and height
    return {"extrinsic": c2w, "intrinsic": np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), "metric": True}


def main(root: str, npz: str, videos: str | None = None) -> None:
    folder = Path(root)
    wanted = set(Path(videos).read_text("utf-8").splitlines()) if videos else None
    rows = []
    for record in np.load(npz, allow_pickle=True)["arr_0"]:
        path = str(record["video_path"])
        if (wanted is not None and path not in wanted) or not (folder / path).is_file():
            continue
        file = Path("cameras", path).with_suffix(".npz")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        np.savez(folder / file, **camera(record))
        rows.append({"path": path, "caption": record["long_caption"], "camera": str(file)})
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["path", "caption", "camera"])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{folder / 'metadata.csv'}: {len(rows)} clips; benchmark.clips={folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
