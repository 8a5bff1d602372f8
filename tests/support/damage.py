"""Damaged inputs for every reader, seeded: sound files are made once, then cut, flipped, doubled or replaced by traps.

A reader either returns what a sound file holds, or raises the project's error. Where a checksum or a count could tell,
other content is accepted wrongly; where none could, it is accepted rightly as long as it is valid.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import damage_records as records
import numpy as np
import torch
from patience import PATIENCE_S, READ_CPU_S

from geoalign.config.data import DataConfig, TrajectoriesConfig
from geoalign.config.load import load_config
from geoalign.config.model import ModelConfig
from geoalign.config.schema import Config
from geoalign.config.training import CodecConfig
from geoalign.config.world import WorldConfig
from geoalign.data.cache import CacheFolder, Entry, open_cache
from geoalign.data.omniworld import load_scene, split_record, write_archive
from geoalign.data.tables import read_table
from geoalign.data.tally import Tally
from geoalign.data.video import read_video, write_video
from geoalign.errors import DataError, UserError
from geoalign.files.weights import TensorFile
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.cameras.door import open_camera
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models.pretrained import open_pretrained
from geoalign.policy.files import new_policy, read_policy_file, save_policy
from geoalign.report.page import report_page
from geoalign.report.run_folder import read_run
from geoalign.training.checkpoint import RunSettings, TrainState, load_checkpoint, save_checkpoint
from geoalign.training.engines.snapshot import Snapshot
from geoalign.world.dataset import write_world

Outcome = Literal["clear_error", "accepted_rightly", "accepted_wrongly", "traceback", "hang"]
MAX_BYTES = 1 << 30
_LENS = (0.8, 0.8 * 64 / 48, 0.5, 0.5)
_PATH = CameraTrajectory.identity(8, _LENS, dtype=torch.float64)
_TINY = ModelConfig(
    dim=24, heads=1, layers=1, ffn_dim=8, in_channels=4, out_channels=4, text_dim=4, text_length=1, freq_dim=8
)


@dataclass(frozen=True, slots=True)
class Case:
    """A reader: how a sound input is made in a folder, which of its files is damaged, how it is read.

    Attributes:
        make: writes the input into an empty folder.
        file: pattern of the file that is damaged.
        read: reads the input and returns its content, or raises.
        told: whether a checksum or a count tells any other content.
    """

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], Any]
    told: bool = False


class Damaged(NamedTuple):
    """One damaged input; ``call`` reads it and returns whether what it accepted is right."""

    reader: str
    description: str
    call: Callable[[], bool]


def _tensors(file: TensorFile) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(file.items(), key=lambda item: item[0]):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.float().flatten().tolist()}".encode())
    return found.hexdigest()


def _make_policy(folder: Path) -> None:
    codec = CodecConfig(patch=2, luma=1, chroma=1)
    save_policy(folder / "policy.safetensors", new_policy(_TINY, codec, 1), codec, {"seed": 1})


def _read_policy(folder: Path) -> Any:
    found = read_policy_file(folder / "policy.safetensors")
    return found.config, _tensors(found.weights), dict(found.notes)


def _make_checkpoint(folder: Path) -> None:
    values = {f"block.{k}": torch.arange(12.0).reshape(3, 4) + k for k in range(3)}
    optimizer = {name: {"exp_avg": value / 7, "step": torch.tensor(3.0)} for name, value in values.items()}
    state = TrainState(3, Snapshot(values, {name: value / 3 for name, value in values.items()}, optimizer), {"a": 1.5})
    save_checkpoint(folder, state, config=RunSettings("x", {"a": 1}), keep=1)


def _read_checkpoint(folder: Path) -> Any:
    state = load_checkpoint(folder / "step_000003", config=RunSettings("x", {"a": 1}))
    flat = {f"{name}/{key}": value for name, row in state.snapshot.optimizer.items() for key, value in row.items()}
    parts = (state.snapshot.values, state.snapshot.average, flat)
    return state.iteration, dict(state.notes), [{k: v.tolist() for k, v in sorted(part.items())} for part in parts]


_SETTINGS = {"data": {"frames": 8}, "encoder": {"codec": "x"}}


def _make_cache(folder: Path, packed: bool = True) -> None:
    cache, keys = CacheFolder(folder, _SETTINGS), []
    for number in range(3):
        entry = Entry(f"{number:032x}", f"clip{number}", number, f"/c{number}.mp4", "0" * 64, 9, 9, "a street")
        cache.add(entry, {"latents": torch.arange(24.0).reshape(2, 3, 4) * number})
        keys.append(entry.key)
    if packed:
        cache.pack(keys)


def _read_cache(folder: Path) -> Any:
    cache = open_cache(folder, _SETTINGS["data"])
    entries = cache.entries()
    content = {key: {n: t.tolist() for n, t in cache.read(entry).items()} for key, entry in entries.items()}
    if len(entries) < 3:  # the count is known to whoever asks for windows; `data check` names the file
        raise DataError(f"{folder}: {len(entries)} of 3 windows")
    return content, [(entry.clip_id, entry.start, entry.caption) for entry in entries.values()]


def _read_archive(folder: Path) -> Any:
    tally = Tally("camera paths")
    tracks = load_scene(next(folder.iterdir()), 4, TrajectoriesConfig(), tally)
    if tally.rejected:  # defects inside an archive are counted, not raised
        raise DataError(tally.summary())
    return [track.path.c2w.tolist() for track in tracks]


def _camera(folder: Path) -> Any:
    return _poses(next(folder.iterdir()))


def _poses(name: Path | str) -> Any:
    found = open_camera(name, image_size=(48, 64))
    if not (torch.isfinite(found.path.c2w).all() and torch.isfinite(found.path.intrinsics).all()):
        raise AssertionError("a camera that is not finite was accepted")
    return found.path.c2w.tolist(), found.path.intrinsics.tolist()


def _make_video(folder: Path) -> None:
    noise = torch.randint(0, 256, (8, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(folder / "clip.mp4", noise.repeat_interleave(8, 1).repeat_interleave(8, 2), 12, lossless=True)


def _read_video(folder: Path) -> Any:
    frames = read_video(folder / "clip.mp4", range(8))
    assert frames.shape == (8, 3, 48, 64)
    return frames.shape


def _make_run(folder: Path) -> None:
    (folder / "eval").mkdir()
    (folder / "config.yaml").write_text("run: {name: x, seed: 1}\noptim:\n  lr: 1.0e-4\n  betas: [0.9, 0.99]\n")
    numbers = {kind: {s: {"translation_error_m": 0.5} for s in ("before", "after")} for kind in ("presets", "mean")}
    (folder / "summary.json").write_text(json.dumps({"held_out": numbers, "seed": 1, "wall_s": 3.5}))
    (folder / "env.json").write_text(json.dumps({"commit": "abc", "versions": {"torch": "2"}}))
    rows = [{"iteration": k, "reward/mean": 0.1 * k, "time/iteration_s": 2.0, "time/rollout_s": 1.0} for k in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    video = np.zeros((2, 3, 3, 16, 16), np.uint8)
    poses = np.tile(np.eye(4, dtype=np.float32), (2, 3, 1, 1))
    arrays = {"source": video, "generated": video, "truth": video, "target_c2w": poses, "estimated_c2w": poses}
    np.savez_compressed(folder / "eval" / "before.npz", names=np.array(["a", "b"]), **arrays)


def _make_stop(folder: Path) -> None:
    _make_run(folder)
    (folder / "summary.json").unlink()
    (folder / "stopped.json").write_text(json.dumps({"iteration": 4, "reason": "a bad audit", "repeats": True}))


def _make_film(folder: Path) -> None:
    _make_run(folder)
    (folder / "films").mkdir()
    video = np.zeros((3, 3, 16, 16), np.uint8)
    arrays = {"source": video, "retake": video, "target_c2w": np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))}
    lens = np.tile(np.array(_LENS, np.float32), (3, 1))
    np.savez(folder / "films" / "iteration_000004.npz", **arrays, intrinsics=lens, frames=np.arange(3) + 1)


def _read_report(folder: Path) -> Any:
    return len(report_page(read_run(folder), 1)) > 0


def _save_c2w(folder: Path) -> None:
    (folder / "camera.json").write_text(json.dumps({"c2w": _PATH.c2w.tolist(), "intrinsics": list(_LENS)}))


def _archive(folder: Path) -> None:
    write_archive(folder / "0123456789ab_others.tar.gz", [split_record(_PATH, image_size=(48, 64))], fps=24)


def _make_vipe(folder: Path) -> None:
    lens = np.tile([51.2, 51.2, 32.0, 24.0], (8, 1))
    for name, data in (("pose", _PATH.c2w.numpy()), ("intrinsics", lens)):
        (folder / name).mkdir()
        np.savez(folder / name / "clip.npz", data=data, inds=np.arange(8))


def _read_vipe(folder: Path) -> Any:
    return _poses(folder / "pose" / "clip.npz")


def _recammaster() -> str:
    row = "[0 1 0 0] [1 0 0 0] [0 0 1 0] [{} 0 170 1] "
    frames = {f"frame{k}": {f"cam{c:02d}": row.format(3390 + k * c) for c in (1, 2)} for k in range(8)}
    return json.dumps(frames, indent=1)


_DATA, _WORLD = (
    DataConfig(root=Path("."), num_frames=2, height=16, width=16),
    WorldConfig(height=16, width=16, frames=2, focal_px=13.0, clips=1, trajectories=1),
)


def _make_world(folder: Path) -> None:
    write_world(_DATA.model_copy(update={"root": folder / "data"}), _WORLD)
    (folder / "drone00007_0000000_0000002.mp4").write_text("not of this world, though it is called so")


def _read_world(folder: Path) -> Any:
    """Whatever the stamp says: the world is there afterwards, and nothing outside of it was touched."""
    write_world(_DATA.model_copy(update={"root": folder / "data"}), _WORLD)
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "world.json")  # settings are a note
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _make_encoder(folder: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    size = UMT5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    UMT5EncoderModel(size).save_pretrained(folder)


def _read_encoder(folder: Path) -> Any:
    from transformers import UMT5EncoderModel

    model = open_pretrained(UMT5EncoderModel, folder, "umT5 text encoder folder")
    return [tuple(value.shape) for value in model.state_dict().values()]


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


CASES: dict[str, Case] = {
    "policy": Case(_make_policy, "policy.safetensors", _read_policy, told=True),
    "weights.pt": Case(
        lambda folder: torch.save({"a": torch.arange(200.0), "b": torch.ones(3, 4)}, folder / "weights.pt"),
        "weights.pt", lambda folder: _tensors(TensorFile(folder / "weights.pt")), told=True,
    ),
    "checkpoint weights": Case(_make_checkpoint, "step_*/trained.safetensors", _read_checkpoint, told=True),
    "checkpoint optimizer": Case(_make_checkpoint, "step_*/optimizer.safetensors", _read_checkpoint, told=True),
    "checkpoint state": Case(_make_checkpoint, "step_*/state.json", _read_checkpoint, told=True),
    "cache shard": Case(_make_cache, "*/shard-*.safetensors", _read_cache, told=True),
    "cache manifest": Case(_make_cache, "*/shard-*.jsonl", _read_cache, told=True),
    "cache settings": Case(_make_cache, "*/settings.json", _read_cache, told=True),
    "cache part": Case(lambda folder: _make_cache(folder, False), "*/parts/*", _read_cache, told=True),
    "camera archive": Case(_archive, "*", _read_archive, told=True),
    "camera npz": Case(
        lambda folder: write_clip_camera(folder / "camera.npz", _PATH, (48, 64)), "camera.npz", _camera, told=True
    ),
    "camera npy": Case(lambda folder: np.save(folder / "camera.npy", _PATH.c2w.numpy()), "camera.npy", _camera),
    "camera JSON": Case(_save_c2w, "camera.json", _camera),
    "camera of ReCamMaster": Case(
        _write("camera_extrinsics.json", _recammaster()), "*.json",
        lambda folder: _poses(f"{folder / 'camera_extrinsics.json'}#cam01"),
    ),
    "camera of ViPE": Case(_make_vipe, "pose/clip.npz", _read_vipe, told=True),
    "lens of ViPE": Case(_make_vipe, "intrinsics/clip.npz", _read_vipe, told=True),
    "camera of TUM": Case(
        _write("t.txt", "".join(f"{k / 24:.4f} 0 0 {k / 10} 0 0 0 1\n" for k in range(8))), "t.txt", _camera
    ),
    "camera of RealEstate10K": Case(
        _write("r.txt", "https://www.youtube.com/watch?v=x\n" + "".join(
            f"{k * 41666} 0.6 1.07 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 {k / 10}\n" for k in range(8))),
        "r.txt", lambda folder: _poses(f"{folder / 'r.txt'}#unit=m"),
    ),
    "camera of KITTI": Case(
        _write("k.txt", "".join(f"1 0 0 0 0 1 0 0 0 0 1 {k / 10}\n" for k in range(8))), "k.txt", _camera
    ),
    "camera of Redirect4D": Case(
        _write("trajectory.json", json.dumps({"camera_path": [
            {"extrinsic": [[1, 0, 0, k / 10], [0, 1, 0, 0], [0, 0, 1, 0]]} for k in range(8)]})),
        "trajectory.json", _camera,
    ),
    "stamp of a world": Case(_make_world, "data/world.json", _read_world, told=True),
    "encoder settings": Case(_make_encoder, "config.json", _read_encoder),
    "encoder weights": Case(_make_encoder, "model.safetensors", _read_encoder),
    "configuration": Case(
        _write("c.yaml", "extends: smoke\nrun:\n  seed: 3\noptim: &o\n  lr: 1.0e-4\n  trainable: 'attn'\n"),
        "c.yaml", lambda folder: load_config(Config, str(folder / "c.yaml")),
    ),
    "csv": Case(_write("t.csv", 'videoFile,caption\na.mp4,"a, b"\n'), "t.csv", lambda f: read_table(f / "t.csv")),
    "jsonl": Case(_write("t.jsonl", '{"path": "a.mp4", "n": 1}\n' * 4), "t.jsonl", lambda f: read_table(f / "t.jsonl")),
    "report metrics": Case(_make_run, "metrics.jsonl", _read_report),
    "report summary": Case(_make_run, "summary.json", _read_report),
    "report environment": Case(_make_run, "env.json", _read_report),
    "report settings": Case(_make_run, "config.yaml", _read_report),
    "reason of a stop": Case(_make_stop, "stopped.json", _read_report),
    "report clips": Case(_make_run, "eval/before.npz", _read_report),
    "video": Case(_make_video, "clip.mp4", _read_video),
    "film of a run": Case(_make_film, "films/iteration_000004.npz", _read_report, told=True),
    "row of a benchmark": Case(records.make_benchmark, "rows/base/*.json", records.read_benchmark),
    "manifest of a benchmark": Case(records.make_benchmark, "benchmark.json", records.read_benchmark),
    "settings of a benchmark": Case(records.make_benchmark, "config.yaml", records.read_benchmark),
    "numbers of a benchmark": Case(records.make_benchmark, "numbers.json", records.read_benchmark),
    "prompts of a benchmark": Case(_write("p.json", '{"bear": "a", "dog": "b"}'), "p.json", records.read_prompts),
    "table of fidelity": Case(records.make_fidelity, "f.json", records.read_fidelity),
    "drift profile": Case(records.make_profile, "drift.json", records.read_drift),
    "table of scenes": Case(
        _write("scenes.csv", "UID,Total Img Num,FPS\n" + "".join(f"{k:012x},2400,24.0\n" for k in range(5))),
        "scenes.csv", records.read_subset,
    ),
    "camera of nerfstudio": Case(
        _write("transforms.json", json.dumps({
            "fl_x": 51.2, "fl_y": 51.2, "cx": 32, "cy": 24, "w": 64, "h": 48,
            "frames": [{"file_path": f"{k:04d}.png", "transform_matrix": _PATH.c2w[k].tolist()} for k in range(8)]})),
        "transforms.json", lambda folder: _poses(f"{folder / 'transforms.json'}#unit=m"),
    ),
}  # fmt: skip

_TRAPS: dict[str, bytes] = {
    "empty": b"",
    "deep JSON": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "null": b"null",
    "list": b"[1, 2, 3]",
    "long integer": b'{"iteration": ' + b"9" * 10_000 + b"}",
    "alias bomb": b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (k, k, b", ".join([b"*a%d" % (k - 1)] * 9)) for k in range(1, 10)),
    "alias of itself": b"a: &a [*a]\n",
    "control bytes": b"a: \x00\x01\x02\n",
    "tags": b"a: !!timestamp x\nb: !!int y\nc: !!python/object:os.system z\n",
    "half a character": b'{"caption": "\\ud800", "path": "\\ud800"}',
    "not UTF-8": b"\xff\xfe\x00\x00",
    "header of a gigabyte": (1 << 30).to_bytes(8, "little") + b"{}",
}


def damaged_inputs(seed: int, count: int, folder: Path) -> Iterator[Damaged]:
    """``count`` damaged inputs, equal for equal ``seed``, over every reader in turn; ``folder`` is scratch space."""
    rng, sound = np.random.default_rng(seed), dict[str, tuple[Path, Path, Any]]()
    for name in itertools.islice(itertools.cycle(CASES), count):
        case = CASES[name]
        if name not in sound:
            home = folder / name.replace(" ", "_")
            home.mkdir(parents=True)
            case.make(home)
            victim = sorted(home.glob(case.file))[0]
            sound[name] = victim, home, (victim.read_bytes(), case.read(home))
        victim, home, (data, truth) = sound[name]
        description, damaged = _damage(data, rng)
        yield Damaged(name, description, _caller(case, victim, home, data, damaged, truth))


def _caller(case: Case, victim: Path, home: Path, data: bytes, damaged: bytes, truth: Any) -> Callable[[], bool]:
    def call() -> bool:
        victim.write_bytes(damaged)
        try:
            found = case.read(home)
        finally:
            victim.write_bytes(data)
        return not case.told or found == truth

    return call


def _damage(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    kind = rng.choice(["flip", "cut", "double", "splice", "trap", "value"], p=[0.3, 0.15, 0.05, 0.15, 0.1, 0.25])
    if kind == "value" and (found := records.with_another_value(data, rng)) is not None:
        return found
    if kind == "trap":
        name = str(rng.choice(list(_TRAPS)))
        return name, _TRAPS[name]
    if kind == "cut":
        length = int(rng.integers(0, len(data)))
        return f"cut to {length} bytes", data[:length]
    if kind == "double":
        return "written twice", data + data
    if kind == "splice":
        start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 65))
        return f"{length} bytes at {start} are others", data[:start] + rng.bytes(length) + data[start + length :]
    flipped, places = bytearray(data), rng.integers(0, len(data), int(rng.integers(1, 9)))
    for position in places:
        flipped[position] ^= 1 << int(rng.integers(0, 8))
    return f"bits flipped at {sorted(map(int, places))}", bytes(flipped)


def classify(call: Callable[[], bool]) -> tuple[Outcome, str]:
    """What became of one damaged input, and the message of the error.

    ``hang``: beyond 1 GB or ``READ_CPU_S`` of computing, or one that waited for ``PATIENCE_S``.
    """
    began, computed = time.monotonic(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said, outcome = "", None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = "accepted_rightly" if call() else "accepted_wrongly"
    except UserError as error:
        outcome, said = "clear_error", str(error)
    except Exception as error:
        outcome, said = "traceback", f"{type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    slow = time.process_time() - computed > READ_CPU_S or time.monotonic() - began > PATIENCE_S
    return ("hang" if slow or grown > MAX_BYTES else outcome), said


def remove(folder: Path) -> None:
    """Delete the scratch space of :func:`damaged_inputs`."""
    shutil.rmtree(folder, ignore_errors=True)
