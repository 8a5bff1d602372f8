"""OmniWorld archives with every listed defect, and the draw of rescaled paths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from camera_files import write_c2w
from scipy import stats
from scipy.spatial.transform import Rotation

from geoalign.config.data import RescaleConfig, TrajectoriesConfig, TruncatedGaussian
from geoalign.data.omniworld import find_scenes, load_scene, read_metadata, split_record, write_archive
from geoalign.data.tally import Tally
from geoalign.data.tracks import valid_runs
from geoalign.data.trajectories import PathRescaler, draw_path, load_pool
from geoalign.errors import DataError
from geoalign.geometry.trajectory import CameraTrajectory

LENS = (0.8, 0.8 * 16 / 9, 0.5, 0.5)
CONFIG = TrajectoriesConfig(window_step=4, val_fraction=0.0)


def walk(frames: int, yaw_deg: float = 1.0, step: float = 0.05) -> CameraTrajectory:
    turn = torch.tensor([0.0, math.radians(yaw_deg), 0.0], dtype=torch.float64).expand(frames - 1, 3)
    move = torch.tensor([0.0, 0.0, step], dtype=torch.float64).expand(frames - 1, 3)
    return CameraTrajectory.from_increments(turn, move, torch.tensor(LENS, dtype=torch.float64).expand(frames, 4))


def test_reader_agrees_with_scipy_on_order_and_direction(tmp_path: Path) -> None:
    """Truth by scipy: scalar-first quaternions of the world-to-camera rotation; a forward walk has positive z."""
    rotation = Rotation.random(6, rng=np.random.default_rng(0))
    centre = np.random.default_rng(1).normal(size=(6, 3))
    record = split_record(walk(6)) | {
        "quats": rotation.inv().as_quat(scalar_first=True).tolist(),
        "trans": (-rotation.inv().apply(centre)).tolist(),
    }
    write_archive(tmp_path / "aaaaaaaaaaaa_others.tar.gz", [record, split_record(walk(6))], fps=24.0)
    first, second = load_scene(tmp_path / "aaaaaaaaaaaa_others.tar.gz", 6, CONFIG, Tally("paths"))
    np.testing.assert_allclose(first.path.rotation.numpy(), rotation.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(first.path.position.numpy(), centre, atol=1e-12)
    assert (second.path.relative_to_first().position[1:, 2] > 0).all()
    np.testing.assert_allclose(second.path.intrinsics.numpy(), np.tile(LENS, (6, 1)), rtol=1e-12)
    assert (first.fps, first.starts) == (24.0, (0,))


def test_every_listed_defect_is_counted_exactly(tmp_path: Path) -> None:
    """One archive, windows of 5 frames; each split has one defect. Counts are by hand."""
    good = split_record(walk(12))
    quats = json.loads(json.dumps(good["quats"]))
    quats[0] = [value * 1.7 for value in quats[0]]  # frame 0 is bad: frames 1..11 hold starts 1, 5
    infinite = json.loads(json.dumps(good["trans"]))
    infinite[6][1] = math.inf  # frames 0..5 and 7..11: starts 0 and 7
    records = [
        good,  # starts 0, 4
        good | {"quats": quats},
        good | {"trans": infinite},
        good | {"reproj_error_after_refine": 51.0},
        good | {"focals": [*good["focals"][:4], 0.0, *good["focals"][5:9], -1.0, 3.0, 4.0]},  # no run of 5
        good | {"invalid_frame": [5]},  # position 5 of the split: frames 0..4 and 6..11: starts 0 and 6
        good,  # id gap after 6 frames: starts 0 and 6
        good | {"trans": good["trans"][:4]},  # cut to 4 frames: too short
        {"quats": "nonsense"},
        good | {"cx": math.nan},
    ]
    ids = [list(range(1000 * k, 1000 * k + 12)) for k in range(len(records))]
    ids[6] = [*range(6000, 6006), *range(6010, 6016)]
    write_archive(tmp_path / "bbbbbbbbbbbb_others.tar.gz", records, fps=24, split_ids=ids)
    tally = Tally("camera paths")
    tracks = load_scene(tmp_path / "bbbbbbbbbbbb_others.tar.gz", 5, CONFIG, tally)
    assert {track.name[-1]: track.starts for track in tracks} == {
        "0": (0, 4), "1": (1, 5), "2": (0, 7), "5": (0, 6), "6": (0, 6)
    }  # fmt: skip
    assert tally.accepted == 5
    assert tally.causes == {
        "no window of 5 valid frames": 2, "reprojection error": 1, "unreadable camera file": 1,
        "bad principal point": 1,
    }  # fmt: skip
    assert tally.remarks["frames excluded: quaternion norm"] == 1
    assert tally.remarks["frames excluded: non-finite pose"] == 1
    assert tally.remarks["frames excluded: focal length"] == 2
    assert tally.remarks["frames excluded: marked invalid"] == 1
    assert tally.remarks["camera arrays of unequal length, cut to the shortest"] == 1


def test_scenes_folders_captions_and_metadata(tmp_path: Path) -> None:
    import tarfile

    record = split_record(walk(12))
    write_archive(
        tmp_path / "cccccccccccc_others.tar.gz", [record, record], fps=30, windows=[(0, 4), (6, 10), (14, 18)]
    )
    write_archive(tmp_path / "05017c153ac9_others.tar.gz", [record], fps=24)
    (tmp_path / "dddddddddddd_others.tar.gz").write_bytes(b"\x1f\x8b broken")
    write_archive(tmp_path / "x" / "y_others.tar.gz", [record], fps=24)
    with tarfile.open(tmp_path / "x" / "y_others.tar.gz") as archive:
        archive.extractall(tmp_path / "eeeeeeeeeeee", filter="data")
    (tmp_path / "x" / "y_others.tar.gz").unlink()
    (tmp_path / "table.csv").write_text(
        '\ufeffUID,Test Split Index,FPS,Metric Scale\ncccccccccccc,"1",30,2.5\neeeeeeeeeeee,,24,\n', encoding="utf-8"
    )
    assert read_metadata(tmp_path / "table.csv", Tally("camera paths"))["cccccccccccc"].metric_scale == 2.5
    assert len(find_scenes(tmp_path)) == 4
    tally = Tally("camera paths")
    pool = load_pool(tmp_path, 5, CONFIG, tally)
    assert [(track.name, track.starts) for track in pool.tracks] == [
        ("cccccccccccc/split_0", (0, 6)), ("eeeeeeeeeeee/split_0", (0, 4))
    ]  # fmt: skip
    assert tally.causes == {"scene listed as broken": 1, "unreadable archive": 1}
    held_out = load_pool(tmp_path, 5, CONFIG, Tally("camera paths"), "val")
    assert [(track.name, track.starts, track.fps) for track in held_out.tracks] == [
        ("cccccccccccc/split_1", (1,), 30.0)
    ]
    metric = CONFIG.model_copy(update={"rescale": RescaleConfig(scale_mode="metric", max_yaw_deg=180)})
    tally = Tally("camera paths")
    assert len(load_pool(tmp_path, 5, metric, tally).tracks) == 1
    assert tally.causes["no metric scale"] == 1


HUB_TABLE = 'UID,Test Split Index,FPS,Metric Scale\naaaaaaaaaaaa,"0",30,1.5\n'


@pytest.mark.parametrize("place", ["metadata", "."])
def test_the_scene_table_is_found_by_its_columns(tmp_path: Path, place: str) -> None:
    """As on the hub; the table of the walking clips beside it has uids too, and sorts first."""
    record = split_record(walk(12))
    for uid in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        folder = tmp_path / "annotations" / "OmniWorld-Game" / uid
        write_archive(folder / f"{uid}_others.tar.gz", [record, record], fps=24)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "omniworld_citywalk_metadata.csv").write_text("UID,videoFile\naaaaaaaaaaaa,x.mp4\n")
    (tmp_path / place / "omniworld_game_metadata.csv").write_text(HUB_TABLE)
    tally = Tally("camera paths")
    tracks = load_pool(tmp_path, 5, CONFIG, tally).tracks
    assert [(track.name, track.metric_scale) for track in tracks] == [
        ("aaaaaaaaaaaa/split_1", 1.5), ("bbbbbbbbbbbb/split_0", None), ("bbbbbbbbbbbb/split_1", None)
    ]  # fmt: skip
    assert tally.remarks["scene without a row in the table: test splits and metric scale unknown"] == 1
    (tmp_path / "copy.csv").write_text(HUB_TABLE)
    with pytest.raises(DataError, match=r"omniworld_game_metadata\.csv.*data\.trajectories\.metadata"):
        load_pool(tmp_path, 5, CONFIG, Tally("camera paths"))
    chosen = CONFIG.model_copy(update={"metadata": Path("copy.csv")})
    assert len(load_pool(tmp_path, 5, chosen, Tally("camera paths")).tracks) == 3
    # A table that says nothing of test splits leaves the split to the hash of the names.
    (tmp_path / "copy.csv").write_text("UID,Metric Scale\naaaaaaaaaaaa,1.5\nbbbbbbbbbbbb,2\n")
    hashed = chosen.model_copy(update={"val_fraction": 0.999})
    assert len(load_pool(tmp_path, 5, hashed, Tally("camera paths"), "val").tracks) == 4


def test_an_archive_beside_its_folder_is_one_scene(tmp_path: Path) -> None:
    import tarfile

    archive = tmp_path / "aaaaaaaaaaaa" / "aaaaaaaaaaaa_others.tar.gz"
    write_archive(archive, [split_record(walk(12))], fps=24)
    alone = load_pool(tmp_path, 5, CONFIG, Tally("camera paths"))
    with tarfile.open(archive) as packed:
        packed.extractall(archive.parent, filter="data")
    tally = Tally("camera paths")
    both = load_pool(tmp_path, 5, CONFIG, tally)
    assert len(both) == len(alone) == 2 and both.fingerprint() == alone.fingerprint()
    assert tally.accepted == 1 and sum(tally.remarks.values()) == 1


def test_absent_errors_and_masks_are_understood(tmp_path: Path) -> None:
    good = split_record(walk(12))
    mask = [index == 5 for index in range(12)]
    records = [
        good | {"reproj_error_after_refine": None},
        good | {"invalid_frame": mask},
        good | {"invalid_frame": [False] * 12},
        good | {"invalid_frame": None},
    ]
    write_archive(tmp_path / "aaaaaaaaaaaa_others.tar.gz", records, fps=24)
    tally = Tally("camera paths")
    tracks = load_scene(tmp_path / "aaaaaaaaaaaa_others.tar.gz", 5, CONFIG, tally)
    assert [track.starts for track in tracks] == [(0, 4), (0, 6), (0, 4), (0, 4)]
    assert not tally.rejected and tally.remarks == {"frames excluded: marked invalid": 1}


def test_runs_never_cross_a_gap_or_a_bad_frame() -> None:
    assert valid_runs([True, True, False, True, True, True], [0, 1, 2, 3, 5, 6]) == [(0, 2), (3, 4), (4, 6)]
    assert valid_runs([False], [0]) == []


def test_single_files_and_multicam(tmp_path: Path) -> None:
    write_c2w(tmp_path / "a.npz", walk(12))
    write_c2w(tmp_path / "b.json", walk(4))
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04")
    tally = Tally("camera paths")
    pool = load_pool(tmp_path, 5, CONFIG, tally)
    assert [(track.name, track.starts) for track in pool.tracks] == [("a.npz", (0, 4))]
    assert set(tally.rejected) == {"b.json", "c.npz"}
    torch.testing.assert_close(pool.raw(0).c2w, walk(12).c2w[:5], atol=1e-12, rtol=0)
    rows = {f"frame{i}": {"cam01": f"[1 0 0 0] [0 -1 0 0] [0 0 1 0] [{100 * i} 0 0 1] "} for i in range(5)}
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "camera_extrinsics.json").write_text(json.dumps(rows))
    pool = load_pool(tmp_path / "scene" / "camera_extrinsics.json", 5, CONFIG, tally)
    assert [track.name for track in pool.tracks] == ["scene/cam01"]
    # 100 cm along Unreal's forward axis is 1 m along z.
    np.testing.assert_allclose(pool.raw(0).position.numpy(), [[0, 0, i] for i in range(5)], atol=1e-9)
    for row in rows.values():
        row["cam05"] = row["cam01"].replace("00 0 0 1", "50 0 0 1")
    (tmp_path / "scene" / "camera_extrinsics.json").write_text(json.dumps(rows))
    for chosen, layout, names in (
        ("", "auto", ["scene/cam01", "scene/cam05"]),
        ("#cam05", "auto", ["scene/cam05"]),
        ("", "files", ["camera_extrinsics.json#cam01", "camera_extrinsics.json#cam05"]),
        ("#5", "files", ["camera_extrinsics.json#cam05"]),
    ):
        config = CONFIG.model_copy(update={"layout": layout})
        pool = load_pool(tmp_path / "scene" / f"camera_extrinsics.json{chosen}", 5, config, tally)
        assert [track.name for track in pool.tracks] == names
    np.save(tmp_path / "lone.npy", walk(5).c2w.numpy())
    assert [track.name for track in load_pool(tmp_path / "lone.npy", 5, CONFIG, tally).tracks] == ["lone.npy"]
    for absent, words in (
        ("absent", "no such folder"),
        ("a.npz#cam05", "one camera without a name; drop #cam05"),
    ):
        with pytest.raises(DataError, match=words):
            load_pool(tmp_path / absent, 5, CONFIG, Tally("camera paths"))


def test_drawn_speeds_follow_the_truncated_gaussian(tmp_path: Path) -> None:
    """Kolmogorov test of the drawn translation and rotation speeds against scipy (400 draws, fixed seed)."""
    write_archive(
        tmp_path / "ffffffffffff_others.tar.gz", [split_record(walk(9, 1 + i / 20)) for i in range(20)], fps=24
    )
    config = TrajectoriesConfig(val_fraction=0.0, rescale=RescaleConfig(max_rotation_scale=100.0))
    pool = load_pool(tmp_path, 9, config, Tally("camera paths"))
    rescaler = PathRescaler(config.rescale)
    results = [draw_path(pool, rescaler, 3, iteration, group)[1] for iteration in range(20) for group in range(20)]
    assert not rescaler.rejected
    for law, values in (
        (config.rescale.translation, [result.peak_translation for result in results]),
        (config.rescale.rotation, [result.peak_rotation for result in results]),
    ):
        a, b = (law.low - law.mean) / law.std, (law.high - law.mean) / law.std
        assert stats.kstest(values, stats.truncnorm(a, b, law.mean, law.std).cdf).pvalue > 0.01
    assert draw_path(pool, rescaler, 3, 7, 2)[1].tau_rotation == results[7 * 20 + 2].tau_rotation


def test_metric_modes_keep_or_clip_the_speed() -> None:
    path = walk(9, yaw_deg=0.5, step=0.2)  # at 16 fps: 3.2 m/s after a factor of 1; 8 deg/s
    kept = PathRescaler(RescaleConfig(scale_mode="metric"))(path, 0.5, (0.3, 0.6))
    assert kept.peak_translation == pytest.approx(1.6, rel=1e-9) and kept.peak_rotation == pytest.approx(8, rel=1e-6)
    cut = PathRescaler(RescaleConfig(scale_mode="metric_then_clip"))(path, 1.0, (0.3, 0.6))
    assert cut.peak_translation == pytest.approx(1.6, rel=1e-9) and cut.peak_rotation == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("mode", ["truncated_gaussian", "metric", "metric_then_clip"])
@pytest.mark.parametrize("bound", [0.0, 0.02])
def test_paths_that_do_not_turn_or_not_move_are_kept_in_every_mode(mode: str, bound: float) -> None:
    config = RescaleConfig(scale_mode=mode, static_rotation_deg=bound)  # type: ignore[arg-type]
    rescaler = PathRescaler(config)
    straight = rescaler(walk(9, yaw_deg=0.0, step=0.05), 1.0, (0.5, 0.5))
    assert straight.adjusted == ("static_rotation",) and straight.accepted and straight.peak_rotation == 0
    expected = 16 * 0.05 if mode != "truncated_gaussian" else straight.tau_translation
    assert straight.peak_translation == pytest.approx(expected)
    still = rescaler(walk(9, yaw_deg=0.0, step=0.0), 1.0, (0.5, 0.5))
    assert still.adjusted == ("static_rotation", "static_translation") and still.accepted and still.path_m == 0


def test_turns_beyond_180_degrees_stay_smooth_and_are_judged_by_their_rescaled_span(tmp_path: Path) -> None:
    """Windows that turn by 240, -300 and 60 degrees; 3 degrees a frame make 60 of each, 4.5 make 90 (limit 75)."""
    turns = (12.0, -15.0, 3.0)
    write_archive(
        tmp_path / "abababababab_others.tar.gz", [split_record(walk(21, yaw_deg=turn)) for turn in turns], fps=24
    )
    tally = Tally("camera paths")
    pool = load_pool(tmp_path, 21, CONFIG, tally)
    assert (len(pool), tally.accepted, tally.rejected) == (3, 3, {})
    outcomes = {}
    for mode in ("unwrapped", "egocentric", "paper"):
        for speed in (48.0, 72.0):  # degrees per second at 16 fps
            law = TruncatedGaussian(mean=speed, std=0.0, low=1.0, high=100.0)
            rescaler = PathRescaler(RescaleConfig(mode=mode, rotation=law))
            results = [rescaler(pool.raw(index), 1.0, (0.5, 0.5)) for index in range(3)]
            outcomes[mode, speed] = dict(rescaler.rejected)
            if mode == "paper":
                continue
            for turn, result in zip(turns, results, strict=True):
                steps = torch.rad2deg(result.trajectory.increments()[0][:, 1])
                expected = torch.full((20,), math.copysign(speed / 16, turn), dtype=torch.float64)
                torch.testing.assert_close(steps, expected, atol=1e-4, rtol=0)
                assert result.yaw_deg == pytest.approx(20 * speed / 16, abs=1e-2)
    smooth = {48.0: {}, 72.0: {"yaw": 3}}
    assert {key: value for key, value in outcomes.items() if key[0] != "paper"} == {
        (mode, speed): smooth[speed] for mode in ("unwrapped", "egocentric") for speed in (48.0, 72.0)
    }
    # Read literally, eq. 14 scales the wrapped angle: the two long turns jump from +180 s to -180 s where they wrap, a
    # span of 360 s: 90 and 72 degrees (the short one 60), or half as much again.
    assert outcomes["paper", 48.0]["yaw"] == 1 and outcomes["paper", 72.0]["yaw"] == 3
