"""The loader on a toy schema: merging, overrides, and error texts that name place, value and fix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from geoalign.config import source
from geoalign.config.base import Section
from geoalign.config.load import flatten, load_config, to_yaml, validate
from geoalign.config.schema import Config
from geoalign.config.source import RawConfig, load_raw
from geoalign.errors import ConfigError
from geoalign.files.yaml_text import Loader


class Optim(Section):
    lr: float = Field(1e-4, gt=0)
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["adamw", "adamw8bit"] = "adamw"


class Scorer(Section):
    kind: str
    weight: float = 1.0


class Window(Section):
    start: int = 0
    stop: int = 4

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if self.stop <= self.start:
            raise ValueError(f"window {self.start}..{self.stop} is empty; raise window.stop")
        return self


class Toy(Section):
    name: str = "toy"
    seed: int = 0
    optim: Optim = Optim()
    window: Window = Window()
    rewards: dict[str, Scorer] = Field(default_factory=dict)
    note: str | None = None


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def error_of(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Toy, path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_extends_merges_key_by_key_and_overrides_come_last(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 1\noptim: {lr: 1e-3, kind: adamw8bit}\nrewards:\n  rot: {kind: geometry}\n")
    write(tmp_path / "mid.yaml", "extends: base.yaml\noptim:\n  lr: 2e-3\n")
    leaf = write(tmp_path / "leaf.yaml", "extends: mid.yaml\nrewards:\n  look: {kind: sharpness, weight: 0.5}\n")
    config = load_config(Toy, leaf, ["optim.betas=[0.8, 0.9]", "rewards.rot.weight=2", "name=a=b"])
    assert config == Toy(
        name="a=b",
        seed=1,
        optim=Optim(lr=2e-3, kind="adamw8bit", betas=(0.8, 0.9)),
        rewards={"rot": Scorer(kind="geometry", weight=2), "look": Scorer(kind="sharpness", weight=0.5)},
    )


def test_null_removes_a_named_entry_and_sets_an_optional_field(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "note: hello\nrewards:\n  a: {kind: x}\n  b: {kind: y}\n")
    leaf = write(tmp_path / "leaf.yaml", "extends: base.yaml\nnote: null\nrewards:\n  a: null\n")
    config = load_config(Toy, leaf)
    assert config.note is None
    assert list(config.rewards) == ["b"]


def test_the_home_folder_is_meant_where_a_path_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("extends: smoke\ndata: {root: ~/data, clips: {path: ~/clips}}\n")
    config = load_config(Config, str(tmp_path / "c.yaml"), ["run.dir=~/runs/{name}", "data.cache=a~/b"])
    assert config.data.root == tmp_path / "data" and config.data.clips_path == tmp_path / "clips"
    assert config.run.folder == tmp_path / "runs" / config.run.name and config.data.cache == Path("a~/b")
    with pytest.raises(ConfigError, match="there is no such home folder; write the path out"):
        load_config(Config, "smoke", ["data.root=~nobody_of_this_name/data"])


def test_three_extends_and_circles_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "seed: 1\n")
    for child, parent in (("b", "a"), ("c", "b"), ("d", "c")):
        write(tmp_path / f"{child}.yaml", f"extends: {parent}.yaml\n")
    assert load_config(Toy, str(tmp_path / "c.yaml")).seed == 1
    assert "at most 2 deep" in error_of(str(tmp_path / "d.yaml"))
    write(tmp_path / "x.yaml", "extends: y.yaml\n")
    write(tmp_path / "y.yaml", "extends: x.yaml\n")
    assert "circle" in error_of(str(tmp_path / "x.yaml"))


def test_a_missing_parent_names_the_line_of_extends(tmp_path: Path) -> None:
    text = error_of(write(tmp_path / "leaf.yaml", "seed: 1\nextends: nowhere.yaml\n"))
    assert "leaf.yaml:2" in text and "nowhere.yaml" in text


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("optim:\n  lrr: 1\n", [], ["bad.yaml:2", "`optim.lrr`", "did you mean `optim.lr`?"]),
        ("lr: 1\n", [], ["bad.yaml:1", "`lr`", "did you mean `optim.lr`?"]),
        ("optimizer: {lr: 1}\n", [], ["`optimizer`", "did you mean `optim`?"]),
        ("rewards:\n  rot: {kind: g, wieght: 1}\n", [], ["bad.yaml:2", "`rewards.rot.wieght`", "rewards.rot.weight"]),
        ("seed: 1\n", ["optim.lrate=1"], ["command line (optim.lrate=1)", "did you mean `optim.lr`?"]),
        ("optim: {zzzzzzzz: 1}\n", [], ["known here: betas, kind, lr"]),
        ("optim:\n  lr: -1\n", [], ["bad.yaml:2", "`optim.lr`", "greater than 0", "got -1"]),
        ("optim:\n  lr: fast\n", [], ["bad.yaml:2", "`optim.lr`", "valid number", "got 'fast'"]),
        (
            "optim:\n  kind: adamw8\n",
            [],
            ["must be one of adamw, adamw8bit", "got 'adamw8'", "did you mean adamw?"],
        ),
        ("optim:\n  betas: [1]\n", [], ["`optim.betas.1`", "required"]),
        ("rewards:\n  rot: {weight: 1}\n", [], ["`rewards.rot.kind`", "is required", "bad.yaml:2"]),
        ("window: {start: 4}\n", [], ["bad.yaml:1", "`window`", "raise window.stop"]),
        ("optim: 3\n", [], ["`optim`", "bad.yaml:1"]),
        ("seed: 1\nseed: 2\n", [], ["bad.yaml:2", "`seed` is given twice", "bad.yaml:1"]),
        ("seed: [1\n", [], ["bad.yaml:", "not valid YAML"]),
        ("- 1\n", [], ["expected sections", "list"]),
        ("seed: 1\n", ["seed"], ["'seed' is not an override", "section.key=value"]),
        ("seed: 1\n", ["=3"], ["is not an override"]),
        ("seed: 1\n", ["seed=[1"], ["not valid YAML"]),
        ("seed: 1.5\n", [], ["`seed`", "got 1.5"]),
    ],
)
def test_errors_name_place_value_and_fix(tmp_path: Path, text: str, overrides: list[str], expected: list[str]) -> None:
    message = error_of(write(tmp_path / "bad.yaml", text), *overrides)
    for part in expected:
        assert part in message


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "bad.yaml", "seed: x\noptim:\n  lr: 0\n"))
    assert len(message.splitlines()) == 2


def test_unreadable_and_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(str(tmp_path / "binary.yaml"))
    assert "no such configuration file" in error_of(str(tmp_path / "none.yaml"))
    assert "no preset is called" in error_of("no_such_preset")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("-.inf", -math.inf),
        ("off", "off"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("true", True),
        ("null", None),
        ("2026-01-01", "2026-01-01"),
        ('"1"', "1"),
        ("", None),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path: Path, written: str, value: object) -> None:
    raw = load_raw(write(tmp_path / "scalar.yaml", f"key: {written}\n"))
    assert raw.data["key"] == value and type(raw.data["key"]) is type(value)


# Letters, digits and signs of any script plus the space; PyYAML itself folds control characters such as U+0085.
WORDS = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), max_size=8)


NUMBER_LIKE = st.text("-+0123456789_.e:", max_size=6)
SCALARS = st.one_of(st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False), WORDS, NUMBER_LIKE)


@given(
    st.recursive(
        st.one_of(
            st.booleans(),
            st.integers(-(10**9), 10**9),
            st.floats(allow_nan=False),
            WORDS,
            st.from_regex(r"[-+0-9_.e:]{1,6}"),
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
        max_leaves=12,
    )
)
@example("0\x85")  # a line break of Unicode
@example("a\u2028b")
def test_whatever_is_written_is_read_back_equal(value: object) -> None:
    loader = Loader(source.dump_yaml({"key": value}))
    assert loader.get_single_data() == {"key": value}


def test_resolved_yaml_loads_back_to_an_equal_config(tmp_path: Path) -> None:
    config = Toy(name="1e-4", seed=3, optim=Optim(lr=3.3e-7), rewards={"off": Scorer(kind="no")}, note="a: b # c\n")
    assert load_config(Toy, write(tmp_path / "resolved.yaml", to_yaml(config))) == config


def test_validate_reports_origin_of_the_enclosing_section() -> None:
    raw = RawConfig({"optim": {"lr": 0}}, {("optim",): "file.yaml:7"})
    with pytest.raises(ConfigError, match=r"^file\.yaml:7: `optim\.lr`"):
        validate(Toy, raw)


def test_flatten_keeps_empty_mappings_and_lists_as_leaves() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
