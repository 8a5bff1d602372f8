"""The published settings, step by step in plain torch; exported weights make the videos of the original ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmark_cases import SIZE, random_policy
from safetensors.torch import load_file, save_file

from geoalign.cli.main import main
from geoalign.data.video import read_video, write_video
from geoalign.errors import UsageError
from geoalign.geometry.presets import preset
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models.layouts import is_self_attention
from geoalign.policy.formats import WEIGHTS_FILE, save_pretrained
from geoalign.policy.open import describe
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.published import published_noise, published_retake, truncated
from geoalign.types import RetakeBatch, SourceClip

FRAMES = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_policy(tmp_path_factory.mktemp("published") / "base")


def condition() -> RetakeBatch:
    camera = CameraTrajectory.stack([CameraTrajectory.identity(FRAMES)])
    video = torch.rand(1, FRAMES, 3, *SIZE, generator=torch.Generator().manual_seed(4)) * 2 - 1
    clip = SourceClip(video, camera, None, ("clip",))
    return RetakeBatch(clip, CameraTrajectory.stack([preset("zoom_in", FRAMES)]), ("",))


def test_a_published_retake_is_fifty_euler_steps_in_bfloat16_from_torchs_noise(base: Path) -> None:
    policy = describe(base).policy(dtype=torch.bfloat16, codec_dtype=torch.bfloat16)
    batch = condition()
    torch.manual_seed(99)  # the noise must not depend on the global generator
    with torch.no_grad():
        ready = policy.precompute(policy.condition(batch))
        sigmas = torch.linspace(1, 0, 51)[:-1]
        sigmas = 5 * sigmas / (1 + 4 * sigmas)
        x = torch.randn((1, *policy.latent_shape(batch)), generator=torch.Generator().manual_seed(0)).bfloat16()
        assert torch.equal(x, published_noise(policy.latent_shape(batch)))
        for step, sigma in enumerate(sigmas):
            following = sigmas[step + 1] if step < 49 else torch.zeros(())
            velocity = policy.velocity(x.float(), 1000 * sigma[None].double(), ready).value.bfloat16()
            x = x + velocity * (following - sigma)
        wanted = policy.decode(x.float(), batch.source.video)
    passes: list[int] = []
    made = published_retake(policy, batch, on_pass=passes.append)
    assert passes == [1] * 50
    # float32 sigmas here, float64 there: a product that lies on the border of two bfloat16 numbers may fall either way,
    # which is one spacing, 2^-8 of a value of about 1, in few of the latents.
    assert (made - wanted).abs().mean() < 2e-3 and (made - wanted).abs().max() < 0.1


def test_levels_are_cut_off_not_rounded() -> None:
    video = torch.tensor([-1.0, -0.9999, 0.0, 0.999, 1.0, 1.5]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert truncated(video)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_exported_weights_make_the_videos_of_the_original_ones(base: Path, tmp_path: Path) -> None:
    """Base and delta, against one exported folder of both, and against the delta that was exported anew."""
    files = describe(base)
    weights = files.network(dtype=None)[0].state_dict()
    trained = {name: (value.float() + 0.02).bfloat16() for name, value in weights.items() if is_self_attention(name)}
    save_file(trained, tmp_path / "delta.safetensors")
    command = [
        "export",
        "--model",
        str(base),
        "--checkpoint",
        str(tmp_path / "delta.safetensors"),
        "--dtype",
        "bfloat16",
    ]
    assert main([*command, "--format", "redirector", "--out", str(tmp_path / "again.safetensors")]) == 0
    assert main([*command, "--format", "diffusers", "--out", str(tmp_path / "whole")]) == 0
    (tmp_path / "whole" / "vae").symlink_to(base / "vae")
    batch, videos = condition(), []
    for model, delta in ((base, "delta.safetensors"), (base, "again.safetensors"), (tmp_path / "whole", None)):
        opened = describe(model, None if delta is None else tmp_path / delta)
        policy = opened.policy(dtype=torch.bfloat16, codec_dtype=torch.bfloat16)
        assert isinstance(policy, RetakePolicy)
        videos.append(published_retake(policy, batch))
    assert torch.equal(videos[0], videos[1]) and torch.equal(videos[0], videos[2])
    plain = files.policy(dtype=torch.bfloat16, codec_dtype=torch.bfloat16)
    assert not torch.equal(published_retake(plain, batch), videos[0])


def test_sample_writes_a_published_retake(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "clip.mp4", condition().source.video[0], 12, lossless=True)
    common = ["sample", "--model", str(base), "--video", str(tmp_path / "clip.mp4"), "--trajectory", "zoom_in"]
    common += ["--size", f"{SIZE[0]}x{SIZE[1]}", "--out", str(tmp_path / "out.mp4"), "--settings", "published"]
    assert main(common) == 0
    assert "50 forwards" in capsys.readouterr().out
    assert read_video(tmp_path / "out.mp4").shape == (FRAMES, 3, *SIZE)
    assert main([*common, "--steps", "25"]) == UsageError.exit_code
    assert "--settings published has its own --steps" in capsys.readouterr().err


def test_who_finds_an_exported_folder_finds_its_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two left a folder without one, and the next run refused the folder."""
    model, listing, renamed = describe("builtin:tiny_base").network()[0], tmp_path / "f.manifest.json", []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        renamed.append((target, listing.exists()))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    save_pretrained(model, tmp_path / "f", listing=listing)
    assert renamed == [(tmp_path / "f", True)]
    assert json.loads(listing.read_text())["tensors"] == len(load_file(tmp_path / "f" / WEIGHTS_FILE))
