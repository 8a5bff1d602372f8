"""Published files of the scorers: strict keys, low-rank folding against PEFT, verified prompt templates."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from geoalign.errors import CheckpointError, RewardError
from geoalign.rewards.vlm import templates
from geoalign.rewards.vlm.body import RewardQwen, hpsv3_head
from geoalign.rewards.vlm.checkpoint import PEFT_PREFIX, fold_lora, load_scorer, strip_prefix
from geoalign.rewards.vlm.layout import QwenLayout

TINY = QwenLayout(32, 1, 2, 64, 64, 1, 4, 2, 128, rows=64)
HEAD = (16, 4)


def published() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = RewardQwen(TINY, hpsv3_head(TINY, HEAD)).state_dict()
    return {**state, "lm_head.weight": torch.zeros(64, 64)}


def load(state: dict[str, Tensor]) -> RewardQwen:
    return load_scorer(TINY, lambda layout: hpsv3_head(layout, HEAD), state, source="f.safetensors")


def test_every_tensor_is_used_and_the_head_stays_float32() -> None:
    state = published()
    found = load(state).state_dict()
    assert set(state) - set(found) == {"lm_head.weight"} and "rm_head.5.bias" in found
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name.startswith("rm_head") else torch.bfloat16)
        assert torch.equal(tensor, state[name].to(tensor.dtype))


@pytest.mark.parametrize("name", ["visual.merger.ln_q.weight", "model.norm.weight", "rm_head.3.bias", "lm_head.weight"])
def test_loader_refuses_missing_extra_renamed_and_reshaped(name: str) -> None:
    missing, extra, renamed, reshaped = (published() for _ in range(4))
    del missing[name]
    extra[name + "2"] = torch.zeros(1)
    renamed["language_" + name] = renamed.pop(name)
    for state, message in ((missing, "1 missing"), (extra, "1 unexpected"), (renamed, "1 missing.*1 unexpected")):
        with pytest.raises(CheckpointError, match=message):
            load(state)
    if name != "lm_head.weight":  # dropped, so its shape is free
        reshaped[name] = torch.zeros(7)
        with pytest.raises(CheckpointError, match="of another shape"):
            load(reshaped)


def test_fold_equals_peft() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False))
    folded = fold_lora(strip_prefix(model.state_dict(), PEFT_PREFIX), 2.0)
    plain = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    plain.load_state_dict(folded, strict=True)
    x = torch.randn(3, 8)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=2e-6)
    state = model.state_dict()
    del state[PEFT_PREFIX + "0.lora_B.default.weight"]
    with pytest.raises(CheckpointError, match="incomplete low-rank update"):
        fold_lora(strip_prefix(state, PEFT_PREFIX), 2.0)
    with pytest.raises(CheckpointError, match="lack the prefix"):
        strip_prefix({"x": x}, PEFT_PREFIX)


def test_template_is_fetched_verified_and_refused_when_altered(tmp_path: Path) -> None:
    text = "\nRate it. \n{text_prompt}\n"
    known = {"t": templates.Template(hashlib.sha256(text.encode()).hexdigest(), len(text), "pkg")}

    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "pkg.whl", "w") as wheel:
            wheel.writestr("pkg/prompt.py", f"raise SystemExit\nA = 'no'\nB = {text!r}\n")
        return folder / "pkg.whl"

    with pytest.raises(RewardError, match="doctor --fetch-rewards"):
        templates.load("t", tmp_path, known)
    paths = templates.fetch(tmp_path, known=known, downloads={"pkg": download})
    assert templates.load("t", tmp_path, known) == text
    paths["t"].write_text(text.replace(" \n", "\n"))
    with pytest.raises(RewardError, match="not the published template"):
        templates.load("t", tmp_path, known)
