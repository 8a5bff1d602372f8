"""VideoAlign and HPSv3 from files on disk to scores, against stock transformers on the same files.

Weights are random and tiny, but lie in the published layouts (tests/support/tiny_vlm.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_vlm import (
    IMAGE_ID,
    OWN,
    TEXTS,
    VIDEO_ID,
    make_small,
    write_hpsv3,
    write_templates,
    write_videoalign,
)
from torch import Tensor

from geoalign.config.rewards import RewardConfig
from geoalign.errors import CheckpointError, RewardError, UsageError
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import Reward
from geoalign.rewards.registry import build_rewards
from geoalign.rewards.vlm import scorers
from geoalign.types import RetakeBatch, SourceClip

# 448 x 448 is exactly the area that both scorers accept: nothing is resized, so pixels can be compared exactly.
SIDE, FRAMES, TOKENS = 448, 9, 256
VISIBLE = 1e-3
PROMPTS = ("a red car", "two small dogs run")


class Stock:
    """Scores by stock transformers: its tokenizer, image processor and model; no caching, cutting or batching."""

    def __init__(self, kind: str, tokenizer: Path, head: Callable[[Tensor], Tensor], model) -> None:
        from transformers import AutoTokenizer

        self.kind, self.head, self.model = kind, head, model
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if kind == "hpsv3":
            self.tokenizer.add_tokens(list(OWN[kind]), special_tokens=True)

    def read(self, frames: Tensor, text: str, tokens: tuple[str, ...]) -> Tensor:
        """``frames`` uint8 [T, 3, H, W] (one image, or a video in pairs) and the whole turn to [len(tokens), out]."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        process = Qwen2VLImageProcessorPil(min_pixels=SIDE**2, max_pixels=SIDE**2)
        images = [frame.permute(1, 2, 0).numpy() for frame in frames]
        flat = process(images=images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        slices = max(1, len(frames) // 2)
        if len(frames) > 1:  # an image fills both halves of a pair with itself; a video takes one half from each frame
            halves = flat.view(slices, 2, -1, 3, 2, 14, 14)
            flat = (
                torch.stack((halves[:, 0, ..., 0, :, :], halves[:, 1, ..., 0, :, :]), dim=-3).flatten(0, 1).flatten(1)
            )
        pad, name = ("<|video_pad|>", "videos") if self.kind == "videoalign" else ("<|image_pad|>", "images")
        turn = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"{pad * (slices * TOKENS)}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = torch.tensor([self.tokenizer(turn)["input_ids"]])
        grid = torch.tensor([[slices, SIDE // 14, SIDE // 14]])
        pixels = {"pixel_values_videos": flat, "video_grid_thw": grid}
        if name == "images":
            pixels = {"pixel_values": flat, "image_grid_thw": grid}
        types = (ids == VIDEO_ID).int() * 2 + (ids == IMAGE_ID).int()
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)  # how both scorers were trained
        hidden = self.model(input_ids=ids, position_ids=positions, mm_token_type_ids=types, **pixels).last_hidden_state
        wanted = [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]
        return self.head(torch.stack([hidden[0, ids[0].tolist().index(code)] for code in wanted]))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], Stock]]:
    """Options that point at the files of each scorer, and the stock scorer of the same files."""
    root = tmp_path_factory.mktemp("release")
    prompts = root / "prompts"
    write_templates(prompts)
    common = {"template_folder": str(prompts), "device": "cpu", "dtype": "float32"}
    file, head, model = write_videoalign(root / "videoalign")
    align = ({"checkpoint": str(file), **common}, Stock("videoalign", file.parent / "tokenizer", head, model))
    file, head, model = write_hpsv3(root / "hpsv3")
    folder = file.parent / "tokenizer"
    human = ({"checkpoint": str(file), "tokenizer": str(folder), **common}, Stock("hpsv3", folder, head, model))
    return {"videoalign": align, "hpsv3": human}


@pytest.fixture(autouse=True)
def small_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def levels() -> Tensor:
    """uint8 [2, 9, 3, 448, 448]: tinted blocks that differ between frames and videos."""
    rng = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 256, (2, FRAMES, 3, 16, 16), generator=rng) * torch.rand(
        2, FRAMES, 3, 1, 1, generator=rng
    )
    blocks = blocks.byte()
    return blocks.repeat_interleave(SIDE // 16, -1).repeat_interleave(SIDE // 16, -2)


def videos_of(levels: Tensor) -> Tensor:
    return levels.float() / 127.5 - 1


def batch_of(count: int = 2) -> RetakeBatch:
    c2w = torch.eye(4).expand(count, 2, 4, 4).contiguous()
    camera = CameraTrajectory(c2w, torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(count, 2, 4).contiguous())
    source = SourceClip(torch.zeros(count, 2, 3, 4, 4), camera, None, tuple("ab"[:count]))
    return RetakeBatch(source, camera, PROMPTS[:count])


def build(release, kind: str, **options: object) -> Reward:
    return build_rewards({"x": RewardConfig(kind=kind, options={**release[kind][0], **options})})["x"]


def close(found: Tensor, expected: Tensor) -> None:
    # float32 sums in another order on outputs of size one to seven: 1e-5 is about 80 roundings of one. What must be
    # told apart (videos, frames, captions, grey and colour) moves outputs by a hundred times that (VISIBLE, tested).
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def align_truth(stock: Stock, levels: Tensor, caption: str = "") -> Tensor:
    """Raw (vq, mq, ta) of one video: frames 0, 3, 5, 8 of 9 (2 fps of 16, at least 4, spread over the clip)."""
    text = TEXTS["videoalign"].replace("{text_prompt}", caption)
    return stock.read(levels[[0, 3, 5, 8]], text, OWN["videoalign"])[:, 0]


def test_videoalign_equals_stock_transformers(release, levels: Tensor) -> None:
    stock = release["videoalign"][1]
    out = build(release, "videoalign")(videos_of(levels), batch_of())
    truth = torch.stack([align_truth(stock, video) for video in levels])
    assert set(out.scores) == {"vis", "mot"} and out.valid.tolist() == [True, True]
    close(out.parts["vq_raw"], truth[:, 0])
    close(out.parts["mq_raw"], truth[:, 1])
    close(out.scores["vis"], (truth[:, 0] - 3.6757) / 2.2476)
    close(out.scores["mot"], (truth[:, 1] - 1.1646) / 1.3811)
    assert (truth[0] - truth[1]).abs().min() > VISIBLE  # the videos are told apart


def test_videoalign_reads_the_caption_only_for_text_alignment(release, levels: Tensor) -> None:
    stock, batch = release["videoalign"][1], batch_of()
    videos = videos_of(levels)
    out = build(release, "videoalign", text_alignment=True, videos_per_forward=1)(videos, batch)
    truth = torch.stack([align_truth(stock, *pair) for pair in zip(levels, PROMPTS, strict=True)])
    for column, part in enumerate(("vq_raw", "mq_raw", "ta_raw")):
        close(out.parts[part], truth[:, column])
    assert (truth[:, 2] - torch.stack([align_truth(stock, v) for v in levels])[:, 2]).abs().min() > VISIBLE


def test_videoalign_greyscale_changes_motion_alone(release, levels: Tensor) -> None:
    stock = release["videoalign"][1]
    out = build(release, "videoalign", greyscale_motion=True)(videos_of(levels[:1]), batch_of(1))
    red, green, blue = levels[0].double().unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round().byte()
    grey = align_truth(stock, luma[:, None].expand(-1, 3, -1, -1).contiguous())
    colour = align_truth(stock, levels[0])
    close(out.parts["vq_raw"], colour[:1])
    close(out.parts["mq_raw"], grey[1:2])
    assert (grey[1] - colour[1]).abs() > VISIBLE


def human_truth(stock: Stock, frames: Tensor, caption: str) -> Tensor:
    """[T, 2] mean and log standard deviation of single frames."""
    text = TEXTS["hpsv3_instruction"].replace("{text_prompt}", caption) + TEXTS["hpsv3_suffix"]
    return torch.cat([stock.read(frame[None], text, OWN["hpsv3"]) for frame in frames])


def test_hpsv3_equals_stock_transformers(release, levels: Tensor) -> None:
    stock = release["hpsv3"][1]
    out = build(release, "hpsv3", frame_stride=4, caption="fine", frames_per_forward=4)(videos_of(levels), batch_of())
    truth = torch.stack([human_truth(stock, video[::4], "fine") for video in levels])  # [2, 3, 2]
    close(out.scores["hps"], truth[..., 0].mean(1))
    close(out.parts["hps_worst_frame"], truth[..., 0].amin(1))
    close(out.parts["hps_sigma"], truth[..., 1].exp().mean(1))
    assert out.valid.all() and truth[..., 0].std() > VISIBLE


def test_hpsv3_with_prompts_and_the_best_share(release, levels: Tensor) -> None:
    stock = release["hpsv3"][1]
    options = {"frame_stride": 4, "caption_policy": "prompt", "best_share": 0.5}
    out = build(release, "hpsv3", **options)(videos_of(levels), batch_of())
    truth = torch.stack([human_truth(stock, v[::4], p)[:, 0] for v, p in zip(levels, PROMPTS, strict=True)])
    close(out.scores["hps"], truth.sort(dim=1, descending=True).values[:, :2].mean(1))  # round(0.5 * 3) = 2 frames
    assert (human_truth(stock, levels[0, :1], PROMPTS[0]) - human_truth(stock, levels[0, :1], "fine"))[
        0, 0
    ].abs() > VISIBLE


@pytest.mark.parametrize(("kind", "options"), [("videoalign", {}), ("hpsv3", {"frame_stride": 8})])
def test_a_nan_video_is_invalid_and_leaves_the_other_alone(release, levels: Tensor, kind: str, options) -> None:
    reward, videos = build(release, kind, **options), videos_of(levels)
    clean = reward(videos, batch_of())
    videos[1, 0, 0, 0, 0] = torch.nan
    out = reward(videos, batch_of())
    assert out.valid.tolist() == [True, False]
    for key, score in out.scores.items():
        assert torch.equal(score[:1], clean.scores[key][:1]) and torch.isfinite(score).all()


def test_bfloat16_is_the_default_and_stays_near(release, levels: Tensor) -> None:
    options = {key: value for key, value in release["videoalign"][0].items() if key != "dtype"}
    reward = build_rewards({"x": RewardConfig(kind="videoalign", options=options)})["x"]
    found = reward(videos_of(levels), batch_of()).parts["vq_raw"]
    exact = torch.stack([align_truth(release["videoalign"][1], video) for video in levels])[:, 0]
    assert reward._run.network.model.norm.weight.dtype == torch.bfloat16 and found.dtype == torch.float32
    # Two layers of eight-bit mantissas: relative errors of 2**-8 per operation on outputs of size one.
    assert 0 < (found - exact).abs().max() < 0.1


def test_what_is_missing_or_wrong_is_named(release, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="doctor --fetch-rewards"):
        build(release, "videoalign", template_folder=str(tmp_path))
    with pytest.raises(RewardError, match="hf download KlingTeam/VideoReward"):
        build(release, "videoalign", checkpoint=str(tmp_path / "model.pth"))
    with pytest.raises(RewardError, match="no tokenizer at"):
        build(release, "hpsv3", tokenizer=str(tmp_path))
    with pytest.raises(RewardError, match="splits"):
        tokens = release["hpsv3"][1].tokenizer
        scorers.prompts.plan_tokens(
            lambda text: tokens(text)["input_ids"], "<|never_added|>", pad="<|image_pad|>", visual_tokens=4,
            reads=["<|never_added|>"],
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="does not fit"):
        build(release, "hpsv3", checkpoint=_with_stranger(release["hpsv3"][0]["checkpoint"], tmp_path))
    for options in ({"frame_stride": 0}, {"best_share": 0.0}, {"caption_policy": "none"}, {"dtype": "int3"}):
        with pytest.raises(UsageError):
            build(release, "hpsv3", **options)


def _with_stranger(checkpoint: str, folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    save_file({**load_file(checkpoint), "stranger": torch.zeros(1)}, folder / "HPSv3.safetensors")
    return str(folder / "HPSv3.safetensors")
