"""Backend choice: explicit and unavailable is an error, scopes end, the environment is read, the report says why."""

from __future__ import annotations

import pytest
import torch

import geoalign_kernels as gk
from geoalign_kernels import dispatch

CPU = torch.device("cpu")


def test_explicit_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 8)
    with gk.use_backend("triton"), pytest.raises(gk.BackendUnavailableError, match="CUDA"):
        gk.gated_residual(x, x, x[:, 0])
    with gk.use_backend("cuda", "gated_residual"), pytest.raises(gk.BackendUnavailableError, match="only"):
        gk.gated_residual(x, x, x[:, 0])
    assert dispatch.backend_for("gated_residual", CPU) == "reference"


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
