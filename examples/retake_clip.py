"""Film a clip again along another camera path, and measure how well the camera followed it.

    python examples/retake_clip.py MODEL CLIP [CAMERA] [OUT.mp4]

MODEL is whatever `geoalign sample --model` takes (runs/tiny_cpu after `make demo`); the camera and the ground plane of
CLIP are read from the npz beside it.
"""

import sys

from geoalign import RetakePolicy, score


def main(model: str, clip: str, camera: str = "zoom_in", out: str = "retake.mp4") -> None:
    policy = RetakePolicy.from_pretrained(model)
    retake = policy.retake(clip, camera, speed=8)  # presets are slow: they were made for 81 frames
    files = retake.save(out)
    (row,) = score(out, files["settings"])  # out.json tells the target path, the source and its camera
    print(
        f"{out}: {retake.video.shape[0]} frames, {row['trans_m']:.2f} m and {row['rot_deg']:.1f} degrees off the path"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
