"""A finished run, as every page test reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report_runs import FRAMES, HEIGHT, WIDTH, paths, summary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "eval").mkdir()
    for stage, scale in (("before", 1.4), ("after", 1.1)):
        clips = {
            key: rng.integers(0, 255, (5, FRAMES, 3, HEIGHT, WIDTH), np.uint8)
            for key in ("source", "generated", "truth")
        }
        np.savez(
            tmp_path / "eval" / f"{stage}.npz",
            names=np.array([f"presets/<arc_{i}>" for i in range(5)]),
            target_c2w=paths(5, 1.0),
            estimated_c2w=paths(5, scale),
            **clips,
        )
    rows = [
        {"iteration": i, "reward/trans": -1.0 / (i + 1), "reward/trans_m": 1.0 / (i + 1),
         "parity/log_prob_diff_max": 0.0, "policy/ratio_max": 1.0 + i * 1e-6, "failures/vlm": 0.0, "reward/rot": None,
         "time/rollout_denoise_s": 2.0, "time/rollout_decode_s": 1.0, "time/update_s": 1.0, "time/iteration_s": 4.5}
        for i in range(6)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text("run:\n  name: <script>alert(1)</script>\n")
    (tmp_path / "env.json").write_text('{"python": "3.11"}')
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    return tmp_path
