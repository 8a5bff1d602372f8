"""Clip tables with the defects of the published ones; captions; cameras."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geoalign.config.data import ClipsConfig, DataConfig
from geoalign.data.cache import window_key
from geoalign.data.captions import prompt_of, remove_camera_motion
from geoalign.data.citywalk import write_metadata
from geoalign.data.clip_record import ClipRecord, youtube_id
from geoalign.data.clips import in_split, is_held_out, list_clips, natural_key
from geoalign.data.loader import ClipLoader, cause_of
from geoalign.data.readers import open_reader
from geoalign.data.tally import Tally
from geoalign.data.video import write_video
from geoalign.errors import DataError
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.trajectory import CameraTrajectory

FRAMES = torch.zeros(9, 48, 64, 3, dtype=torch.uint8)
LENS = (0.8, 0.8 * 64 / 48, 0.5, 0.5)


def test_a_published_table_with_defects(tmp_path: Path) -> None:
    root = tmp_path / "with space \u00fc"
    names = ["-a_b_0000000_0000009", "c-d_0000010_0000019", "\u00e9 f_0000000_0000009"]
    write_video(root / "files" / "-a_b" / f"{names[0]}.mp4", FRAMES, 30)
    write_video(root / "c-d" / f"{names[1]}.mp4", FRAMES, 30)
    write_video(root / "deep" / "er" / f"{names[2]}.mp4", FRAMES, 30)
    rows = [{"videoFile": f"{name}.mp4", "caption": 'A, "quoted"\nstreet', "location": "K\u00f6ln"} for name in names]
    rows += [rows[0], {"videoFile": "gone_0000000_0000009.mp4"}, {"caption": "no file"}]
    rows += [{"videoFile": f"x{names[1]}.mp4", "start_frame": "soon"}]
    write_metadata(root / "t.csv", rows)
    (root / "t.csv").write_bytes(b"\xef\xbb\xbf" + (root / "t.csv").read_bytes())
    tally = Tally("clips")
    records = list_clips(root, ClipsConfig(), tally)
    assert [(record.clip_id, record.video_id) for record in records] == sorted(
        zip(names, ["-a_b", "c-d", "\u00e9 f"], strict=True)
    )
    assert records[0].caption == 'A, "quoted"\nstreet' and records[0].extra["location"] == "K\u00f6ln"
    assert tally.causes == {"missing file": 2, "row without a file name": 1}
    assert tally.accepted == 3 and tally.remarks == {"listed twice, first row kept": 1}
    with pytest.raises(DataError, match="3 of 6 clips"):
        tally.check(0.2)


def test_tables_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    for content, words in ((b"a,b\n1,2\n", "no column"), (b"\xff\xfe\x00", "not UTF-8"), (b'videoFile\n"\x00\n', None)):
        (tmp_path / "metadata.csv").write_bytes(content)
        with pytest.raises(DataError, match=words or "metadata.csv|no usable"):
            list_clips(tmp_path, ClipsConfig(), Tally("clips"))
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"path": "a.mp4"}\n{broken\n')
    with pytest.raises(DataError, match="line 2"):
        list_clips(tmp_path, ClipsConfig(), Tally("clips"))
    with pytest.raises(DataError, match="no such folder"):
        list_clips(tmp_path / "absent", ClipsConfig(), Tally("clips"))


@pytest.mark.parametrize("table", [False, True])
def test_clips_of_equal_names_in_different_folders_are_all_used(tmp_path: Path, table: bool) -> None:
    """As in MultiCamVideo. One scene of the table is missing: its rows must not take the files of another."""
    names = [f"scene{scene}/videos/cam{camera:02d}" for scene in range(3) for camera in range(2)]
    for name in names:
        write_video(tmp_path / f"{name}.mp4", FRAMES, 30)
        write_clip_camera(tmp_path / f"{name}.npz", CameraTrajectory.identity(9, LENS), (48, 64))
    if table:
        rows = ["missing/videos/cam00", *names, "./scene0/videos/cam00"]
        lines = [f"{name}.mp4,text of {name}" for name in rows]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    tally = Tally("clips")
    records = list_clips(tmp_path, ClipsConfig(), tally)
    assert [record.clip_id for record in records] == names
    for record in records:
        assert record.path == tmp_path / f"{record.clip_id}.mp4" and record.camera == record.path.with_suffix(".npz")
        assert record.video_id == record.clip_id.rpartition("/")[0]  # one side of the split for all of a scene
        assert record.caption == (f"text of {record.clip_id}" if table else "")
    assert tally.rejected == ({"missing/videos/cam00.mp4": "missing file"} if table else {})
    assert sum(tally.remarks.values()) == table


def test_names_without_a_folder_must_be_unique(tmp_path: Path) -> None:
    for name in ("a/x.mp4", "b/x.mp4", "b/y.mp4", "b/y.mkv"):
        write_video(tmp_path / name, FRAMES, 30)
    assert [record.clip_id for record in list_clips(tmp_path, ClipsConfig(), Tally("clips"))] == [
        "a/x", "b/x", "b/y.mkv", "b/y.mp4"
    ]  # fmt: skip
    (tmp_path / "t.csv").write_text("path\nx.mp4\ny.mp4\n")
    tally = Tally("clips")
    assert [record.path for record in list_clips(tmp_path, ClipsConfig(), tally)] == [tmp_path / "b/y.mp4"]
    assert tally.rejected == {"x.mp4": "several files of this name"}


@pytest.mark.parametrize("named", ["v_0_9", "v_0_9.npz", "v/v_0_9.npz", "v_0_9.json", "gone.npz", ""])
def test_cameras_are_found_however_the_table_calls_them(tmp_path: Path, named: str) -> None:
    write_video(tmp_path / "files" / "v" / "v_0_9.mp4", FRAMES, 30)
    write_clip_camera(tmp_path / "files" / "v" / "v_0_9.npz", CameraTrajectory.identity(9, LENS), (48, 64))
    write_metadata(tmp_path / "metadata.csv", [{"videoFile": "v_0_9.mp4", "cameraFile": named}])
    (record,) = list_clips(tmp_path, ClipsConfig(), Tally("clips"))
    assert record.camera == tmp_path / "files" / "v" / "v_0_9.npz"


def test_a_table_may_choose_one_camera_of_a_file(tmp_path: Path) -> None:
    """As in MultiCamVideo: one JSON a scene. The choice is read, and a prepared window depends on it."""
    write_video(tmp_path / "v.mp4", FRAMES, 30)
    # Row vectors in Unreal axes: 100 cm along forward is 1 m along z.
    poses = [{f"cam{n:02d}": f"[1 0 0 0] [0 -1 0 0] [0 0 1 0] [{100 * n * f} 0 0 1]" for n in (1, 5)} for f in range(9)]
    (tmp_path / "cams.json").write_text(json.dumps({f"frame{f}": row for f, row in enumerate(poses)}))
    keys, config = set(), DataConfig(num_frames=9, height=48, width=64, clips=ClipsConfig(stride=1, default_focal=0.7))
    for number in (1, 5):
        write_metadata(tmp_path / "metadata.csv", [{"videoFile": "v.mp4", "cameraFile": f"cams.json#cam{number:02d}"}])
        (record,) = list_clips(tmp_path, ClipsConfig(), Tally("clips"))
        window = ClipLoader(config, open_reader("pyav", None)).load(record, 0)
        assert window.camera.position[:, 2].tolist() == pytest.approx([number * f for f in range(9)])
        # The file has no lens: that of the settings stands in.
        assert window.camera.intrinsics[0].tolist() == pytest.approx([0.7, 0.7 * 64 / 48, 0.5, 0.5])
        keys.add(window_key(record, "", 0, {}))
    assert len(keys) == 2
    write_metadata(tmp_path / "metadata.csv", [{"videoFile": "v.mp4", "cameraFile": "cams.json"}])
    (record,) = list_clips(tmp_path, ClipsConfig(), Tally("clips"))
    with pytest.raises(DataError, match=r"choose one, as in cams\.json#cam01") as caught:
        ClipLoader(config, open_reader("pyav", None)).load(record, 0)
    assert cause_of(caught.value, record).startswith("holds the cameras")


def test_several_tables_are_an_error_and_not_none(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", FRAMES, 30)
    for name in ("hq.csv", "mapping.csv"):
        (tmp_path / name).write_text("videoFile,caption\na.mp4,words\n")
    with pytest.raises(DataError, match=r"hq\.csv, mapping\.csv.*data\.clips\.metadata"):
        list_clips(tmp_path, ClipsConfig(), Tally("clips"))
    (record,) = list_clips(tmp_path, ClipsConfig(metadata=Path("hq.csv")), Tally("clips"))
    assert record.caption == "words"


def test_frame_folders_and_davis(tmp_path: Path) -> None:
    import cv2

    for name in ("bear", "camel"):
        folder = tmp_path / "JPEGImages" / "480p" / name
        folder.mkdir(parents=True)
        for index in range(9):
            cv2.imwrite(str(folder / f"{index:05d}.jpg"), FRAMES[0].numpy())
    (tmp_path / "JPEGImages" / "480p" / "empty").mkdir()
    tally = Tally("clips")
    records = list_clips(tmp_path, ClipsConfig(), tally)
    assert [record.clip_id for record in records] == ["bear", "camel"]
    assert tally.causes == {"folder without images": 1}
    assert len(list_clips(tmp_path / "JPEGImages" / "480p", ClipsConfig(), Tally("clips"))) == 2
    config = DataConfig(num_frames=5, height=24, width=32, clips=ClipsConfig(stride=2, camera="none"))
    window = ClipLoader(config, open_reader("pyav")).load(records[0], 0)
    assert window.frames.shape == (5, 3, 24, 32)


def test_unusable_clips_have_one_cause_each(tmp_path: Path) -> None:
    from fractions import Fraction

    import av

    with av.open(str(tmp_path / "vfr.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, stamp in enumerate((0, 33, 66, 200, 233, 500, 533, 566, 600)):
            frame = av.VideoFrame.from_ndarray(FRAMES[index].numpy(), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    write_video(tmp_path / "short.mp4", FRAMES[:4], 30)
    write_video(tmp_path / "good.mp4", FRAMES, 30)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-1000])
    config = DataConfig(num_frames=5, height=48, width=64, clips=ClipsConfig(stride=1, camera="none"))
    loader, causes = ClipLoader(config, open_reader("pyav")), {}
    for record in list_clips(tmp_path, config.clips, Tally("clips")):
        try:
            causes[record.clip_id] = str(len(loader.starts(record)))
        except DataError as error:
            causes[record.clip_id] = cause_of(error, record)
    assert causes["good"] == "5"
    assert causes["short"] == "too short, 4 of 5 frames"
    assert causes["vfr"].startswith("variable frame rate")
    assert causes["cut"].startswith("cannot be decoded")


def test_split_is_by_video_and_stable() -> None:
    clips = [ClipRecord(f"v{v}_{s}_{s + 9}", f"v{v}", Path("x")) for v in range(200) for s in (0, 9)]
    val = [clip for clip in clips if in_split(clip, "val", 0.25)]
    train = [clip for clip in clips if in_split(clip, "train", 0.25)]
    assert len(val) + len(train) == len(clips) and not {c.video_id for c in val} & {c.video_id for c in train}
    assert abs(len(val) / len(clips) - 0.25) < 0.11  # 3.5 standard deviations of a binomial of 200
    assert is_held_out("v7", 1.0) and not is_held_out("v7", 0.0)
    assert in_split(ClipRecord("a", "a", Path("x"), extra={"split": "val"}), "val", 0.0)
    assert youtube_id("xpPE_-cDNak_0023550_0025350") == "xpPE_-cDNak" and youtube_id("bear") == "bear"
    assert sorted(["f10", "f9", "f2b"], key=natural_key) == ["f2b", "f9", "f10"]


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("A street at dusk. The camera pans left. People walk by.", "A street at dusk. People walk by."),
        ("We walk forward past shops. Neon signs glow.", "Neon signs glow."),
        ("The video is filmed from a first-person view. Cars move along the road.", "Cars move along the road."),
        ("Smooth footage, moving steadily through an alley!", ""),
        ("A photographer with a camera sits on a bench.", "A photographer with a camera sits on a bench."),
    ],
)
def test_sentences_about_camera_motion_go(caption: str, kept: str) -> None:
    assert remove_camera_motion(caption) == kept
    record = ClipRecord("a", "a", Path("x"), caption)
    assert prompt_of(record, ClipsConfig(caption_text="fallback")) == (kept or "fallback")
    assert prompt_of(record, ClipsConfig(caption="verbatim")) == caption
    assert prompt_of(record, ClipsConfig(caption="constant", caption_text="one")) == "one"
    assert prompt_of(record, ClipsConfig(caption="blip2"), "a dog") == "a dog"
