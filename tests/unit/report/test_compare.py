"""Runs side by side: paired differences against a truth by hand, and no comparison where there is none."""

from __future__ import annotations

import json
import re
import statistics
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from geoalign.cli.main import main
from geoalign.config.load import load_config, to_yaml
from geoalign.config.schema import Config
from geoalign.errors import UsageError
from geoalign.files.locks import writer_lock
from geoalign.jobs.train_held_out import conditions_of
from geoalign.report.compare import compare_page, write_comparison
from geoalign.report.held_out import conditions
from geoalign.report.run_folder import read_run

METRIC = "translation_error_m"


def make_run(
    folder: Path, errors: list[float], config: str = "", gain: float = 1.2, clips: int = 0, iterations: int = 5
) -> Path:
    """A finished run with these position errors by noise seed."""
    (folder / "eval").mkdir(parents=True)
    seeds = {"mean": {"before": {METRIC: [0.5] * len(errors)}, "after": {METRIC: errors}}}
    means = {"mean": {stage: {METRIC: statistics.fmean(row[METRIC])} for stage, row in seeds["mean"].items()}}
    (folder / "summary.json").write_text(json.dumps({"held_out": means, "held_out_per_noise_seed": seeds}))
    rows = [{"iteration": i, "reward/trans_m": gain / (i + 1), "reward/rot_deg": 1.0} for i in range(iterations)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"run: {{name: {folder.name}}}\n{config}")
    if clips:
        rng = np.random.default_rng(clips)
        c2w = np.tile(np.eye(4), (2, 4, 1, 1))
        video = np.zeros((2, 4, 3, 12, 16), np.uint8)
        for stage in ("before", "after"):
            made = video if stage == "before" else rng.integers(0, 255, video.shape, np.uint8)
            np.savez(
                folder / "eval" / f"{stage}.npz", names=np.array(["a", "b"]), source=video, generated=made,
                target_c2w=c2w, estimated_c2w=c2w,
            )  # fmt: skip
    return folder


def page(*folders: Path) -> str:
    return compare_page([read_run(folder) for folder in folders])


def text(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup))


def test_differences_are_paired_by_noise_seed_and_coloured_beyond_their_own_spread(tmp_path: Path) -> None:
    one, two = [0.20, 0.30, 0.40], [0.18, 0.27, 0.39]
    made = page(make_run(tmp_path / "one", one), make_run(tmp_path / "two", two))
    differences = [b - a for a, b in zip(one, two, strict=True)]
    cell = re.findall(r'<td data-label="two \S one" class="?(\w+)"?>(.*?)</td>', made)
    assert [css for css, _ in cell] == ["good"]  # 0.02 +- 0.01, although the values spread by 0.1
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    assert cell[0][1].startswith(f"&minus;{abs(mean):.4f} ") and f"{spread:.3f}" in cell[0][1]
    assert "two strays least: 0.280 metres, one 0.300" in made
    unclear = page(make_run(tmp_path / "three", one), make_run(tmp_path / "four", [0.30, 0.20, 0.39]))
    assert "No difference beyond the spread" in unclear and 'class="good"' not in unclear


def test_runs_measured_on_other_conditions_are_not_subtracted(tmp_path: Path) -> None:
    first = make_run(tmp_path / "one", [0.2, 0.3], "eval: {seed: 1}\n")
    made = page(first, make_run(tmp_path / "two", [0.1, 0.2], "eval: {seed: 2}\n"))
    assert "measured on different conditions" in made and "no difference is shown" in made
    assert "not measured alike: eval.seed differ" in text(made)
    assert "\N{MINUS SIGN} one" not in made and "noise seed by noise" not in text(made)
    # Settings of what is trained on, and the order of runs, are no condition.
    alike = page(first, make_run(tmp_path / "three", [0.1, 0.2], "eval: {seed: 1}\nworld: {clips: 3}\n"))
    assert "noise seed by noise seed" in text(alike)
    # What samples the held-out retakes is named too; the tail of training does not.
    sampled = [make_run(tmp_path / f"t{steps}", [0.1, 0.2], f"flow: {{steps: {steps}}}\n") for steps in (5, 6)]
    assert "not measured alike: flow.steps differ" in text(page(*sampled))
    tails = [make_run(tmp_path / solver, [0.1, 0.2], f"flow: {{tail_solver: {solver}}}\n") for solver in ("a", "b")]
    assert "noise seed by noise seed" in text(page(*tails))


def test_runs_on_real_clips_are_not_said_to_be_measured(tmp_path: Path) -> None:
    """They have no held-out numbers, so a sampler of their own is a changed setting and nothing else."""
    runs = [make_run(tmp_path / f"r{steps}", [0.1], f"flow: {{steps: {steps}}}\n") for steps in (25, 20)]
    for run in runs:
        (run / "summary.json").write_text("{}")
    assert "<h1>2 runs side by side</h1>" in page(*runs) and "measured" not in text(page(*runs)).partition("footer")[0]


def test_what_changed_on_the_way_is_listed_by_run(tmp_path: Path) -> None:
    """Settings of the last iterations are compared: what they were before is not in them."""
    one, two = (make_run(tmp_path / name, [0.2, 0.3], "optim: {lr: 0.1}\n") for name in ("one", "two"))
    assert "changed on the way" not in text(page(one, two))
    (two / "env.json").write_text(json.dumps({"changed": [{"iteration": 3, "what": "optim.lr 0.2 -> 0.1"}]}))
    settings = text(page(one, two).partition('id="settings"')[2].partition("</section>")[0])
    assert "changed on the way" in settings and "two after 3 iterations: optim.lr 0.2 -&gt; 0.1" in settings
    (two / "env.json").write_text(json.dumps({"changed": [{"iteration": "x"}, 3, {"what": "y"}]}))
    assert "changed on the way" not in text(page(one, two))


def test_without_a_spread_nothing_is_said_of_one(tmp_path: Path) -> None:
    """With one noise seed a difference has no deviation: no verdict, and no words about a +- that is not there."""
    made = page(make_run(tmp_path / "one", [0.2]), make_run(tmp_path / "two", [0.1]))
    assert "<h1>The camera strays 0.100 metres from its path in two, 0.200 in one</h1>" in made
    assert "with one evaluation noise seed" in made and "&plusmn;" not in made and "beyond the spread" not in made
    assert re.findall(r'<td data-label="two \S one" class="?(\w+)"?>(.*?)</td>', made) == [("even", "&minus;0.100")]
    bare = make_run(tmp_path / "three", [0.1, 0.2])
    summary = json.loads((bare / "summary.json").read_text())
    del summary["held_out_per_noise_seed"]
    (bare / "summary.json").write_text(json.dumps(summary))
    made = page(make_run(tmp_path / "four", [0.3, 0.4]), bare)
    assert "<h1>The camera strays 0.150 metres from its path in three, 0.350 in four</h1>" in made
    assert "Not every run kept its values by noise seed" in text(made) and "one evaluation noise seed" not in made


def test_conditions_are_those_by_which_a_run_refuses_to_go_on(tmp_path: Path) -> None:
    for name, overrides in (("tiny_cpu", ()), ("tiny_cpu", ("world.fps=3", "eval.every=2")), ("paper_64xa800", ())):
        config = load_config(Config, name, overrides)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        found = conditions(read_run(tmp_path).config)
        assert found == conditions_of(config) and {"eval.samples", "eval.seed", "eval.noise_seeds"} <= found.keys()
        assert {"flow.steps", "flow.shift"} <= found.keys()  # of the sampler that is measured with, whatever the tail
        assert not {"world.clips", "world.trajectories", "world.seed", "eval.every", "flow.tail_solver"} & found.keys()
        assert found["eval.noise_seeds"] == [11, 12, 13] and found.get("world.fps") == (
            None if config.world is None else config.world.fps
        )


def test_changed_settings_are_those_of_config_diff_without_name_and_folder(tmp_path: Path) -> None:
    made = page(
        make_run(tmp_path / "one", [0.2, 0.3], "optim: {lr: 0.1, wd: 0}\n"),
        make_run(tmp_path / "two", [0.2, 0.3], "optim: {lr: 0.2, wd: 0}\nextra: <b>\n"),
    )
    settings = text(made.partition('id="settings"')[2].partition("</section>")[0])
    assert "optim.lr 0.1 0.2" in settings and "extra (absent) &quot;&lt;b&gt;&quot;" in settings
    assert '<td data-label="seed">-</td>' in made
    assert "optim.wd" not in settings and "run.name" not in settings
    same = page(make_run(tmp_path / "three", [0.1]), make_run(tmp_path / "four", [0.1]))
    assert "All settings are the same" in same


def test_curves_share_one_axis_and_films_one_stage(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"R{i}", [0.2, 0.3], gain=1.0 + i, clips=i) for i in (1, 2, 3)]
    made = page(*runs)
    curves = made.partition('id="curves"')[2].partition("</section>")[0]
    assert curves.count("<svg") == 1  # reward/rot_deg never changed
    assert [curves.count(f'class="bold series-{i}"') for i in (1, 2, 3, 4)] == [1, 1, 1, 0]
    facts = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', made)[0])
    assert [take["label"] for take in facts["takes"]] == ["Source", "Base", "R1", "R2", "R3"]
    assert re.search(r"position error base [\d.]+ m, R1 [\d.]+ m", made)
    assert [path["role"] for path in facts["paths"]] == ["target", "base", "run-1", "run-2", "run-3"]


def film(folder: Path, iteration: int, source: int, retake: int) -> None:
    """A film of a training sample, in grey values."""
    (folder / "films").mkdir(exist_ok=True)
    c2w, shape = np.tile(np.eye(4), (4, 1, 1)), (4, 3, 12, 16)
    np.savez(
        folder / "films" / f"iteration_{iteration:06d}.npz", source=np.full(shape, source, np.uint8),
        retake=np.full(shape, retake, np.uint8), target_c2w=c2w, read_c2w=c2w, intrinsics=np.ones((4, 4)),
        frames=np.arange(1, 5),
    )  # fmt: skip


def test_training_films_of_one_request_lie_over_one_another(tmp_path: Path) -> None:
    """The only films that runs on real clips have."""
    runs = [make_run(tmp_path / name, [0.2]) for name in ("one", "two")]
    for number, folder in enumerate(runs):
        (folder / "summary.json").unlink()
        film(folder, 0, 10, 20 + number)
        film(folder, 8, 11 + number, 30)  # another request
    made = page(*runs).partition('id="training"')[2].partition("</section>")[0]
    (facts,) = map(json.loads, re.findall(r'<script type="application/json">(.*?)</script>', made))
    assert [take["label"] for take in facts["takes"]] == ["Source", "one", "two"] and "Iteration 0" in made
    assert [path["label"] for path in facts["paths"]] == ["path asked for", "camera read of one", "camera read of two"]
    (runs[1] / "films" / "iteration_000000.npz").unlink()
    made = page(*runs).partition('id="training"')[2].partition("</section>")[0]
    assert (
        re.findall(r"<summary>([^<]+)", made) == ["one, iteration 8", "two, iteration 8"] and "share no request" in made
    )
    (runs[1] / "films" / "iteration_000008.npz").unlink()
    assert 'id="training"' not in page(*runs)


def test_a_comparison_of_runs_under_way_is_kept_up_to_date_until_all_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (make_run(tmp_path / name, [0.2]) for name in ("on e", "two"))
    locks = {folder: ExitStack() for folder in (one, two)}
    for folder, lock in locks.items():
        lock.enter_context(writer_lock(folder, "run"))
    seen: list[str] = []

    def wait(seconds: float) -> None:
        seen.append((one / "compare.html").read_text())
        locks[(one, two)[len(seen) - 1]].close()

    monkeypatch.setattr("geoalign.report.page.time.sleep", wait)
    assert main(["report", str(one), str(two), "--follow"]) == 0
    assert len(seen) == 2
    for live in seen:
        assert (
            f"<code>geoalign report &#x27;{one}&#x27; {two} --follow</code> keeps its file up to date until all" in live
        )
        assert "const geoalignRefresh = 20" in live
    after = (one / "compare.html").read_text()
    assert "geoalignRefresh" not in after and "--follow" not in after


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path / "one", [0.2]), make_run(tmp_path / "two", [0.2])
    with pytest.raises(UsageError, match="given twice"):
        write_comparison([one, tmp_path / "two" / ".." / "one"])
    with pytest.raises(UsageError, match="2 to 8"):
        write_comparison([one] * 9)
    assert main(["report", str(one), str(two), "--samples", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(one / "compare.html") and (one / "compare.html").exists()


def test_runs_of_one_name_are_told_apart_by_the_ends_of_their_folders(tmp_path: Path) -> None:
    """``make demo`` in two clones gives two runs named tiny_cpu in folders named tiny_cpu."""
    folders = [tmp_path / name / "runs" / "tiny_cpu" for name in ("one", "two")]
    made = page(*(make_run(folder, [error]) for folder, error in zip(folders, (0.2, 0.3), strict=True)))
    assert "one/runs/tiny_cpu" in made and str(tmp_path) not in text(made.partition('id="settings"')[0])
    other = make_run(tmp_path / "three", [0.3], config="")
    (other / "config.yaml").write_text("run: {name: tiny_cpu}\n")
    shown = text(page(folders[1], other))
    assert "three" in shown and "runs/tiny_cpu" not in shown  # one part tells them apart
