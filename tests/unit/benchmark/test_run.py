"""The loop on a DAVIS-shaped folder: what a kill leaves, what a failing reader costs, what other methods enter as."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmark_cases import MODEL, FakeTool, Told, davis, davis_config, random_policy

from geoalign.benchmark import methods
from geoalign.benchmark import run as module
from geoalign.benchmark.cases import Condition, find_videos, video_of
from geoalign.benchmark.clips import FolderClips, _listed, open_clips
from geoalign.benchmark.forecast import BYTES_PER_PIXEL, forecast
from geoalign.benchmark.methods import MethodArguments, _read_prompts
from geoalign.benchmark.render import as_csv
from geoalign.benchmark.report import worst_cases, write_report
from geoalign.benchmark.run import Plan, Shard, left_over, run
from geoalign.benchmark.store import Store, _settings
from geoalign.benchmark.table import Results, all_tables
from geoalign.config.flow import FlowConfig
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.data.video import read_video
from geoalign.errors import DataError, UsageError
from geoalign.flow.table import build_step_table
from geoalign.perf.cost import TransformerCost

CLIPS = {"bear": 7, "rhino": 5}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a base and a trained policy; ``whole`` is an uninterrupted run with a tool that reads everything."""
    folder = tmp_path_factory.mktemp("benchmark")
    davis(folder / "davis", CLIPS)
    for seed, name in enumerate(("base", "trained")):
        random_policy(folder / name, seed)
    return folder


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> FakeTool:
    fake = FakeTool()
    monkeypatch.setattr(module, "load_tools", lambda settings: [fake])
    return fake


def plan_of(made: Path, *changes: str, videos: tuple[str, ...] = ()) -> Plan:
    models = tuple(f"{name}={made / name}" for name in ("base", "trained"))
    return Plan.build(davis_config(made / "davis", *changes), MethodArguments(models, (), videos))


def told(store: Store) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows without their seconds and places, and all tables as CSV."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "video")} for row in store.rows()]
    return rows, [as_csv(table) for table in all_tables(Results.read(store))]


@pytest.fixture(scope="module")
def whole(made: Path) -> Store:
    store = Store(made / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_tools", lambda settings: [FakeTool()])
        assert run(plan_of(made), store, Shard()) == 8
    return store


def test_a_run_that_was_killed_at_any_case_resumes_to_the_same_tables(
    made: Path, whole: Store, tool: FakeTool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end comes inside the third case, whose retake is written and whose row is not; then two processes go on."""
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Told, "stop", staticmethod(stop))
    store = Store(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(plan_of(made), store, Shard())
    plan = plan_of(made)
    assert left_over(store, plan) == 6 and len(list(store.videos.rglob("*.mp4"))) == 3
    assert run(plan, store, Shard(1, 2)) + run(plan_of(made), store, Shard(0, 2)) == 6
    assert left_over(store, plan) == 0 and run(plan_of(made), store, Shard()) == 0
    assert told(store) == told(whole)
    assert len(tool.asked) == 8  # none twice


def test_a_failing_reader_is_counted_and_named_and_loses_no_case(
    made: Path, whole: Store, tool: FakeTool, tmp_path: Path
) -> None:
    store = Store(tmp_path / "out")
    shutil.copytree(whole.videos, store.videos)
    tool.behaviour = {
        "trained__bear_camera_1": "raises", "trained__bear_camera_5": "hangs", "trained__rhino_camera_1": "half",
        "trained__rhino_camera_5": "identity", "base__rhino_camera_1": "nan",
    }  # fmt: skip
    run(plan_of(made), store, Shard())
    causes = {(r["method"], r["case"]): r["readers"]["vipe"]["cause"] for r in store.rows()}
    assert causes["trained", "bear_camera_1_speed_1"] == "RuntimeError: no camera in sight"
    assert causes["trained", "bear_camera_5_speed_1"] == "timed out after 2 s"
    assert "damaged npz" in causes["trained", "rhino_camera_1_speed_1"]
    assert causes["trained", "rhino_camera_5_speed_1"].startswith("the same pose for every frame")
    assert causes["base", "rhino_camera_1_speed_1"] == "vipe gave no finite sharpness"
    assert [r["readers"]["told"]["status"] for r in store.rows()] == ["ok"] * 8
    tables = {table.name: table for table in all_tables(Results.read(store))}
    failures = {label: [cell.shown for cell in cells] for label, cells in tables["failures"].rows}
    assert failures["vipe: trained"][:2] == ["0", "4"] and failures["vipe: base"][:2] == ["3", "1"]
    assert "1 x timed out after 2 s" in failures["vipe: trained"][3]
    assert dict(tables["table1"].rows)["trained"][-1].shown == "4 of 4"
    assert dict(tables["table1_differences"].rows)["trained"][0].shown.lost == 4
    # Table 2 keeps the clips of which every retake of the base was read.
    assert tables["table2"].notes[0] == (
        "Over 1 of 2 clips: those of which vipe read every retake of base; left out: rhino."
    )
    tool.behaviour = {}
    assert run(plan_of(made), store, Shard()) == 0
    assert run(plan_of(made), store, Shard(), retry_failed=True) == 5
    assert told(store) == told(whole)


def test_rows_tell_what_was_asked_and_what_the_clip_is_like(whole: Store) -> None:
    row = next(r for r in whole.rows() if r["case"] == "bear_camera_5_speed_1")
    assert (row["clip"], row["path"], row["speed"], row["frames"]) == ("bear", "zoom_in", 1.0, 5)
    assert row["facts"]["dynamic_share"] == pytest.approx(0.25, abs=0.02) and row["facts"]["near_share"] is None
    # A dolly of 2 m in 80.5 steps; the published numbers have six digits, of absolute positions.
    assert row["facts"]["translation_m_per_frame"] == pytest.approx(2 / 80.5, rel=2e-4)
    assert row["facts"]["rotation_deg_per_frame"] == 0
    read = row["readers"]["vipe"]
    assert read["metrics"]["translation_error_m"] == pytest.approx(0, abs=1e-9)
    assert read["metrics"]["sharpness"] == 0.5 and len(read["by_frame"]["position_m"]) == 5
    still = next(r for r in whole.rows() if r["case"] == "bear_camera_1_speed_1")
    assert still["readers"]["vipe"]["metrics"]["scale_ratio"] is None
    assert [*json.loads((whole.folder / "benchmark.json").read_text())["methods"]] == ["base", "trained"]


def test_other_methods_enter_as_videos_and_a_missing_one_is_a_counted_failure(
    made: Path, whole: Store, tool: FakeTool, tmp_path: Path
) -> None:
    """Videos that we made ourselves, so that their numbers are known; one clip's are missing, one is cut by the cap."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for file in (whole.videos / "trained").glob("bear*.mp4"):
        shutil.copy(file, videos / file.name.replace("speed_1", "speed_1.0"))
    store = Store(tmp_path / "out")
    config = davis_config(made / "davis", "benchmark.caps={theirs: 3}")
    run(Plan.build(config, MethodArguments(videos=(f"theirs={videos}",))), store, Shard())
    rows = {row["case"]: row for row in store.rows()}
    assert rows["bear_camera_1_speed_1"]["frames"] == 3 and rows["bear_camera_1_speed_1"]["status"] == "ok"
    cut = Store(tmp_path / "out").folder / "cut" / "theirs" / "bear_camera_1_speed_1.mp4"
    assert read_video(cut).shape[0] == 3 and "theirs__bear_camera_1_speed_1" in tool.asked
    assert "no video rhino_camera_1_speed_1.mp4" in rows["rhino_camera_1_speed_1"]["cause"]
    assert dict(all_tables(Results.read(store))[0].rows)["theirs"][-1].shown == "2 of 4"
    run(
        Plan.build(davis_config(made / "davis"), MethodArguments(videos=(f"all={videos}",))),
        Store(tmp_path / "all"),
        Shard(),
    )
    ours = {row["case"]: row["readers"]["told"]["metrics"] for row in whole.rows() if row["method"] == "trained"}
    for row in Store(tmp_path / "all").rows():
        if row["status"] == "ok":
            assert row["readers"]["told"]["metrics"] == ours[row["case"]]


def test_a_benchmark_may_grow_and_may_not_become_another(
    made: Path, whole: Store, tool: FakeTool, tmp_path: Path
) -> None:
    store = Store(tmp_path / "out")
    shutil.copytree(whole.folder, store.folder)
    assert run(plan_of(made, "benchmark.speeds=[1,2]"), store, Shard()) == 8
    assert {row["speed"] for row in store.rows()} == {1.0, 2.0}
    with pytest.raises(UsageError, match=r"other settings: flow\.steps was 4, now 5; choose another --out"):
        run(plan_of(made, "flow.steps=5"), store, Shard())
    with pytest.raises(UsageError, match=r"other caps: trained was None, now 3; choose another --out"):
        run(plan_of(made, "benchmark.caps={trained: 3, later: 3}"), store, Shard())
    with pytest.raises(UsageError, match=r"other methods: base was"):
        run(Plan.build(davis_config(made / "davis"), MethodArguments((f"base={made / 'trained'}",))), store, Shard())
    first, second, *_ = sorted((made / "davis" / "JPEGImages").rglob("bear/*.jpg"))
    held = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UsageError, match=r"other contents: bear was '\w+', now '\w+'; choose another --out"):
        run(plan_of(made), store, Shard())
    second.write_bytes(held)
    tool.content = {"definition": "a"}  # one that was not told before may come
    assert run(plan_of(made, "benchmark.speeds=[1,2]"), store, Shard()) == 0
    tool.content = {"definition": "b"}
    with pytest.raises(UsageError, match=r"other contents: definition of vipe was 'a', now 'b'; choose another --out"):
        run(plan_of(made), store, Shard())
    tool.content = {}
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds other files and no benchmark"):
        run(plan_of(made), Store(other), Shard())
    with pytest.raises(DataError, match="no benchmark there"):
        Store(other).rows()


def test_videos_of_other_methods_may_come_and_not_change(
    made: Path, whole: Store, tool: FakeTool, tmp_path: Path
) -> None:
    videos, store = tmp_path / "videos", Store(tmp_path / "out")
    shutil.copytree(whole.videos / "trained", videos)
    late = videos / "rhino_camera_5_speed_1.mp4"
    late.rename(tmp_path / "late.mp4")
    damaged = videos / "rhino_camera_1_speed_1.mp4"
    whole_video = damaged.read_bytes()
    damaged.write_bytes(whole_video[: len(whole_video) // 2])

    def go(**options: bool) -> dict[str, str]:
        run(
            Plan.build(davis_config(made / "davis"), MethodArguments(videos=(f"x={videos}",))),
            store,
            Shard(),
            **options,
        )
        return {row["case"]: row["status"] for row in store.rows()}

    cases = ["bear_camera_1_speed_1", "bear_camera_5_speed_1", damaged.stem, late.stem]
    assert go() == dict(zip(cases, ("ok", "ok", "failed", "failed"), strict=True))
    (tmp_path / "late.mp4").rename(late)
    assert go()[late.stem] == "failed"
    damaged.write_bytes(whole_video)
    assert set(go(retry_failed=True).values()) == {"ok"}
    assert go() and tool.asked.count(f"x__{late.stem}") == 1
    shutil.copy(late, videos / "bear_camera_1_speed_1.mp4")
    for options in ({}, {"retry_failed": True}):
        with pytest.raises(UsageError, match=r"other contents: video bear_camera_1_speed_1 of x was '\w+', now '\w+'"):
            go(**options)


def test_cameras_weights_and_texts_are_known_by_what_they_hold(made: Path, tmp_path: Path) -> None:
    """Of a camera beside the clip, of an option of an estimator, and of the text of each clip alone."""
    root = davis(tmp_path / "davis", CLIPS)
    config = davis_config(root, f"benchmark.estimators.told.options={{checkpoint: {tmp_path / 'weights'}}}")
    (tmp_path / "weights").write_text("a")
    clips = open_clips(config)
    assert [*clips.contents()] == ["bear", "rhino"]
    plan = Plan(config, clips, {}, [], {"told": Told()})
    before = plan.contents()
    assert [*before] == ["bear", "rhino", "checkpoint of told"]
    (tmp_path / "weights").write_text("b")
    camera = root / "JPEGImages" / "480p" / "bear.npz"
    camera.write_bytes(b"a")
    now = plan.contents()
    assert now["checkpoint of told"] != before["checkpoint of told"] and now["bear"] == before["bear"]
    camera.write_bytes(b"b")
    assert plan.contents()["camera of bear"] != now["camera of bear"]


class Captioned:
    """Clips of which a model asks for captions alone."""

    names, lossless = ("bear", "rhino", "dog"), False

    def caption(self, name: str) -> str:
        return f"the list's {name}"


def test_prompts_may_grow_by_clips_and_may_not_change(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "reads_text_of", lambda files: True)
    file, asked = tmp_path / "prompts.json", [Condition(clip, "pan_right", 1.0) for clip in ("bear", "rhino")]

    def found(
        prompts: dict[str, str], conditions: list[Condition] = asked, *changes: str
    ) -> tuple[Any, dict[str, str]]:
        file.write_text(json.dumps(prompts))
        config = davis_config(made / "davis", f"benchmark.prompts={file}", *changes)
        method = methods.ModelMethod("base", str(made / "base"), None, config, Captioned())  # type: ignore[arg-type]
        return method.identity(), method.contents(conditions)

    identity, texts = found({"bear": "a bear"})
    assert [*texts] == ["text of bear", "text of rhino"]
    assert found({"bear": "a bear", "dog": "a dog"}) == (identity, texts)  # of a clip that is not asked for
    grown = [*asked, Condition("dog", "pan_right", 1.0)]
    more = found({"bear": "a bear", "dog": "a dog"}, grown)
    assert more[0] == identity and more[1].items() > texts.items()
    assert found({"bear": "another"})[1]["text of bear"] != texts["text of bear"]
    assert found({"bear": "a bear", "rhino": "a rhino"})[1]["text of rhino"] != texts["text of rhino"]
    assert found({"bear": "a bear", "rhino": "the list's rhino"})[1] == texts
    assert found({"bear": "a bear"}, asked, "benchmark.negative_prompt=grey")[0] != identity


def test_a_failed_case_is_made_again_when_told(made: Path, whole: Store, tool: FakeTool, tmp_path: Path) -> None:
    """The video is what was wrong: half of it, as a full disk may leave it behind."""
    store = Store(tmp_path / "out")
    shutil.copytree(whole.folder, store.folder)
    name = "bear_camera_1_speed_1"
    video, row = store.videos / "base" / f"{name}.mp4", store.folder / "rows" / "base" / f"{name}.json"
    sound = video.read_bytes()
    video.write_bytes(sound[: len(sound) // 2])
    row.unlink()
    assert run(plan_of(made), store, Shard()) == 1
    assert next(r for r in store.rows() if r["case"] == name and r["method"] == "base")["status"] == "failed"
    assert run(plan_of(made), store, Shard()) == 0
    assert run(plan_of(made), store, Shard(), retry_failed=True) == 1
    assert told(store) == told(whole)


@pytest.mark.parametrize(
    "second", ["bear_camera_1_speed_1.0.mp4", "bear_camera_1_speed_1.mkv", "bear_camera_pan_right_speed_1.mp4"]
)
def test_two_videos_of_one_case_are_refused(second: str, tmp_path: Path) -> None:
    for name in (
        "bear_camera_1_speed_1.mp4",
        "._bear_camera_1_speed_1.0.mp4",
        "bear_camera_1_speed_1.mp4.part",
        second,
    ):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="are of one case; remove one"):
        video_of(find_videos(tmp_path), Condition("bear", "pan_right", 1.0))
    (tmp_path / second).unlink()
    found = find_videos(tmp_path)
    assert video_of(found, Condition("bear", "pan_right", 1.0)) == tmp_path / "bear_camera_1_speed_1.mp4"
    assert video_of(found, Condition("bear", "world/pan_right", 1.0)) is None  # a number means a published preset


def test_a_list_of_clips_ends_its_lines_with_newlines_only(tmp_path: Path) -> None:
    records = {"a_b": None, "c": None}
    (tmp_path / "l.txt").write_text("\ufeffa\u2028b\r\n\n# c\nc  # and why\n", encoding="utf-8", newline="")
    assert _listed(tmp_path / "l.txt", records) == ["a_b", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"bear": {"text": "a bear"}}', "bear has no text"), ('{"bear": " "}', "bear has no text"),
     ('{"bears.mp4": "a bear"}', "a prompt for none of the clips, of which the first is bear"),
     ('{"bear": "one", "bear": "two"}', "'bear' is there twice"), ('{"a b": "x", "a_b": "y"}', "one plain name")],
)  # fmt: skip
def test_prompts_are_of_these_clips(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"bear": "a bear", "black swan": "a swan"}')
    clips = ("bear", "black_swan", "dog")
    assert _read_prompts(tmp_path / "p.json", clips) == {"bear": "a bear", "black_swan": "a swan"}
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(DataError, match=said):
        _read_prompts(tmp_path / "p.json", clips)


def test_the_report_is_one_page_that_needs_no_network(whole: Store, tmp_path: Path) -> None:
    page = write_report(whole, tmp_path / "report.html").read_text()
    rows = whole.rows()
    assert all(f'id="case-{row["case"]}"' in page and f'href="{row["video"]}"' in page for row in rows)
    assert page.count('class="film') >= 4 and "Table 1: consistency" in page and "What failed, and why" in page
    assert not re.search(r'(src|href)="(https?:)?//', page)
    worst = worst_cases(Results.read(whole))
    assert page.index(f'id="film-{worst[0]}"') < page.index(f'id="film-{worst[-1]}"')
    with pytest.raises(UsageError, match="must end in"):
        write_report(whole, tmp_path / "report.pdf")


def test_the_forecast_counts_without_reading_weights(
    made: Path, whole: Store, tool: FakeTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods.ModelMethod, "codec", None)
    plan = Plan.build(davis_config(made / "davis"), MethodArguments((f"base={made / 'base'}",)), readers=False)
    found = forecast(plan, whole)
    assert (found.cases, found.open_cases, found.passes, dict(found.frames)) == (4, 0, 16, {5: 4})
    assert found.tflop > 0 and "passes  16 of the network" in found.text(1)
    assert "4, of which 0 are not done; retakes of our models have 5 frames" in found.text(1)
    # Every clip at its own size: of either two cases of four steps; the adapter runs once in each.
    tall = {"bear": (64, 48), "rhino": (32, 48)}
    monkeypatch.setattr(FolderClips, "size_of", lambda self, clip: tall[clip])
    costs = [TransformerCost.of(MODEL, 5, *size) for size in tall.values()]
    flop = sum(2 * (4 * (c.forward_flops() - c.adapter_flops()) + c.adapter_flops()) for c in costs)
    sized = forecast(plan, whole)
    assert sized.tflop * 1e12 == pytest.approx(flop) and sized.passes == 16
    assert sized.disk_gb * 1e9 / BYTES_PER_PIXEL == pytest.approx(2 * 5 * (64 * 48 + 32 * 48))


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("models", [("base",), ("base", "trained"), ()])
@pytest.mark.parametrize("added", ["", "estimator", "tool"])
def test_a_dry_run_says_how_many_cases_the_run_would_work_on(
    made: Path, whole: Store, tool: FakeTool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    models: tuple[str, ...], others: bool, added: str, retry: bool,
) -> None:  # fmt: skip
    """Counted in the files of the rows: of every method, condition and reader what is not there. One case failed."""
    if not models and not others:
        return
    shutil.copytree(whole.folder / "rows", (store := Store(tmp_path / "out")).folder / "rows")
    failed = store.folder / "rows" / "base" / "bear_camera_1_speed_1.json"
    failed.write_text(json.dumps(json.loads(failed.read_text()) | {"status": "failed", "cause": "full disk"}))
    tools = [tool, *([FakeTool(name="second")] if added == "tool" else [])]
    monkeypatch.setattr(module, "load_tools", lambda settings: tools)
    second = ["benchmark.estimators.second={kind: 'benchmark_cases:Told'}"] if added == "estimator" else []
    videos = (f"theirs={whole.videos / 'trained'}",) if others else ()
    arguments = MethodArguments(tuple(f"{name}={made / name}" for name in models), (), videos)
    config = davis_config(made / "davis", *second)
    dry, real = (Plan.build(config, arguments, readers=readers) for readers in (False, True))
    opened = {"": ["told", "vipe"], "estimator": ["told", "second", "vipe"], "tool": ["told", "vipe", "second"]}[added]
    assert [*dry.readers] == [*real.readers] == ["planar", *opened]  # of the preset
    expected = 4 * others + (4 * len(models) if added else 0)
    if "base" in models:  # what failed has no video that another reader could read, and is done again when told
        expected += retry - 1 if added else retry
    found = forecast(dry, store, retry_failed=retry)
    assert left_over(store, real, retry_failed=retry) == found.open_cases == expected
    assert len(found.text(1).splitlines()) == (4 if models else 1) and "none" not in found.text(1)


@pytest.mark.parametrize("longest", [None, 3, 4, 9])
@pytest.mark.parametrize("cap", [None, 2, 4, 9])
def test_the_longest_retake_holds_for_every_method(
    made: Path, whole: Store, longest: int | None, cap: int | None
) -> None:
    """Clips of 7 and 5 frames, videos of 5; our models take 4 k + 1 frames."""
    changes = [f"benchmark.max_frames={longest or 'null'}"]
    changes += [f"benchmark.caps={{theirs: {cap}, base: {cap}}}"] if cap else []
    arguments = MethodArguments((f"base={made / 'base'}",), (), (f"theirs={whole.videos / 'trained'}",))
    config = davis_config(made / "davis", *changes)
    opened = {method.name: method for method in arguments.opened(config, open_clips(config))}
    condition = Condition("bear", "pan_right", 1.0)
    bound = min(longest or 7, cap or 7, 7)
    assert opened["theirs"].frames(condition, 7) == min(bound, 5)
    assert opened["base"].frames(condition, 7) == (5 if bound >= 5 else 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("benchmark.max_frames=3", "benchmark.max_frames 3: clips of this world have 5 frames"),
        ("benchmark.caps={base: 4}", "benchmark.caps of base 4: clips of this world have 5 frames"),
        ("benchmark.caps={truth: 4}", "benchmark.caps of truth 4: clips"),
        ("benchmark.max_frames=5", ""),
        ("benchmark.caps={another: 3}", ""),
    ],
)
def test_a_length_that_the_world_cannot_have_is_refused_before_anything_is_made(change: str, said: str) -> None:
    config = load_config(Config, "smoke", ["run.device=cpu", change])
    arguments = MethodArguments(("base=builtin:tiny_base",))
    if not said:
        assert [method.name for method in Plan.build(config, arguments, readers=False).methods.values()]
        return
    with pytest.raises(UsageError, match=re.escape(said)):
        Plan.build(config, arguments, readers=False)


OTHER = {
    "steps": 5, "shift": 3.0, "sde": "cps", "eta": 0.3, "eta_by_step": (0.3,), "noise_cap": 0.2, "tail_grid": "sigma",
    "tail_ratio": 0.5, "tail_steps": 2, "tail_solver": "dpm2m", "guidance": 5.0, "t_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FlowConfig.model_fields))
def test_a_setting_of_the_sampler_locks_a_folder_if_it_changes_the_steps(made: Path, name: str) -> None:
    """Without a window: what only stochastic steps or the tail after them read changes nothing."""
    kind = {"sde": "longcat_truncated"} if name == "noise_cap" else {}
    config = davis_config(made / "davis")
    flow = FlowConfig(steps=4, **kind)
    changed = FlowConfig(**{"steps": 4, **kind, name: OTHER[name]})
    same = build_step_table(flow).same_steps(build_step_table(changed))
    told = [_settings(config.model_copy(update={"flow": each})) for each in (flow, changed)]
    assert (told[0] == told[1]) == same


def test_settings_without_effect_lock_no_folder(made: Path, whole: Store, tool: FakeTool, tmp_path: Path) -> None:
    """Of a folder of clips: the tail, the world's seeds. An older folder that names them is taken up."""
    shutil.copytree(whole.folder, (store := Store(tmp_path / "out")).folder)
    file = store.folder / "benchmark.json"
    manifest = json.loads(file.read_text())
    assert {name for name in manifest["settings"] if name.startswith(("flow.", "eval.", "world."))} == {
        "flow.steps", "flow.shift", "flow.t_dtype", "flow.tail_solver",
    }  # fmt: skip
    manifest["settings"] |= {"flow.tail_ratio": 1.0, "eval.seed": 7, "world.world.frames": 9}
    file.write_text(json.dumps(manifest))
    assert run(plan_of(made, "flow.tail_ratio=0.4", "eval.seed=5"), store, Shard()) == 0
    oracle = "benchmark.condition_scales={trained: 0.5}"
    with pytest.raises(UsageError, match=r"other settings: benchmark\.condition_scales"):
        run(plan_of(made, oracle), store, Shard())
    locked = json.loads(file.read_text())
    locked["settings"]["benchmark.condition_scales.trained"] = 0.5
    file.write_text(json.dumps(locked))
    with pytest.raises(UsageError, match=r"other settings: benchmark\.condition_scales"):
        run(plan_of(made), store, Shard())
    published = [_settings(davis_config(made / "davis", "benchmark.settings=published", *more))
                 for more in ((), ("flow.steps=9", "benchmark.seed=3", "run.dtype=bfloat16"))]  # fmt: skip
    assert published[0] == published[1]
    assert published[0] != _settings(davis_config(made / "davis"))
