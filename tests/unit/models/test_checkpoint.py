"""Loading: strict both ways, damaged files, memory; exporting: bit-exact round trips, LoRA."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geoalign.cli.main import main
from geoalign.config.model import ModelConfig
from geoalign.errors import CheckpointError, UsageError
from geoalign.files.weights import TensorFile
from geoalign.models.checkpoint import LoadReport, complete_weights, load_dit, redirector_weights
from geoalign.models.dit import RetakeDiT
from geoalign.models.layouts import LAYOUTS, diffusers_name, model_shapes
from geoalign.policy.formats import export_recammaster, export_redirector, manifest, save_pretrained
from geoalign.policy.lora import PREFIX, export_lora
from geoalign.policy.open import describe

BASE = ModelConfig(
    dim=48, heads=2, layers=2, ffn_dim=64, in_channels=32, text_dim=16, freq_dim=32, image_dim=1280,
    pluecker_adapter=True, space_stride=2,
)  # fmt: skip
DELTA = BASE.model_copy(update={"source": "frames", "camera": "learned"})
RECAM = ModelConfig(
    dim=48, heads=2, layers=2, ffn_dim=64, text_dim=16, freq_dim=32, source="frames", camera="modulated",
    rope_layout="sequential",
)  # fmt: skip


def model_of(config: ModelConfig, seed: int = 0) -> RetakeDiT:
    torch.manual_seed(seed)
    model = RetakeDiT(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def write_base(path: Path) -> RetakeDiT:
    model = model_of(BASE)
    save_file(model.state_dict(), path)
    return model


def write_delta(model: RetakeDiT, path: Path) -> None:
    """The self-attention alone, as a run on published weights leaves it."""
    save_file({name: value for name, value in model.state_dict().items() if "self_attn" in name}, path)


def load(config: ModelConfig, path: Path) -> tuple[RetakeDiT, LoadReport]:
    return load_dit(config, [complete_weights(config, TensorFile(path))])


def same(a: RetakeDiT, b: RetakeDiT) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_redirector_round_trip_is_bit_exact(tmp_path: Path) -> None:
    base, delta = tmp_path / "base.safetensors", tmp_path / "step20000.safetensors"
    frozen, tuned = write_base(base), model_of(DELTA, 1)
    written = export_redirector(tuned, delta)
    assert len(written) == 2 * 12 and all("self_attn" in name for name in written)
    loaded, _ = load_dit(DELTA, redirector_weights(TensorFile(base), TensorFile(delta), DELTA))
    for name, value in loaded.state_dict().items():
        expected = tuned if "self_attn" in name else frozen
        assert torch.equal(value, expected.state_dict()[name]), name
    # bfloat16 keeps 8 significant bits: half a unit in the last place is 2^-9 of the value.
    rounded = export_redirector(tuned, tmp_path / "half.safetensors", torch.bfloat16)
    for name, value in rounded.items():
        exact = written[name]
        assert ((value.float() - exact).abs() <= exact.abs() * 2**-8).all() and value.dtype == torch.bfloat16


def test_wrong_base_is_refused_and_named(tmp_path: Path) -> None:
    """A plain text-to-video base has self-attention of the same names and shapes; it must not load silently."""
    plain = BASE.model_copy(update={"in_channels": 16, "image_dim": None, "pluecker_adapter": False})
    save_file(model_of(plain).state_dict(), tmp_path / "t2v.safetensors")
    export_redirector(model_of(DELTA), tmp_path / "delta.safetensors")
    with pytest.raises(CheckpointError, match=r"t2v.safetensors is not the base of ReDirector.*24 missing.*k_img"):
        redirector_weights(TensorFile(tmp_path / "t2v.safetensors"), TensorFile(tmp_path / "delta.safetensors"), DELTA)


def test_full_size_wrong_base_is_recognised_by_name(tmp_path: Path) -> None:
    """A sparse file with the header of published T2V weights: the message says what it is, before reading data."""
    entries, offset = {}, 0
    for name, shape in LAYOUTS["wan_t2v_1_3b"].shapes().items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    base = tmp_path / "t2v.safetensors"
    base.write_bytes(struct.pack("<Q", len(header)) + header)
    with base.open("r+b") as stream:
        stream.truncate(8 + len(header) + offset)
    export_redirector(model_of(DELTA), tmp_path / "delta.safetensors")
    with pytest.raises(CheckpointError, match=r"not the base of ReDirector.*resembles Wan2.1-T2V-1.3B \(100%"):
        redirector_weights(TensorFile(base), TensorFile(tmp_path / "delta.safetensors"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "truncated"),
        ("empty", "empty"),
        ("renamed", "1 missing: .*; 1 unexpected: other"),
        ("dropped", "1 missing"),
        ("shape", "of another shape"),
        ("integers", "quantised"),
        ("garbage", "truncated or not a safetensors file"),
        ("absent", "no such weight file"),
    ],
)
def test_damaged_checkpoints_give_one_clear_error(tmp_path: Path, damage: str, message: str) -> None:
    path = tmp_path / "model.safetensors"
    state = model_of(RECAM).state_dict()
    first = next(iter(state))
    if damage == "renamed":
        state["other"] = state.pop(first)
    elif damage == "dropped":
        state.pop(first)
    elif damage == "shape":
        state[first] = state[first][:1].clone()
    elif damage == "integers":
        state[first] = state[first].to(torch.int8)
    save_file(state, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 64)
    elif damage == "absent":
        path.unlink()
    with pytest.raises(CheckpointError, match=message):
        load(RECAM, path)


def test_torch_files(tmp_path: Path) -> None:
    model = model_of(RECAM)
    export_recammaster(model, tmp_path / "step.ckpt")
    loaded, _ = load(RECAM, tmp_path / "step.ckpt")
    assert same(loaded, model)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "step.ckpt").read_bytes()[:-500])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "nested.ckpt")
    torch.save({"a": print}, tmp_path / "code.ckpt")
    for name in ("cut", "nested", "code"):
        with pytest.raises(CheckpointError, match=name):
            load(RECAM, tmp_path / f"{name}.ckpt")
    with pytest.raises(UsageError, match="camera=modulated"):
        export_recammaster(model_of(DELTA), tmp_path / "no.ckpt")
    assert not (tmp_path / "no.ckpt").exists()


def test_diffusers_folder_round_trip_and_stock_class(tmp_path: Path) -> None:
    model = model_of(RECAM)
    save_pretrained(model, tmp_path / "ours")
    loaded, report = describe(tmp_path / "ours").network()
    assert same(loaded, model) and loaded.config == RECAM
    assert report.tensors == len(model_shapes(RECAM))
    with pytest.raises(CheckpointError, match="exists already"):
        save_pretrained(model, tmp_path / "ours")
    from diffusers import WanTransformer3DModel

    plain = model_of(RECAM.model_copy(update={"source": "none", "camera": "none", "rope_layout": "shared"}))
    save_pretrained(plain, tmp_path / "stock")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "stock")
    state = plain.state_dict()
    assert all(torch.equal(stock.state_dict()[diffusers_name(name)], state[name]) for name in state)


def test_shards_are_one_file(tmp_path: Path) -> None:
    model = model_of(RECAM)
    names = sorted(model.state_dict())
    for index, part in enumerate((names[:20], names[20:])):
        state = {name: model.state_dict()[name] for name in part}
        save_file(state, tmp_path / f"diffusion_pytorch_model-0000{index + 1}-of-00002.safetensors")
    assert same(load(RECAM, tmp_path)[0], model)


@torch.no_grad()
def apply_lora(model: RetakeDiT, factors: dict[str, torch.Tensor]) -> None:
    """Add ``B A`` of every pair to the matrices of ``model`` in place."""
    parameters = dict(model.named_parameters())
    for stem in {name.rsplit(".lora_", 1)[0] for name in factors}:
        down, up = factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"]
        parameters[stem.removeprefix(PREFIX) + ".weight"] += up @ down


def test_lora_at_full_rank_is_exact_and_residual_is_the_tail_of_the_spectrum(tmp_path: Path) -> None:
    base, tuned = model_of(DELTA, 0), model_of(DELTA, 0)
    torch.manual_seed(4)
    expected_tail = expected_whole = 0.0
    for block in tuned.blocks:
        for part in ("q", "k", "v", "o"):
            weight = getattr(block.self_attn, part).weight
            change = torch.randn(48, 48)
            weight.data += change
            energy = torch.linalg.svdvals(change.double()).square()
            expected_tail, expected_whole = (
                expected_tail + float(energy[8:].sum()),
                expected_whole + float(energy.sum()),
            )
    report = export_lora(base, tuned, tmp_path / "lora.safetensors", 8, torch.float32)
    # The change is formed as a float32 difference of values of size 1: relative error about 1e-7.
    assert report.residual == pytest.approx((expected_tail / expected_whole) ** 0.5, rel=1e-5)
    assert report.omitted == 0 and len(report.tensors) == 2 * 4 * 2
    full = export_lora(base, tuned, tmp_path / "full.safetensors", 48, torch.float32)
    assert full.residual < 1e-6
    apply_lora(base, load_file(tmp_path / "full.safetensors"))
    for (name, a), b in zip(base.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0, msg=name)  # float32 SVD of 48 x 48


def test_peak_memory_of_a_load_stays_near_the_file_size(tmp_path: Path) -> None:
    """Counter and resident memory of a 60 MB file; the process before loading is subtracted."""
    config = RECAM.model_copy(update={"dim": 384, "heads": 12, "layers": 5, "ffn_dim": 1536})
    save_file(model_of(config).state_dict(), tmp_path / "big.safetensors")
    size = (tmp_path / "big.safetensors").stat().st_size
    assert size > 50e6
    report = load(config, tmp_path / "big.safetensors")[1]
    assert report.file_bytes <= size and report.peak_bytes < 1.3 * size
    code = f"""
import resource, torch
from pathlib import Path
from geoalign.config.model import ModelConfig
from geoalign.models.checkpoint import complete_weights, load_dit
from geoalign.files.weights import TensorFile
config = ModelConfig.model_validate_json({config.model_dump_json()!r})
from geoalign.models.layouts import model_shapes; model_shapes(config)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_dit(config, [complete_weights(config, TensorFile(Path({str(tmp_path / "big.safetensors")!r})))])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    # Mapped file pages count as resident although the kernel can drop them, hence one tensor file on top at most.
    assert float(done.stdout) < 1.3 * size


def test_policy_file_and_delta_open(tmp_path: Path) -> None:
    model = model_of(RECAM)
    save_pretrained(model, tmp_path / "model")
    write_delta(model_of(RECAM, 7), tmp_path / "trained.safetensors")
    opened, _ = describe(tmp_path / "model", tmp_path / "trained.safetensors").network()
    other = model_of(RECAM, 7).state_dict()
    for name, value in opened.state_dict().items():
        assert torch.equal(value, other[name] if "self_attn" in name else model.state_dict()[name])
    with pytest.raises(CheckpointError, match="no such model"):
        describe(tmp_path / "absent")


def test_export_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(model_of(RECAM), tmp_path / "model", torch.bfloat16)
    out = tmp_path / "full.ckpt"
    assert main(["export", "--format", "recammaster", "--model", str(tmp_path / "model"), "--out", str(out)]) == 0
    assert "every bit kept" in capsys.readouterr().out
    assert set(TensorFile(out).dtypes.values()) == {"bfloat16"}
    assert (tmp_path / "full.ckpt.manifest.json").is_file()
    lora = ["export", "--format", "lora", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.safetensors")]
    assert main([*lora, "--rank", "0"]) == 2
    capsys.readouterr()
    assert main([*lora, "--rank", "4"]) == 1  # nothing was trained: factors of zeros help nobody
    assert "no matrix of the self-attention differs" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    write_delta(model_of(RECAM, 7), tmp_path / "trained.safetensors")
    assert main([*lora, "--rank", "4", "--checkpoint", str(tmp_path / "trained.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "lossy" in text and "factors in float32" in text and "every bit kept" not in text
    assert main(["model", "fingerprint", str(tmp_path / "model"), "--json", "-"]) == 0
    assert main(["model", "fingerprint", str(tmp_path / "nothing.pth")]) == 1
    assert manifest({"a": torch.ones(2)})["entries"] == {"a": "float32 [2]"}
