"""The report of a small made-up run: complete, self-contained, honest about changes, clear about damaged files."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import time
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import numpy as np
import pytest
import yaml
from report_runs import summary

from geoalign.cli.main import main
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.errors import DataError, UsageError
from geoalign.files.locks import writer_lock
from geoalign.report.held_out import comparisons
from geoalign.report.page import report_page, write_report
from geoalign.report.run_folder import read_run
from geoalign.report.samples import choose_samples
from geoalign.report.state import seconds_per_iteration
from geoalign.report.svg import number, smooth, ticks
from geoalign.report.words import CURVES


class Checker(HTMLParser):
    """Collects tags that are not closed and every reference that would leave the file."""

    VOID = frozenset(("meta", "img", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.images += tag == "img"
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith(("data:", "#")):
                self.outside.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_the_page_is_well_formed_complete_and_needs_no_network(folder: Path) -> None:
    page = report_page(read_run(folder), samples=3)
    checker = Checker()
    checker.feed(page)
    assert not checker.open and not checker.outside
    assert checker.images == 3 * 4  # source, before, after, truth: one sheet each
    assert "http:" not in page and "https:" not in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    for section in ("what", "results", "samples", "troubles", "curves", "time", "how"):
        assert f'id="{section}"' in page
    assert "strays 50&thinsp;% less" in page
    assert "best of 5" in page and "worst of 5" in page and "&lt;arc" in page
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()


def test_changes_are_coloured_only_beyond_the_spread() -> None:
    found = {item.key: item for item in comparisons(summary(), "mean")}
    assert found["translation_error_m"].verdict == "good"
    assert found["translation_error_m"].percent == pytest.approx(-50)
    assert found["rotation_error_deg"].verdict == "even"  # +0.05 with a spread of 0.1
    assert found["translation_gain"].verdict == "good"  # 0.4 off to 0.02 off, although it went below 1
    assert found["psnr_db"].verdict == "bad"
    assert found["new_measure"].verdict == "even"  # unknown direction: shown, not judged
    assert found["rotation_error_deg"].before.spread == pytest.approx(0.1)


def test_what_is_travelled_is_said_along_each_axis_where_it_is_known(folder: Path) -> None:
    """An overdone axis and one that falls short would cancel in one number."""
    known = json.loads(json.dumps(summary()))
    for kinds, wrap in ((known["held_out"], float), (known["held_out_per_noise_seed"], lambda value: [value] * 3)):
        for stages in kinds.values():
            for name, then, now in (("sideways", 0.5, 0.9), ("forward", 1.5, 1.1), ("vertical", 0.6, 0.7)):
                stages["before"][f"gain_{name}"], stages["after"][f"gain_{name}"] = wrap(then), wrap(now)
    (folder / "summary.json").write_text(json.dumps(known))
    page = report_page(read_run(folder), samples=0)
    ways = "0.900 metres to the sides (0.500 before), 1.10 metres forward (1.50 before) and 0.700 metres up and down"
    assert f"travels {ways} (0.600 before)" in page and "instead of 1.40" not in page


def test_a_run_of_before_shows_its_gain_under_the_present_name(folder: Path) -> None:
    old = json.loads(json.dumps(summary()))
    for kinds in (old["held_out"], old["held_out_per_noise_seed"]):
        for stages in kinds.values():
            for rows in stages.values():
                rows["scale_ratio"] = rows.pop("translation_gain")  # as it was called, without a path length ratio
    found = {item.key: item for item in comparisons(old, "mean")}
    assert "scale_ratio" not in found and found["translation_gain"].before.mean == pytest.approx(1.4)
    (folder / "summary.json").write_text(json.dumps(old))
    page = report_page(read_run(folder), samples=0)
    assert "Translation gain" in page and "Scale ratio" not in page and "travels 0.980 metres instead of 1.40" in page


def with_values(name: str, before: list[float], after: list[float]) -> dict[str, Any]:
    """A summary with one metric of these values per noise seed."""
    found = {"mean": {"before": {name: before}, "after": {name: after}}}
    means = {"mean": {stage: {name: float(np.mean(values[name]))} for stage, values in found["mean"].items()}}
    return {"held_out": means, "held_out_per_noise_seed": found}


@pytest.mark.parametrize(
    ("before", "after", "headline"),
    [
        ([0.40], [0.20], "strays 0.200 metres from its path, 0.400 before training"),  # one seed: no verdict
        ([0.400, 0.400], [0.399, 0.399], "No gain: the camera is as far"),  # beyond the spread of 0, but 0 % in print
        ([0.40, 0.42], [0.20, 0.22], "strays 49&thinsp;% less"),
        ([0.20, 0.22], [0.40, 0.42], "strays 95&thinsp;% more"),
        ([0.40, 0.60], [0.38, 0.58], "as far from its path as before"),
    ],
)
def test_headline_and_colours_say_no_more_than_the_numbers(
    folder: Path, before: list[float], after: list[float], headline: str
) -> None:
    (folder / "summary.json").write_text(json.dumps(with_values("translation_error_m", before, after)))
    page = report_page(read_run(folder), samples=0)
    assert headline in page and "strays 0&thinsp;%" not in page
    judged = {"less": "good", "more": "bad"}.get(headline.rpartition(" ")[2], "even")
    assert set(re.findall(r'class="change (\w+)"', page)) == {judged}
    assert ("one evaluation noise seed" in page) == (len(before) == 1)


def test_shares_of_the_time_add_up_to_the_iteration(folder: Path) -> None:
    """Decoding and rewards run inside scoring, collectives anywhere; 10 s an iteration, of which 1 s has no name."""
    row = {
        "rollout/tail": 3, "scoring": 4, "rollout/decode": 1.5, "reward/geometry": 2.5, "update/backward": 2,
        "sync/scores": 1, "other": 1, "iteration": 10, "between": 7,
    }  # fmt: skip
    rows = [{"iteration": i} | {f"time/{name}_s": seconds for name, seconds in row.items()} for i in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report_page(read_run(folder), samples=0)
    section = page.partition('id="time"')[2]
    assert "Mean of an iteration: 10.0 seconds" in section
    shares = re.findall(r"</span>([^<]*).*?</td><td>([\d.]+)</td><td>(\d+)&thinsp;%", section)
    assert [(name.strip(), float(seconds), int(share)) for name, seconds, share in shares] == [
        ("scoring", 4, 40), ("rollout / tail", 3, 30), ("update / backward", 2, 20), ("all else", 1, 10),
    ]  # fmt: skip
    assert "in it: rollout / decode 1.50, reward / geometry 2.50" in section


@pytest.mark.parametrize(
    ("ranks", "processes", "start", "end", "said"),
    [
        (1, {"count": 8, "nodes": 1, "torchrun": True}, "torchrun --nproc-per-node 8 -m geoalign train", "x-again",
         "It was 8 processes."),
        (1, {"count": 64, "nodes": 8, "torchrun": True}, "torchrun --nnodes 8 --nproc-per-node 8 -m geoalign train",
         "x-again", "It was 64 processes on 8 nodes: give each node"),
        ("auto", {"count": 4, "nodes": 1, "torchrun": False}, "geoalign train", "run.ranks=4", "It was 4 processes."),
        ("auto", {"count": 1, "nodes": 1, "torchrun": False}, "geoalign train", "run.ranks=1", "It was 1 process."),
        (4, {"count": 4, "nodes": 1, "torchrun": False}, "geoalign train", "x-again", "It was 4 processes."),
        # Runs of before did not record it, and what somebody made something else is not known.
        (1, None, "geoalign train", "x-again", "How many processes it was is not recorded."),
        (1, {"count": "8"}, "geoalign train", "x-again", "How many processes it was is not recorded."),
        (1, {"count": 8, "nodes": 3}, "geoalign train", "x-again", "How many processes it was is not recorded."),
    ],
)  # fmt: skip
def test_the_printed_command_starts_as_many_processes(
    folder: Path, ranks: int | str, processes: Any, start: str, end: str, said: str
) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "x", "ranks": ranks}}))
    (folder / "env.json").write_text(
        json.dumps({"commit": "abc"} | ({} if processes is None else {"processes": processes}))
    )
    how = html.unescape(report_page(read_run(folder), samples=0).partition('id="how"')[2])
    command = how.partition("<pre>")[2].partition("</pre>")[0]
    assert command.startswith(f"{start} --config ") and command.endswith(end) and said in how
    words = shlex.split(command.partition(" --config ")[2])
    assert load_config(Config, words[0], words[1:]).run.name == "x-again"


@pytest.mark.parametrize(
    "settings", [{"name": "a b"}, {"name": "x", "dir": "out/{name}"}, {"name": "x", "dir": "out/one"}]
)
def test_the_printed_command_is_accepted_and_goes_elsewhere(folder: Path, settings: dict[str, str]) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": settings}))
    page = report_page(read_run(folder), samples=0)
    words = shlex.split(html.unescape(page.partition('id="how"')[2].partition("<pre>")[2].partition("</pre>")[0]))
    assert words[:3] == ["geoalign", "train", "--config"]
    again = load_config(Config, words[3], words[4:]).run
    assert again.folder != load_config(Config, words[3]).run.folder
    assert again.name == settings["name"] + "-again"


def test_sections_of_another_kind_are_named(folder: Path) -> None:
    for text in ("run: foo\n", "run:\n"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml: run must be a mapping"):
            read_run(folder)


def test_curves_that_never_move_are_words(folder: Path) -> None:
    page = report_page(read_run(folder), samples=0)
    curves = page.partition('id="curves"')[2].partition('id="time"')[0]
    assert "In every iteration: log prob diff max <b>0</b>." in curves
    assert curves.count("<svg") == 3  # reward/trans, reward/trans_m, policy/ratio_max


def test_held_out_checks_are_shown_as_they_are_and_what_is_sampled_as_a_moving_average(folder: Path) -> None:
    """The last of few values must not trail behind: 0.5 -> 0.3 is not 0.5 -> 0.4."""
    values = [0.5, 0.4, 0.3]
    rows = [{"iteration": i, "eval/presets_psnr_db": value, "reward/other": value} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report_page(read_run(folder), samples=0)
    shown = [re.findall(rf'<b>[^<]*{name}[^<]*</b><span class="now">(.*?)</span>', page) for name in ("psnr", "other")]
    assert (
        shown == [["0.500 &rarr; 0.300"], [f"0.500 &rarr; {number(smooth(values)[-1])}"]] and smooth(values)[-1] > 0.38
    )


def test_a_run_whose_settings_changed_is_not_said_to_be_given_by_one_configuration(folder: Path) -> None:
    said = "the same configuration on as many processes"
    assert said in re.sub(r"\s+", " ", report_page(read_run(folder), samples=0))
    changed = [{"iteration": 1, "what": 'flow.tail_solver "euler" -> "<dpm2m>"'}, {"iteration": 4, "what": "b"}]
    for file in ("env.json", "summary.json"):  # of a run under way there is no summary yet
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(before) | {"changed": changed}))
        page = re.sub(r"\s+", " ", report_page(read_run(folder), samples=0))
        assert said not in page and "No single configuration gives this run" in page
        assert "<li>after 1 iteration: flow.tail_solver &quot;euler&quot; -&gt; &quot;&lt;dpm2m&gt;&quot;</li>" in page
        assert "settings or data changed 2 times on the way" in page and "changed:" not in page
        (folder / file).write_text(before)


def test_a_run_that_made_things_worse_says_so_in_three_places(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps(with_values("psnr_db", [18.0, 18.1], [17.0, 17.1])))
    page = report_page(read_run(folder), samples=0)
    assert "1 thing to look at" in page and "Likeness to the truth got worse: 18.1 to 17.1 dB" in page
    (folder / "summary.json").write_text(json.dumps(with_values("translation_error_m", [0.4, 0.41], [0.6, 0.61])))
    page = report_page(read_run(folder), samples=0)
    assert "strays 49&thinsp;% more" in page and "worse: position error" in page


def test_troubles_are_counted_and_placed(folder: Path) -> None:
    rows = [
        {"iteration": i, "failures/geometry": 2.0 * (i == 3), "failures/geometry/timeouts": float(i),
         "failures/vlm": 0.0, "reward/lost_fraction": 0.5 * (i == 2), "reward/saturated_fraction": 0.005,
         "policy/skipped_updates": 0.0, "parity/log_prob_diff_max": 1e-5, "advantage/rot/zero_variance": 5.0,
         "advantage/clip_fraction": 0.05}
        for i in range(4)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("groups: {conditions: 8}\ntrain: {max_log_prob_diff: 1.0e-4}\n")
    section = report_page(read_run(folder), samples=0).partition('id="troubles"')[2].partition("</section>")[0]
    listed = re.sub(r"<[^>]+>", "", section.partition("<ul")[2].partition("</ul>")[0])
    assert "2 samples that geometry could not score, in 1 of 4 iterations, at most 2 (iteration 3)" in listed
    assert "12 % samples in which no camera could be read, in 1 of 4 iterations, at most 50 % (iteration 2)" in listed
    assert "3 calls of geometry that came too late" in listed  # a running count: its last value, not the sum
    assert "20 groups whose members all have the same rot, in 4 of 4" in listed  # 5 of 8 are most
    for fine in ("vlm", "saturated_fraction", "skipped", "parity", "clip_fraction"):
        assert fine not in listed
    assert "All 9 things looked at" in section


def test_latents_that_are_not_finite_are_no_sample_that_a_scorer_failed_on(folder: Path) -> None:
    rows = [{"iteration": i, "failures/policy": float(i), "failures/policy_net": 1.0} for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = report_page(read_run(folder), samples=0).partition('id="troubles"')[2].partition("</section>")[0]
    links = re.findall(r'<a href="(file:///[^"]+)#([^"]+)">([^<]+)</a>', section)
    assert [(anchor, text) for _, anchor, text in links] == [
        (anchor, f"docs/troubleshooting.md#{anchor}") for anchor in ("nan-and-skipped-updates", "samples-fail")
    ]
    assert all(Path(url2pathname(page.removeprefix("file://"))).is_file() for page, _, _ in links)
    listed = re.sub(r"<[^>]+>", "", section)
    assert "3 samples whose latents are not finite" in listed and "3 samples that policy net could not score" in listed
    assert "All 2 things looked at" in section


def test_a_fall_back_to_exact_steps_stands_in_the_head_and_under_troubles(folder: Path) -> None:
    rows = [{"iteration": i, "fidelity/exact_tails": float(i > 1)} for i in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report_page(read_run(folder), samples=0)
    head = page.partition('class="lead"')[2].partition("</p>")[0]
    assert "An audit found the approximate steps of this run bad: 3 of 5 iterations took exact ones." in head
    assert "3 iterations with exact steps after the window" in page and "troubleshooting.md#an-audit-is-bad" in page
    (folder / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert "An audit found" not in report_page(read_run(folder), samples=0)


def test_a_run_without_troubles_says_that_it_looked(folder: Path) -> None:
    (folder / "summary.json").unlink()
    page = report_page(read_run(folder), samples=0)
    assert "Nothing is out of its range in the 6 iterations" in page and "to look at" not in page


def test_a_live_run_shows_how_far_it_is_and_what_is_missing(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "eval" / "after.npz").unlink()
    (folder / "config.yaml").write_text("train: {iterations: 24}\nworld: {}\nrun: {name: x}\n")
    stopped = report_page(read_run(folder), samples=0)
    assert "stopped early" in stopped and "geoalignRefresh" not in stopped and "left no checkpoint" in stopped
    with writer_lock(folder, "run"):
        page = report_page(read_run(folder), samples=0)
    assert "Iteration 6 of 24 is done" in page and "running now" in page and 'style="width:25.0%"' in page
    # 4.5 s an iteration, 18 are left
    assert "About <b>81 s</b> of iterations left" in page and "4.50 seconds an iteration" in page
    assert "<li>18 of 24 iterations</li><li>the held-out evaluation after training</li><li>the summary</li>" in page
    assert "const geoalignRefresh = 20" in page and "--follow" in page
    old = time.time() - 600
    os.utime(folder / "metrics.jsonl", (old, old))
    with writer_lock(folder, "run"):
        assert "it may hang" in report_page(read_run(folder), samples=0)


@pytest.mark.parametrize("rows", [1, 6, 20, 21, 45])
def test_only_the_set_up_of_the_run_is_left_out_of_its_pace(rows: int, folder: Path) -> None:
    """Iterations of 2 s with 1 s in between, after a set-up of 100 s that no later iteration has."""
    lines = [{"iteration": i, "time/iteration_s": 2.0, "time/between_s": 1.0 if i else 100.0} for i in range(rows)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recent = min(rows, 20)
    expected = 2 + (recent - (rows <= 20)) / recent
    assert seconds_per_iteration(read_run(folder)) == pytest.approx(expected, rel=1e-12)


def test_the_newest_checkpoint_is_one_that_resume_would_take(folder: Path) -> None:
    (folder / "summary.json").unlink()
    for name in ("step_000004", "step_000006", "step_000006.aside-1", "step_000008.aside-1", "step_000009.tmp"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert "Its newest checkpoint is <code>step_000006</code>;" in report_page(read_run(folder), samples=0)


def test_real_clips_have_no_result_that_could_still_come(folder: Path) -> None:
    (folder / "summary.json").unlink()
    for stage in ("before", "after"):
        (folder / "eval" / f"{stage}.npz").unlink()
    for settings, yet, doing in (("", "", "written"), ("world: {}\n", " yet", "measured")):
        (folder / "config.yaml").write_text(f"train: {{iterations: 6}}\n{settings}")
        assert f"<h1>This run has no held-out result{yet}</h1>" in report_page(read_run(folder), samples=0)
        with writer_lock(folder, "run"):
            page = report_page(read_run(folder), samples=0)
        assert f"All 6 iterations are done; the result is being {doing}" in page


def test_follow_tells_where_at_once_and_writes_until_the_run_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = ExitStack()
    lock.enter_context(writer_lock(folder, "run"))
    seen, said = list[bool](), list[str]()

    def wait(seconds: float) -> None:
        seen.append("running now" in (folder / "report.html").read_text())
        said.append(capsys.readouterr().out)
        if len(seen) == 2:
            lock.close()

    monkeypatch.setattr("geoalign.report.page.time.sleep", wait)
    assert main(["report", str(folder), "--follow", "--samples", "0"]) == 0
    assert seen == [True, True] and "running now" not in (folder / "report.html").read_text()
    assert [*said, capsys.readouterr().out] == [f"{folder / 'report.html'}\n", "", ""]


def test_lost_cameras_and_saturated_frames_stand_beside_the_rewards_and_not_among_them() -> None:
    for key in ("reward/lost_fraction", "reward/saturated_fraction", "reward/geometry/tracked"):
        assert next(group for group in CURVES if group.takes(key)).title == "What is not trained on"
    assert next(group for group in CURVES if group.takes("advantage/lost_groups")).title == "Advantages"


def test_the_verb_writes_the_file_and_says_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--samples", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_run_stopped_early_gives_a_report_that_says_so(folder: Path) -> None:
    (folder / "summary.json").unlink()
    for stage in ("before", "after"):
        (folder / "eval" / f"{stage}.npz").unlink()
    page = report_page(read_run(folder))
    assert "no held-out result" in page and 'id="curves"' in page
    assert 'id="samples"' not in page and 'id="results"' not in page


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.yaml", "env.json", "eval/after.npz"])
def test_damaged_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{[\n: : \xff\xfe\n{}\n")
    with pytest.raises(DataError, match=re.escape(Path(name).name)):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [('{"iteration": "x"}', "iteration is 'x'"), ('{"iteration": -1}', "iteration is -1"),
     ('{"iteration": 1.5}', "iteration is 1.5"), ('{"iteration": 1, "reward/mean": [1]}', r"reward/mean is \[1\]")],
)  # fmt: skip
def test_metrics_that_are_no_numbers_are_named_with_their_line(folder: Path, row: str, said: str) -> None:
    file = folder / "metrics.jsonl"
    file.write_text('{"iteration": 0, "reward/mean": null}\n' + row + '\n{"iteration": 2}\n')
    with pytest.raises(DataError, match=rf"metrics\.jsonl: line 2: {said}, not a number; delete the line"):
        read_run(folder)


def test_values_over_noise_seeds_are_lists_and_what_json_cannot_say_is_nothing(folder: Path) -> None:
    """Python writes NaN into JSON; by hand a list of one becomes a number."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    stage = summary["held_out"]["mean"]["before"]
    stage["translation_error_m"] = float("nan")
    file.write_text(json.dumps(summary | {"wall_s": float("inf")}))
    run = read_run(folder)
    assert run.summary["wall_s"] is None and "translation_error_m" not in {
        c.key for c in comparisons(run.summary, "mean")
    }
    assert "</html>" in report_page(run)
    file.write_text(json.dumps(summary | {"held_out_per_noise_seed": {"mean": {"before": {"psnr_db": 20.0}}}}))
    with pytest.raises(DataError, match=r"held_out_per_noise_seed\.mean\.before\.psnr_db must be a list of numbers"):
        read_run(folder)


def test_a_cut_archive_is_named(folder: Path) -> None:
    archive = folder / "eval" / "before.npz"
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"before\.npz"):
        read_run(folder)


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        read_run(tmp_path)


def test_samples_are_taken_at_even_ranks_and_unreadable_ones_come_last() -> None:
    chosen = choose_samples(np.array([0.3, np.nan, 0.1, 0.2, 0.5]), 3)
    assert [index for index, _ in chosen] == [2, 0, 1]
    assert choose_samples(np.array([1.0]), 4) == [(0, "best of 1")]


def test_numbers_ticks_and_smoothing() -> None:
    assert [number(value) for value in (0, 0.12345, 12.345, 123.4, 1e-7, float("nan"))] == [
        "0", "0.123", "12.3", "123", "1.00e-07", "n/a",
    ]  # fmt: skip
    assert ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks(-0.9, 9.9) == pytest.approx([0, 5])
    texts = [number(value, 2).replace("\N{MINUS SIGN}", "minus ") for value in (0.0996, -0.0996, 9.96, -2.24e-7)]
    assert texts == ["0.10", "minus 0.10", "10", "minus 2.2e-07"]
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2])
