"""What `train --dry-run` says of a run: everything that CHANGES it, and what an audit takes."""

from __future__ import annotations

import pytest

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.jobs.train_dry_run import describe_run


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("flow.eta=0.7", "; all EXACT"),
        ("optim.states=int8", "; CHANGES: optim.states int8"),
        ("rewards.hpsv3.options.frame_stride=2", "; CHANGES: rewards.hpsv3.options.frame_stride 2"),
        ("rewards.hpsv3.options.frame_stride=1", "; all EXACT"),
        ("learn.window_steps=3", "; CHANGES: learn.window_steps 3"),
    ],
)
def test_what_changes_a_run_is_named(setting: str, said: str) -> None:
    told = describe_run(load_config(Config, "paper_64xa800", [setting]))
    assert str(told["execution"]).endswith(said) and "audit" not in str(told["passes"])


def test_the_passes_of_an_audit_are_named() -> None:
    """The first window ends at step 4: 21 steps for each of 12 members; twice that with two prompts a step."""
    for guidance, forwards in ((1, 252), (5, 504)):
        told = describe_run(load_config(Config, "paper_64xa800_fast", [f"flow.guidance={guidance}"]))
        assert f", {forwards} in an audit every 20 iterations" in str(told["passes"])
