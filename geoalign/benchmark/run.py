"""Makes and measures the cases of one process, case by case, and takes up what an earlier run left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoalign.benchmark.cases import Case, conditions, shard
from geoalign.benchmark.clips import Clips, Source, near_share, open_clips
from geoalign.benchmark.measure import Reading, failed, read_by_estimator, read_by_tool, read_poses
from geoalign.benchmark.methods import Method, MethodArguments, video_name
from geoalign.benchmark.records import CaseFiles, Tool
from geoalign.benchmark.store import Store
from geoalign.benchmark.tools.load import load_tools
from geoalign.config.load import flatten
from geoalign.config.schema import Config
from geoalign.data.frames import to_float
from geoalign.data.readers import AnyReader
from geoalign.data.video import PyAVReader, write_video
from geoalign.errors import CheckpointError, ConfigError, DataError, UsageError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.files.atomic import nan_to_none
from geoalign.files.digest import by_content
from geoalign.files.locks import writer_lock
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.evaluate import psnr_db
from geoalign.jobs.sample import with_estimated_camera
from geoalign.policy.published import CRF
from geoalign.rewards.registry import build_evaluator
from geoalign.training.processes.device import device_of
from geoalign.types import RetakeBatch, SourceClip

Tick = Callable[[Case, int], object]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which process of how many this is, as torchrun says it."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def of_environment() -> Shard:
        """This process; the processes need not reach each other, only the folder."""
        return Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything that a run works on, opened and checked before its first case."""

    config: Config
    clips: Clips
    methods: Mapping[str, Method]
    cases: Sequence[Case]
    estimators: Mapping[str, PoseEvaluator] = field(default_factory=dict)
    tools: Mapping[str, Tool] = field(default_factory=dict)

    @staticmethod
    def build(config: Config, arguments: MethodArguments, *, readers: bool = True) -> Plan:
        """Open clips, methods, definitions of tools and, unless ``readers`` is False, the estimators.

        Raises UserError naming what cannot be opened; nothing has been written.
        """
        if (device := device_of(config.run)).type == "cuda":
            torch.cuda.set_device(device)  # estimators on "auto" take the current one
        clips = open_clips(config)
        methods = arguments.opened(config, clips)
        settings = config.benchmark
        asked = conditions({name: clips.paths_of(name) for name in clips.names}, settings.speeds)
        cases = [Case(method.name, condition) for method in methods for condition in asked]
        tools = {tool.name: tool for tool in load_tools(settings)}
        plan = Plan(config, clips, {method.name: method for method in methods}, cases, tools=tools)
        if not plan.readers:
            raise ConfigError("benchmark.estimators and benchmark.tools are empty: nothing would be measured")
        if settings.source_reader is not None and settings.source_reader not in plan.readers:
            raise ConfigError(
                f"benchmark.source_reader {settings.source_reader}: no such estimator or tool; there are "
                f"{', '.join(plan.readers)}"
            )
        if not readers:
            return plan
        opened = {name: build_evaluator(e.kind, **e.options) for name, e in settings.estimators.items()}
        return replace(plan, estimators=opened)

    @property
    def readers(self) -> dict[str, dict[str, Any]]:
        """All that measures by name, opened or not, in the order of the tables: what each is, in the manifest."""
        settings = self.config.benchmark.estimators
        told = {name: {"cameras": True, "metrics": [], "licence": "", **settings[name].model_dump(mode="json")}
                for name in settings}  # fmt: skip
        return told | {
            name: {"cameras": tool.gives_poses, "metrics": list(tool.metrics), "licence": tool.licence}
            for name, tool in self.tools.items()
        }

    def contents(self) -> dict[str, str]:
        """What lies in the files that decide on retakes and numbers, by name; names may come, none may change."""
        found = dict(self.clips.contents())
        for name, method in self.methods.items():
            found |= method.contents([case.condition for case in self.cases if case.method == name])
        for name in self.estimators:
            options = flatten(self.config.benchmark.estimators[name].options)
            held = by_content(options)
            found |= {f"{option} of {name}": held[option] for option in options if held[option] != options[option]}
        for name, tool in self.tools.items():
            found |= {f"{part} of {name}": content for part, content in tool.contents().items()}
        return found


def run(
    plan: Plan, store: Store, at: Shard, *, retry_failed: bool = False, tick: Tick = lambda case, left: None
) -> int:
    """Work on the cases of this process that are not done; returns how many there were.

    Args:
        plan: the whole benchmark.
        store: its folder.
        at: this process among all.
        retry_failed: measure again, and make again, what failed in an earlier run.
        tick: told after every case how many are left.

    Raises:
        UsageError: the folder holds another benchmark, another process works on this share, or a method cannot answer
            any case (a model that lacks what every clip would have to have).
    """
    store.folder.mkdir(parents=True, exist_ok=True)
    with writer_lock(store.folder / "locks", "share of a benchmark", f"{at.rank:04d}.lock"):
        identities = {name: method.identity() for name, method in plan.methods.items()}
        names = list(dict.fromkeys(case.condition.name for case in plan.cases))
        # Where a video of another method was what failed, another may be in its place now.
        failed_before = (case for case in plan.cases if retry_failed and _failed(store.row(case)))
        renewed = {video_name(case.method, case.condition) for case in failed_before}
        store.open(plan.config, identities, plan.contents(), names, plan.readers, renewed)
        worker = _Worker(plan, store, retry_failed)
        todo = [case for case in shard(plan.cases, at.rank, at.size) if worker.is_open(case)]
        try:
            for number, case in enumerate(todo, 1):
                store.write_row(case, worker.row(case))
                tick(case, len(todo) - number)
                if number == len(todo) or todo[number].method != case.method:
                    plan.methods[case.method].close()
        finally:
            for tool in plan.tools.values():
                tool.close()
    return len(todo)


class _Worker:
    """Does one case after the other; the source of the last one is kept."""

    def __init__(self, plan: Plan, store: Store, retry_failed: bool) -> None:
        self._plan, self._store, self._retry = plan, store, retry_failed
        self._reader = AnyReader(PyAVReader())
        self._source = lru_cache(maxsize=1)(self._read_source)
        self._of_source = lru_cache(maxsize=1)(self._source_facts)

    def is_open(self, case: Case) -> bool:
        """Whether anything of a case is to be done."""
        row = self._store.row(case)
        if row is None or (self._retry and _failed(row)):
            return True
        return row["status"] == "ok" and any(self._wants(row, name) for name in self._plan.readers)

    def _wants(self, row: Mapping[str, Any], reader: str) -> bool:
        found = row["readers"].get(reader)
        return found is None or (self._retry and found["status"] == "failed")

    def row(self, case: Case) -> dict[str, Any]:
        """The row of a case, done; what goes wrong with it is told in the row."""
        condition = case.condition
        row: dict[str, Any] = {
            "method": case.method, "case": condition.name, "clip": condition.clip, "path": condition.path_name,
            "speed": condition.speed, "status": "ok", "cause": "", "readers": {},
        }  # fmt: skip
        before = self._store.row(case)
        if before is not None and before["status"] == "ok":
            row["readers"] = dict(before["readers"])
        begun = time.monotonic()
        try:
            self._measure(case, row)
        except (UsageError, CheckpointError):  # of the method, not of the case: every other case would fail alike
            raise
        except Exception as error:
            found = failed(error)
            row |= {"status": "failed", "cause": found.cause}
        return nan_to_none(row | {"seconds": round(time.monotonic() - begun, 3)})

    def _measure(self, case: Case, row: dict[str, Any]) -> None:
        plan, condition = self._plan, case.condition
        method = plan.methods[case.method]
        frames = method.frames(condition, plan.clips.native_frames(condition.clip))
        source = self._source(condition.clip, frames)
        target = plan.clips.target(condition, source.clip)
        path = self._retake(case, method, source, target)
        video = self._pixels(path, frames, source.clip)
        self._target_file(case, source, target)
        shown = self._source_file(condition.clip, source)
        row |= {"frames": frames, "video": self._store.told(path), "source": self._store.told(shown)}
        row["camera_of_source"] = source.told
        row["facts"] = _facts(target) | self._of_source(condition.clip, frames)
        truth = plan.clips.truth(condition, target)
        row["metrics"] = {} if truth is None else {"psnr_db": float(psnr_db(video[:, 1:], truth[:, 1:]))}
        for name in (name for name in plan.readers if self._wants(row, name)):
            row["readers"][name] = self._reading(name, case, path, video, source, target).as_json()

    def _source_facts(self, clip: str, frames: int) -> dict[str, float | None]:
        """What the slices go by that all cases of a clip share."""
        source = self._source(clip, frames).clip
        depth = next((find for e in self._plan.estimators.values() if (find := getattr(e, "depth", None))), None)
        return {
            "dynamic_share": self._plan.clips.dynamic_share(clip, frames), "near_share": near_share(source, depth),
        }  # fmt: skip

    def _retake(self, case: Case, method: Method, source: Source, target: CameraTrajectory) -> Path:
        out, before = case.file(self._store.videos, ".mp4"), self._store.row(case)
        again = self._retry and _failed(before)  # the file may be what is wrong
        return out if out.is_file() and not again else method.video(case.condition, source, target, out)

    def _pixels(self, path: Path, frames: int, source: SourceClip) -> Tensor:
        """A retake as everybody else sees it: from its file, at the size of the source."""
        size = tuple(source.video.shape[-2:])
        return to_float(self._reader.read(path, range(frames), (size[0], size[1])))[None]

    def _reading(
        self, name: str, case: Case, path: Path, video: Tensor, source: Source, target: CameraTrajectory
    ) -> Reading:
        plan = self._plan
        if name in plan.estimators:
            return read_by_estimator(plan.estimators[name], video, source.clip, target[0])
        files = self._files(case, path, video, source, target)
        return read_by_tool(plan.tools[name], files, case.file(self._store.folder / "tools" / name, ""), target[0])

    def _files(self, case: Case, path: Path, video: Tensor, source: Source, target: CameraTrajectory) -> CaseFiles:
        wanted, shown = self._target_file(case, source, target), self._source_file(case.condition.clip, source)
        return CaseFiles(case.name, shown, self._cut(case, path, video, source.fps), wanted, target.num_frames)

    def _cut(self, case: Case, path: Path, video: Tensor, fps: float) -> Path:
        """The file of a retake, cut to the frames and the size that are measured where it has others."""
        info = self._reader.probe(path)
        if (info.frames, info.height, info.width) == (video.shape[1], *video.shape[-2:]):
            return path
        out = case.file(self._store.folder / "cut", ".mp4")
        if not out.is_file():
            write_video(out, video[0], fps, crf=CRF)
        return out

    def _target_file(self, case: Case, source: Source, target: CameraTrajectory) -> Path:
        out = self._store.target_file(case.condition.name, target.num_frames)
        height, width = source.clip.video.shape[-2:]
        if not out.is_file():
            write_clip_camera(out, target[0], (height, width))
        return out

    def _source_file(self, clip: str, source: Source) -> Path:
        """The source as a video of the retake's size and length, as the published script writes it for ViPE."""
        out = self._store.sources / f"{clip}_{source.clip.video.shape[1]}.mp4"
        if not out.is_file():
            write_video(out, source.clip.video[0], source.fps, crf=CRF, lossless=self._plan.clips.lossless)
        return out

    def _read_source(self, clip: str, frames: int) -> Source:
        source, name = self._plan.clips.source(clip, frames), self._plan.config.benchmark.source_reader
        if name is None:
            return source
        if name in self._plan.estimators:
            batch = RetakeBatch(source.clip, source.clip.camera, ("",))
            batch, _ = with_estimated_camera(batch, self._plan.estimators[name])
            return replace(source, clip=batch.source, told=name)
        camera = self._camera_by_tool(self._plan.tools[name], clip, source)
        return replace(source, clip=replace(source.clip, camera=camera), told=name)

    def _camera_by_tool(self, tool: Tool, clip: str, source: Source) -> CameraTrajectory:
        file, given = self._source_file(clip, source), source.clip.camera
        target = self._store.target_file(f"source_{clip}", given.num_frames)
        height, width = source.clip.video.shape[-2:]
        write_clip_camera(target, given[0], (height, width))
        files = CaseFiles(f"source__{clip}_{given.num_frames}", file, file, target, given.num_frames)
        found = tool.measure(files, self._store.folder / "tools" / tool.name / "source" / f"{clip}_{given.num_frames}")
        if found.status != "ok" or found.poses is None:
            raise DataError(f"{tool.name} read no camera of the source ({found.cause or 'no poses'})")
        c2w, lens = read_poses(found.poses, given.num_frames)
        path = CameraTrajectory.build(c2w.to(given.c2w), given.intrinsics[0] if lens is None else lens.to(given.c2w))
        return CameraTrajectory.stack([path.relative_to_first()])


def _failed(row: Mapping[str, Any] | None) -> bool:
    return row is not None and row["status"] == "failed"


def _facts(target: CameraTrajectory) -> dict[str, float | None]:
    """How fast the wanted camera moves, per frame: what the slices of A.1 go by."""
    rotvec, step = target.increments()
    turn, move = torch.rad2deg(rotvec.norm(dim=-1)).mean(), step.norm(dim=-1).mean()
    # Rounded, so that a path that does not turn is one: the logarithm of a rotation leaves 1e-7.
    return {"rotation_deg_per_frame": round(float(turn), 5), "translation_m_per_frame": round(float(move), 6)}


def left_over(store: Store, plan: Plan, *, retry_failed: bool = False) -> int:
    """How many cases are not done yet, by any process; where told, those that failed are not done either."""
    worker = _Worker(plan, store, retry_failed)
    return sum(map(worker.is_open, plan.cases))
