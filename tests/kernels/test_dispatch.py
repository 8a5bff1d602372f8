"""Backend choice: explicit and unavailable is an error, scopes end, the environment is read, the report says why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import geoalign_kernels as gk
from geoalign_kernels import dispatch, registration
from geoalign_kernels.ops.attention import op as attention_op
from geoalign_kernels.registration import on_device

CPU = torch.device("cpu")


def test_explicit_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 8)
    with gk.use_backend("triton"), pytest.raises(gk.BackendUnavailableError, match="CUDA"):
        gk.gated_residual(x, x, x[:, 0])
    with gk.use_backend("cuda", "gated_residual"), pytest.raises(gk.BackendUnavailableError, match="only"):
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

    for module in (registration, attention_op):
        monkeypatch.setattr(module, "on_device", noted)
    x = torch.zeros(1, 2, 8)
    gk.gated_residual(x, x, x[:, 0])
    q = torch.zeros(1, 2, 1, 8, requires_grad=True)
    gk.attention(q, q, q).out.sum().backward()
    assert calls == ["run", "forward", "backward"]


def test_environment_chooses_per_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENV, "auto,gated_residual=cuda")
    assert dispatch.backend_for("modulated_norm", CPU) == "reference"
    with pytest.raises(gk.BackendUnavailableError):
        dispatch.backend_for("gated_residual", CPU)
    monkeypatch.setenv(dispatch.ENV, "fast")
    with pytest.raises(ValueError, match="GEOALIGN_KERNELS"):
        dispatch.backend_for("gated_residual", CPU)


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
