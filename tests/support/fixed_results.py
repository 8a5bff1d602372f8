"""A benchmark's folder with results that are made up: rows and settings, and no video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from geoalign.benchmark.store import Store
from geoalign.config.load import load_config, to_yaml
from geoalign.config.schema import Config

CAMERA = ("rot_err_deg", "trans_err_published", "trans_err", "translation_error_m", "rotation_error_deg", "scale_ratio",
          "translation_gain")  # fmt: skip


def row(method: str, clip: str, path: str, speed: float, error: float | None) -> dict[str, Any]:
    """A case whose every number follows from ``error``; None: ViPE lost the camera."""
    still = path == "pan_right"
    metrics = {} if error is None else {name: error * (1 + place) for place, name in enumerate(CAMERA)}
    if still and metrics:
        metrics |= {"trans_err": None, "scale_ratio": None, "translation_gain": None, "trans_err_published": 0.0}
    found = {"status": "failed", "cause": "timed out after 1800 s", "metrics": {}, "by_frame": {}}
    if error is not None:
        found = {"status": "ok", "cause": "", "metrics": metrics, "by_frame": {}}
    quality = {"subject_consistency": 0.9, "dynamic_degree": 1.0 if error and error > 0.2 else 0.0}
    number = {"pan_right": 1, "zoom_in": 5}[path]
    return {
        "method": method, "case": f"{clip}_camera_{number}_speed_{speed:g}", "clip": clip, "path": path, "speed": speed,
        "status": "ok", "cause": "", "frames": 49, "video": f"videos/{method}/{clip}.mp4",
        "source": f"sources/{clip}_49.mp4", "metrics": {},
        "facts": {"rotation_deg_per_frame": 0.248 * speed if still else 0.0,
                  "translation_m_per_frame": 0.0 if still else 0.025 * speed,
                  "dynamic_share": {"bear": 0.3, "dog": 0.05, "swan": 0.1}[clip], "near_share": None},
        "readers": {"vipe": found, "vbench": {"status": "ok", "cause": "", "metrics": quality, "by_frame": {}},
                    "planar": {"status": "not applicable", "cause": "no ground plane is known of this clip",
                               "metrics": {}, "by_frame": {}}},
    }  # fmt: skip


def fixed_results(folder: Path) -> Store:
    """Three clips x two paths x two speeds x two methods; the base loses one clip at speed 2."""
    store = Store(folder)
    rows = []
    for place, clip in enumerate(("bear", "dog", "swan")):
        for path in ("pan_right", "zoom_in"):
            for speed in (1.0, 2.0):
                base = None if (clip, speed, path) == ("swan", 2.0, "zoom_in") else 0.2 * speed + 0.01 * place
                rows += [row("base", clip, path, speed, base), row("trained", clip, path, speed, 0.1 + 0.02 * place)]
    for item in rows:
        file = folder / "rows" / item["method"] / f"{item['case']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(item))
    cases = [item["case"] for item in rows if item["method"] == "base"]
    readers = {
        "planar": {"cameras": True, "metrics": [], "licence": "", "kind": "planar", "is_the_reward": True},
        "vipe": {"cameras": True, "metrics": [], "licence": "Apache-2.0"},
        "vbench": {"cameras": False, "metrics": ["subject_consistency", "dynamic_degree"], "licence": "Apache-2.0"},
    }
    manifest = {
        "settings": {},
        "methods": {"trained": {}, "base": {}},
        "contents": {},
        "cases": cases,
        "readers": readers,
    }
    (folder / "benchmark.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(to_yaml(load_config(Config, "smoke", ["benchmark.resamples=500"])))
    numbers = {"source": "arXiv 0000.00000, table 1", "methods": {"OtherMethod": {"rot_err_deg": 1.25}}}
    (folder / "numbers.json").write_text(json.dumps(numbers))
    return store
