"""Backend choice: explicit and unavailable is an error, scopes end, the environment is read, the report says why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import geoalign_kernels as gk
from geoalign_kernels import dispatch, registration
from geoalign_kernels.registration import on_device

CPU = torch.device("cpu")


def test_explicit_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 8)
    with gk.use_backend("triton"), pytest.raises(gk.BackendUnavailableError, match="CUDA"):
        gk.gated_residual(x, x, x[:, 0])
    with gk.use_backend("triton", "gated_residual"), pytest.raises(gk.BackendUnavailableError, match="CUDA"):
        gk.gated_residual(x, x, x[:, 0])
    assert dispatch.backend_for("gated_residual", CPU) == "reference"


def test_an_op_runs_with_the_device_of_its_tensors_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextlib.contextmanager
    def switched(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    seen = [on_device(torch.device("cuda", index), lambda: current[0]) for index in (1, 0)]
    assert (seen, current) == ([1, 0], [0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("a CPU tensor must not wake CUDA"))
    assert on_device(CPU, lambda a, b: a - b, 5, 3) == 2
    # Every op goes through it, attention too, which does not go through `dispatch`.
    calls: list[str] = []

    def noted(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
        calls.append(function.__name__)
        return on_device(device, function, *args)

    monkeypatch.setattr(registration, "on_device", noted)
    x = torch.zeros(1, 2, 8)
    gk.gated_residual(x, x, x[:, 0])
    q = torch.zeros(1, 2, 1, 8, requires_grad=True)
    gk.attention(q, q, q).out.sum().backward()
    assert calls == ["run", "_run", "_run_backward"]


def test_environment_chooses_per_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(dispatch.ENV, "auto,gated_residual=triton")
    assert dispatch.backend_for("modulated_norm", CPU) == "reference"
    with pytest.raises(gk.BackendUnavailableError):
        dispatch.backend_for("gated_residual", CPU)
    monkeypatch.setenv(dispatch.ENV, "fast")
    with pytest.raises(ValueError, match="GEOALIGN_KERNELS"):
        dispatch.backend_for("gated_residual", CPU)


@pytest.mark.parametrize(
    ("text", "row_op", "frames"),
    [
        ("triton", "triton", "auto"),
        ("cpp", "auto", "cpp"),
        ("cpp,triton", "triton", "cpp"),
        ("triton,frame_preprocess=reference", "triton", "reference"),
        ("frame_preprocess=cpp,reference", "reference", "reference"),
    ],
)
def test_a_bare_name_holds_for_the_ops_that_have_it(
    text: str, row_op: str, frames: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No op is left with a backend that it does not have, which would fail no earlier than its first call."""
    monkeypatch.setenv(dispatch.ENV, text)
    assert (dispatch.wanted("rms_norm"), dispatch.wanted("frame_preprocess")) == (row_op, frames)


def test_all_ops_in_code_are_those_that_have_the_backend_and_end_earlier_choices() -> None:
    with gk.use_backend("reference", "frame_preprocess"):
        with gk.use_backend("triton"):
            assert (dispatch.wanted("rms_norm"), dispatch.wanted("frame_preprocess")) == ("triton", "auto")
            assert dispatch.backend_for("frame_preprocess", CPU) in ("cpp", "reference")
        assert (dispatch.wanted("rms_norm"), dispatch.wanted("frame_preprocess")) == ("auto", "reference")


def test_a_backend_that_the_named_op_does_not_have_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'frame_preprocess' has no backend 'triton', only reference, cpp, cuda"):
        gk.set_backend("triton", "frame_preprocess")
    monkeypatch.setenv(dispatch.ENV, "frame_preprocess=triton")
    with pytest.raises(ValueError, match=r"GEOALIGN_KERNELS='frame_preprocess=triton': op"):
        dispatch.backend_for("rms_norm", CPU)  # the first op of a run, not the scorer's


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(ValueError, match="reference"):
        gk.set_backend("cutlass")
    with pytest.raises(ValueError, match="modulated_norm"):
        gk.set_backend("reference", "no_such_op")


def test_report_has_a_row_per_op_with_reasons() -> None:
    rows = {row["op"]: row for row in gk.report("cpu")}
    assert rows["qk_norm_rotary"]["backend"] == "reference"
    assert "CUDA" in rows["qk_norm_rotary"]["missing"] or "triton" in rows["qk_norm_rotary"]["available"]


def test_backends_that_lack_the_same_share_its_words() -> None:
    reasons = {"reference": "", "a": "needs X", "cpp": "", "b": "needs X", "c": "needs Y"}
    told = dispatch.row("op", "cpp", reasons)
    assert told == {"op": "op", "backend": "cpp", "available": "reference, cpp", "missing": "a, b: needs X; c: needs Y"}
