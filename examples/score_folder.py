"""Score every retake of a folder, each against the path it was asked for, and plot the errors.

    python examples/score_folder.py FOLDER [OUT.png]

FOLDER holds what `geoalign sample` wrote: videos with their JSON beside them.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from geoalign import build_reward, score


def main(folder: str, out: str = "errors.png") -> None:
    reward = build_reward("geometry", {"evaluator": "planar"})  # once, for all videos
    videos = sorted(path for path in Path(folder).glob("*.mp4") if path.with_suffix(".json").exists())
    rows = [score(video, video.with_suffix(".json"), reward=reward)[0] for video in videos]
    rows.sort(key=lambda row: row["trans_m"])
    figure, (metres, degrees) = plt.subplots(
        1, 2, figsize=(9, 1.2 + 0.3 * len(rows)), sharey=True, layout="constrained"
    )
    names = [Path(row["video"]).stem for row in rows]
    metres.barh(names, [row["trans_m"] for row in rows])
    metres.set_xlabel("mean position error, m")
    degrees.barh(names, [row["rot_deg"] for row in rows], color="tab:orange")
    degrees.set_xlabel("mean rotation error, degrees")
    figure.savefig(out, dpi=150)
    print(f"{out}: {len(rows)} retakes, the best is {names[0]} ({rows[0]['trans_m']:.2f} m)")


if __name__ == "__main__":
    main(*sys.argv[1:])
