"""Conditions are pure functions of (seed, iteration, group); the cache returns what was encoded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geoalign.config.data import DataConfig
from geoalign.data.cache import CacheFolder, open_cache, pad_tokens, trim_tokens
from geoalign.data.prepare import chosen_starts, data_settings, owner, prepare
from geoalign.data.source import RetakeDataset
from geoalign.data.video import write_video
from geoalign.errors import DataError, UsageError
from geoalign.files.locks import writer_lock
from geoalign.types import RetakeBatch


class Encoder:
    """Stands in for codec and text encoder: cheap, deterministic."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.identity: Mapping[str, str] = {"codec": "mean"}
        self.calls, self.fail_after = 0, fail_after

    def encode(self, frames: Tensor, prompt: str) -> Mapping[str, Tensor]:
        if self.fail_after is not None and self.calls >= self.fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        context = torch.zeros(16, 4)
        context[: len(prompt.split())] = 1.5
        return {"latents": frames.mean((-1, -2)), "context": context}

    def caption(self, frames: Tensor) -> str | None:
        return None

    def estimate_camera(self, frames: Tensor) -> None:
        return None


def same(a: RetakeBatch, b: RetakeBatch) -> bool:
    return (
        torch.equal(a.source.video, b.source.video)
        and torch.equal(a.target_camera.c2w, b.target_camera.c2w)
        and torch.equal(a.source.camera.c2w, b.source.camera.c2w)
        and a.prompts == b.prompts
        and a.source.clip_ids == b.source.clip_ids
    )


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_any_rank_layout_and_order_gives_the_same_conditions(world: DataConfig, ranks: int) -> None:
    whole = RetakeDataset(world, seed=5).batch(3, range(16))
    for rank in range(ranks):
        groups = list(range(rank, 16, ranks))
        dataset = RetakeDataset(world, seed=5)
        dataset.batch(9, [4, 1])  # drawing something else first changes nothing
        dataset.prefetch(3, groups)
        assert same(dataset.batch(3, groups), whole.select(groups))
    assert not same(RetakeDataset(world, seed=6).batch(3, range(16)), whole)
    assert len(set(whole.source.clip_ids)) > 6


def test_batches_have_the_promised_conventions(world: DataConfig) -> None:
    dataset = RetakeDataset(world, seed=0)
    batch = dataset.batch(0, range(4))
    assert batch.source.video.shape == (4, 5, 3, 48, 64) and batch.source.video.abs().max() <= 1
    identity = torch.eye(4).expand(4, 4, 4)
    assert torch.equal(batch.target_camera.c2w[:, 0], identity) and torch.equal(batch.source.camera.c2w[:, 0], identity)
    torch.testing.assert_close(batch.target_camera.intrinsics, batch.source.camera.intrinsics)
    # The grey level of frame k of the file is 4 k: the pixels belong to the window that the name tells.
    starts = [int(name.split("@")[1]) for name in batch.source.clip_ids]
    levels = ((batch.source.video.mean((2, 3, 4)) + 1) * 127.5 / 4).round().long()
    assert levels.tolist() == [list(range(start, start + 5)) for start in starts]
    telemetry = dataset.telemetry()
    assert telemetry["data/decoded_windows"] <= 4 and telemetry["data/wait_s"] > 0
    assert dataset.fingerprint() == RetakeDataset(world, seed=1).fingerprint()


def test_damaged_clips_are_drawn_again_and_a_run_stops_above_the_limit(world: DataConfig) -> None:
    files = sorted((world.root / "clips").rglob("*.mp4"))
    files[0].write_bytes(files[0].read_bytes()[:700])
    dataset = RetakeDataset(world, seed=0, split="all")
    batches = [dataset.batch(iteration, range(8)) for iteration in range(6)]
    assert not any(files[0].stem in name for batch in batches for name in batch.source.clip_ids)
    assert list(dataset.clip_tally.rejected) == [files[0].stem] and dataset.telemetry()["data/bad_clips"] == 1
    assert same(RetakeDataset(world, seed=0, split="all").batch(5, range(8)), batches[5])
    for file in files[1:6]:
        file.write_bytes(b"")
    with pytest.raises(DataError, match="more than the allowed fraction"):
        fresh = RetakeDataset(world, seed=0, split="all")
        for iteration in range(6):
            fresh.batch(iteration, range(8))


def test_prepare_is_idempotent_resumable_and_shared_between_ranks(world: DataConfig) -> None:
    interrupted = Encoder(fail_after=5)
    with pytest.raises(KeyboardInterrupt):
        prepare(world, interrupted)
    encoder = Encoder()
    reports = [prepare(world, encoder, rank=rank, world_size=3) for rank in range(3)]
    assert [sum(r.encoded for r in reports), sum(r.reused for r in reports)] == [7, 5] and encoder.calls == 7
    again = prepare(world, encoder)
    assert (again.encoded, again.reused, encoder.calls) == (0, 12, 7)
    folder = open_cache(world.cache, data_settings(world))
    entries = folder.entries()
    assert len(entries) == 12 and not folder.parts() and not list(folder.verify())
    assert not [path for path in world.cache.rglob("*") if ".tmp" in path.name]


def test_cached_conditions_equal_direct_ones(world: DataConfig) -> None:
    config = world.model_copy(update={"prepare": world.prepare.model_copy(update={"windows_per_clip": 5})})
    prepare(config, Encoder())
    cached = RetakeDataset(config.model_copy(update={"use_cache": True}), seed=2)
    batch = cached.batch(0, range(6))
    direct = RetakeDataset(config, seed=2)
    records = {record.clip_id: record for record in direct.clips}
    for row, name in enumerate(batch.source.clip_ids):
        clip, start = name.split("@")
        window = direct.loader.load(records[clip], int(start))
        stored = cached.prepared([name])[0]
        torch.testing.assert_close(batch.source.camera.c2w[row], window.camera.c2w.float(), atol=0, rtol=0)
        assert batch.source.ground_plane is not None and window.ground_plane is not None
        torch.testing.assert_close(batch.source.ground_plane[row], window.ground_plane.float(), atol=0, rtol=0)
        assert stored["latents"].dtype == torch.bfloat16 and stored["context"].shape == (2, 4)
        video = batch.source.video[row].mean((-1, -2)).bfloat16()
        assert torch.equal(stored["latents"], video) and batch.prompts[row] == records[clip].caption
    assert direct.prepared(batch.source.clip_ids) == [{}] * 6


def test_stale_and_damaged_caches_are_noticed(world: DataConfig) -> None:
    prepare(world, Encoder())
    with pytest.raises(DataError, match="differs in stride"):
        other = world.model_copy(update={"clips": world.clips.model_copy(update={"stride": 2}), "use_cache": True})
        RetakeDataset(other, seed=0)
    folder: CacheFolder = open_cache(world.cache, data_settings(world))
    clip = sorted((world.root / "clips").rglob("*.mp4"))
    write_video(clip[3], torch.full((9, 48, 64, 3), 9, dtype=torch.uint8), 12)  # other content, same name
    cached = RetakeDataset(world.model_copy(update={"use_cache": True}), seed=0, split="all")
    assert len(cached._entries) == 11
    rebuilt = prepare(world, Encoder())
    assert (rebuilt.encoded, rebuilt.reused) == (1, 11)
    shard = next(folder.path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert [defect for _, defect in folder.verify()] == ["bytes differ from the manifest"]
    manifest = next(folder.path.glob("*.jsonl"))
    manifest.write_text(manifest.read_text() + "{torn line\n" + json.dumps({"key": 1}) + "\n")
    with pytest.raises(DataError, match=r"damaged manifest \(line \d+: .*\); run `geoalign prepare` again"):
        folder.entries()
    again = prepare(world, Encoder())
    assert again.encoded >= 1 and again.encoded + again.reused == 12
    assert len(RetakeDataset(world.model_copy(update={"use_cache": True}), seed=0, split="all")._entries) == 12


def test_what_a_kill_left_in_the_cache_is_no_window(world: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it wrote a part, and between a shard and its manifest: the next run encodes one and packs again."""
    with pytest.raises(KeyboardInterrupt):
        prepare(world, Encoder(fail_after=5))
    folder: CacheFolder = open_cache(world.cache, data_settings(world))
    parts = sorted((folder.path / "parts").glob("*.safetensors"))
    (temporary := folder.path / "parts" / ".geoalign-host-1-0.tmp").mkdir()
    (temporary / "new.tmp").write_bytes(parts[0].read_bytes())
    older = parts[0].with_name(f".{parts[0].stem}.x7.tmp.safetensors")  # as earlier versions named it
    older.write_bytes(parts[0].read_bytes())
    assert len(folder.entries()) == 5
    with monkeypatch.context() as patch:
        patch.setattr("geoalign.data.cache.atomic_write_text", kill)
        with pytest.raises(KeyboardInterrupt):
            prepare(world, Encoder())
    assert list(folder.path.glob("shard-*.safetensors")) and len(folder.entries()) == 12
    again = prepare(world, Encoder())
    assert (again.encoded, again.reused) == (0, 12)
    assert len(folder.entries()) == 12 and not folder.parts() and not list(folder.verify())
    shards = {path.stem for path in folder.path.glob("shard-*.safetensors")}
    assert shards == {path.stem for path in folder.path.glob("shard-*.jsonl")}


def kill(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("lost", ["manifest", "line of a manifest", "shard", "name of a part"])
def test_windows_that_were_lost_are_an_error_and_encoded_again(lost: str, world: DataConfig) -> None:
    prepare(world, Encoder())
    folder: CacheFolder = open_cache(world.cache, data_settings(world))
    manifest = next(folder.path.glob("*.jsonl"))
    windows = len(manifest.read_text().splitlines())
    if lost == "manifest":
        manifest.unlink()
    elif lost == "line of a manifest":
        manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1:]))
    elif lost == "shard":
        manifest.with_suffix(".safetensors").unlink()
    else:
        windows = 0
        entry = next(iter(folder.entries().values()))
        folder.add(entry, folder.read(entry))
        part = next((folder.path / "parts").iterdir())
        part.rename(part.with_name("another.safetensors"))
    with pytest.raises(DataError, match="run `geoalign prepare` again"):
        RetakeDataset(world.model_copy(update={"use_cache": True}), seed=0, split="all")
    again = prepare(world, Encoder())
    assert (again.encoded, again.reused) == (windows, 12 - windows)
    assert len(folder.entries()) == 12 and not list(folder.verify()) and list(folder.path.rglob("*.damaged"))


@pytest.mark.parametrize("name", [".lock-0-of-1", ".lock-1-of-2"])
def test_a_second_process_does_not_prepare_the_same_windows(name: str, world: DataConfig) -> None:
    prepare(world, Encoder())
    folder: CacheFolder = open_cache(world.cache, data_settings(world))
    with (
        writer_lock(folder.path, "cache", name),
        pytest.raises(UsageError, match="another process writes this cache"),
    ):
        prepare(world, Encoder())
    assert prepare(world, Encoder()).reused == 12


def changed(config: DataConfig, **sections: Mapping[str, object]) -> DataConfig:
    """``config`` with fields of its ``clips`` or ``prepare`` replaced, reading the cache."""
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=updates | {"use_cache": True})


def test_only_windows_that_the_settings_choose_are_trained_on(world: DataConfig) -> None:
    """Clips of 9 frames have windows of 5 at 0 to 4."""
    prepare(changed(world, prepare={"windows_per_clip": 5}), Encoder())

    def used(config: DataConfig) -> set[int]:
        return {entry.start for entry in RetakeDataset(config, seed=0, split="all")._entries}

    assert used(changed(world, prepare={"windows_per_clip": 5})) == {0, 1, 2, 3, 4}
    assert used(changed(world, prepare={"windows_per_clip": 3})) == {0, 2, 4}
    table = world.root / "clips" / "metadata.csv"
    rows = table.read_text().splitlines()
    name, *others = ["end_frame", *["6"] * 11, "4"]  # windows at 0 and 1; none in the last clip
    table.write_text("\n".join(f"{row},{end}" for row, end in zip(rows, [name, *others], strict=True)))
    narrow = RetakeDataset(changed(world, prepare={"windows_per_clip": 5}), seed=0, split="all")
    assert [entry.start for entry in narrow._entries] == [0, 1] * 11
    assert narrow.clip_tally.remarks["prepared window that the settings no longer choose, not used"] == 5 + 11 * 3


def test_overwritten_images_make_a_folder_stale(world: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwriting a file changes neither size nor time of its folder."""
    import cv2
    import numpy as np

    folder = world.root / "frames" / "one"
    folder.mkdir(parents=True)
    for index in range(9):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((48, 64, 3), 50, np.uint8))
    config = changed(world, clips={"path": Path("frames"), "camera": "none", "val_fraction": 0.0})
    assert prepare(config, Encoder()).encoded == 1
    assert len(RetakeDataset(config, seed=0)._entries) == 1
    before = folder.stat().st_mtime_ns
    cv2.imwrite(str(folder / "3.png"), np.full((48, 64, 3), 200, np.uint8))
    assert folder.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="no prepared window"):
        RetakeDataset(config, seed=0)
    assert prepare(config, Encoder()).encoded == 1
    monkeypatch.setattr("geoalign.data.cache.content_hash", None)  # nothing is read again
    assert prepare(config, Encoder()).reused == 1


def test_each_clip_is_read_by_one_rank_and_once(world: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from geoalign.data import cache

    hashed = []

    def count(path: Path) -> str:
        hashed.append(path)
        return hash_of(path)

    hash_of = cache.content_hash
    monkeypatch.setattr(cache, "content_hash", count)
    for expected in (12, 0):
        hashed.clear()
        for rank in range(3):
            prepare(world, Encoder(), rank=rank, world_size=3)
        assert len([path for path in hashed if path.suffix == ".mp4"]) == expected


def test_a_rank_stops_when_too_many_of_its_own_clips_are_bad(world: DataConfig) -> None:
    """All clips of one rank are damaged, which are fewer than half of all clips."""
    config = changed(world, clips={"max_bad_fraction": 0.5})
    ranks: dict[int, list[Path]] = {}
    for file in sorted((world.root / "clips").rglob("*.mp4")):
        ranks.setdefault(owner(file.stem, 3), []).append(file)
    bad, mine = min(ranks.items(), key=lambda item: len(item[1]))
    assert len(mine) < 6 < sum(map(len, ranks.values()))
    for file in mine:
        file.write_bytes(b"")
    for rank in ranks.keys() - {bad}:
        assert prepare(config, Encoder(), rank=rank, world_size=3).encoded == len(ranks[rank])
    with pytest.raises(DataError, match=rf"of {len(mine)} clips cannot be used"):
        prepare(config, Encoder(), rank=bad, world_size=3)
    with pytest.raises(DataError, match="nothing could be prepared"):
        prepare(changed(world, clips={"max_bad_fraction": 1.0}), Encoder(), rank=bad, world_size=3)


def test_packing_leaves_the_folder_that_other_ranks_write_into(world: DataConfig) -> None:
    prepare(world, Encoder())
    folder = open_cache(world.cache, data_settings(world))
    assert not folder.parts() and (folder.path / "parts").is_dir()


def test_clips_that_break_while_training_from_a_cache_are_drawn_again(world: DataConfig) -> None:
    prepare(world, Encoder())
    dataset = RetakeDataset(changed(world), seed=0, split="all")
    broken = sorted((world.root / "clips").rglob("*.mp4"))[2]
    broken.write_bytes(b"")
    names = {name for iteration in range(6) for name in dataset.batch(iteration, range(8)).source.clip_ids}
    assert len(names) == 11 and list(dataset.clip_tally.rejected) == [broken.stem]
    assert dataset.cache is not None
    for shard in dataset.cache.path.glob("*.safetensors"):
        shard.write_bytes(b"")
    with pytest.raises(DataError, match="damaged shard"):  # no fault of a clip
        dataset.batch(9, range(8))


def test_small_helpers() -> None:
    context = torch.zeros(6, 3)
    context[1] = 2.0
    assert trim_tokens(context).shape == (2, 3) and torch.equal(pad_tokens(trim_tokens(context), 6), context)
    assert trim_tokens(torch.zeros(6, 3)).shape == (1, 3)
    assert chosen_starts(range(10, 20), 1) == [14] and chosen_starts(range(10, 20), 3) == [10, 14, 19]
    assert chosen_starts(range(2), 5) == [0, 1]


def test_missing_cameras_are_named(world: DataConfig) -> None:
    for file in (world.root / "clips").rglob("*.npz"):
        file.unlink()
    with pytest.raises(DataError, match="no metric camera file"):
        RetakeDataset(world, seed=0).batch(0, [0])
    static = world.model_copy(update={"clips": world.clips.model_copy(update={"camera": "none"})})
    batch = RetakeDataset(static, seed=0).batch(0, [0])
    assert torch.equal(batch.source.camera.c2w[0], torch.eye(4).expand(5, 4, 4))
    assert Path(world.root).is_dir()
