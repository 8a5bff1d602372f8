"""What the study of decoding counts: bytes and operators of a known function, and that fewer passes move less."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from repository import ROOT
from torch import Tensor


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(ROOT) / "profiling" / "studies"))
    import decode

    return decode


def test_a_known_function_is_counted_as_on_paper(decode: ModuleType) -> None:
    def known(x: Tensor) -> Tensor:
        y = x.view(10, 100) + 1  # reads 4000 bytes and writes 4000
        y.mul_(2)  # the same in place
        z = torch.empty_like(y)
        torch.div(y, 3, out=z)  # again 8000
        return z.to(torch.bfloat16)  # reads 4000, writes 2000

    x = torch.empty(1000, device="meta")
    with decode.Traffic() as traffic:
        result = known(x)
    assert (traffic.launches, traffic.moved, traffic.convolved) == (4, 30000, 0)
    assert traffic.peak == 14000 and result.shape == (10, 100)  # x by its view, y, z and the result


def test_fewer_passes_move_less_and_hold_no_more(decode: ModuleType) -> None:
    stock, lean, *others = decode.count((3, 4, 6), base_dim=16)
    assert lean["convolved_gb"] <= stock["convolved_gb"]
    assert lean["launches"] < stock["launches"] and lean["peak_gb"] <= stock["peak_gb"]
    theirs, ours, *rest = (row["moved_gb"] - row["convolved_gb"] for row in (stock, lean, *others))
    assert ours < 0.55 * theirs and all(each > 0.75 * ours for each in rest)
