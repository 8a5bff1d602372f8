"""VideoAlign (visual quality, motion quality, text alignment) and HPSv3 (human preference of frames) as rewards."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geoalign.config.published import HPSV3, VIDEOALIGN
from geoalign.errors import UsageError
from geoalign.frozen.arena import ScorerMemory
from geoalign.frozen.device import named_device
from geoalign.frozen.frames import SharedFrames, Shown
from geoalign.frozen.graphed import GraphedScorer
from geoalign.frozen.precision import exactly
from geoalign.frozen.qwen_patches import fit_size, sample_frames, to_uint8
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.vlm import prompts, templates
from geoalign.rewards.vlm.body import RewardQwen, hpsv3_head, text_table, videoalign_head, vision_table
from geoalign.rewards.vlm.checkpoint import (
    PEFT_PREFIX,
    fold_lora,
    load_scorer,
    read_tensors,
    strip_prefix,
)
from geoalign.rewards.vlm.layout import HPSV3_BODY, VIDEOALIGN_BODY, QwenLayout
from geoalign.rewards.vlm.prompts import Encode, TokenPlan
from geoalign.types import RetakeBatch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DType = Literal["bfloat16", "float32"]
CaptionPolicy = Literal["constant", "prompt"]

# Mean and standard deviation of the raw outputs (inference_config of the released model_config.json): logging units.
VIDEOALIGN_STATISTICS = {"vq": (3.6757, 2.2476), "mq": (1.1646, 1.3811), "ta": (2.8105, 2.5121)}
_VIDEOALIGN_TOKENS = {"vq": prompts.VQ, "mq": prompts.MQ, "ta": prompts.TA}
# Key names of the paper; text alignment is not in the paper.
_VIDEOALIGN_KEYS = {"vq": "vis", "mq": "mot", "ta": "align"}
_VIDEOALIGN_AREA = (128 * 28 * 28, 256 * 28 * 28)
_HPSV3_AREA = (256 * 28 * 28, 256 * 28 * 28)
_LORA_SCALE = 2.0  # alpha 128 / rank 64
_CAPTION_SLOT = "{text_prompt}"
# Captioned prompts are padded to a multiple of this many tokens, so that few graphs serve all captions.
_BUCKET = 32
_FPS = 16.0  # of Wan's videos
_MOST_BODIES = 4


class StaticBody(nn.Module):
    """The captured part: patches and tokens in, raw head outputs out. Static shapes, no host reads.

    Args:
        grid: rows and columns of patches in one temporal slice.
        length, visual_index: tokens of the prompt, and which of them are visual.
    """

    def __init__(self, network: RewardQwen, grid: tuple[int, int], length: int, visual_index: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        tables = (*vision_table(grid, network.layout), *text_table(length, network.layout))
        for name, table in zip(("vision_cos", "vision_sin", "text_cos", "text_sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("visual_index", torch.tensor(visual_index), persistent=False)

    def forward(self, patches: Tensor, ids: Tensor, pool_index: Tensor) -> dict[str, Tensor]:
        """``patches`` ``[B, slices, S, patch_values]``, ``ids`` int64 ``[B, L]``, ``pool_index`` int64 ``[B, K]`` to
        ``raw`` ``[B, K, outputs]`` float32."""
        vision, text = (self.vision_cos, self.vision_sin), (self.text_cos, self.text_sin)
        return {"raw": self.network(patches, ids, self.visual_index, pool_index, vision, text)}


class _Runner:
    """Runs patches with their token plans in chunks; one static body per (patch grid, length, placeholder) key.

    The ``_MOST_BODIES`` that were used last are kept, with their graphs.
    """

    def __init__(self, network: RewardQwen, chunk: int, graphs: bool, memory: ScorerMemory | None) -> None:
        if chunk < 1:
            raise UsageError(f"at least one video or frame must run at a time, got {chunk}")
        self.network, self.chunk, self.graphs = network, chunk, graphs
        self._memory = memory or ScorerMemory()
        self._before = self._memory.enter(network)
        self._bodies: OrderedDict[tuple[tuple[int, int], int, tuple[int, ...]], GraphedScorer] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.network.model.norm.weight.device

    def visual_tokens(self, patches: Tensor) -> int:
        """Visual tokens that the text model sees of each row of ``patches`` ``[N, slices, S, patch_values]``."""
        return patches.shape[1] * patches.shape[2] // self.network.layout.merge**2

    def __call__(self, patches: Tensor, size: tuple[int, int], plans: Sequence[TokenPlan]) -> Tensor:
        """``patches`` ``[N, slices, S, patch_values]`` of images of ``size`` pixels and N plans of one length to
        ``[N, K, outputs]`` float32."""
        rows = self.network.layout.rows
        if (largest := max(max(plan.ids) for plan in plans)) >= rows:  # on a GPU it would end the process
            raise UsageError(f"the tokenizer gives token {largest}, but the weights know {rows}: use the scorer's own")
        ids = torch.tensor([plan.ids for plan in plans], device=self.device)
        pool = torch.tensor([plan.pool_index for plan in plans], device=self.device)
        self._before()
        run = self._runner(size, plans[0])
        parts = zip(patches.split(self.chunk), ids.split(self.chunk), pool.split(self.chunk), strict=True)
        return torch.cat([run(part.to(self.device), *rest)["raw"] for part, *rest in parts])

    def _runner(self, size: tuple[int, int], plan: TokenPlan) -> Callable[..., dict[str, Tensor]]:
        grid = (size[0] // self.network.layout.patch, size[1] // self.network.layout.patch)
        key = (grid, len(plan.ids), plan.visual_index)
        if key not in self._bodies:
            if len(self._bodies) == _MOST_BODIES:
                self._bodies.popitem(last=False)[1].clear()
            body = StaticBody(self.network, grid, len(plan.ids), plan.visual_index).to(self.device)
            self._bodies[key] = GraphedScorer(exactly(body), body, self._memory.capture)
        self._bodies.move_to_end(key)
        scorer = self._bodies[key]
        return scorer if self.graphs else scorer.body


def _fit(network: RewardQwen, area: tuple[int, int]) -> Callable[[int, int], tuple[int, int]]:
    return partial(fit_size, factor=network.layout.factor, min_pixels=area[0], max_pixels=area[1])


class VideoAlignReward:
    """VideoAlign (arXiv 2501.13918): ``vis`` and ``mot`` read the video alone, ``align`` also the prompt.

    Scores are (raw - mean) / std of the release; inside a GRPO group that constant cancels.

    Args:
        network: loaded weights.
        encode: the release's tokenizer.
        template: the release's prompt, with the slot for the caption.
        clip_fps: frame rate the clip is said to have. It decides how many frames are seen, so it changes scores. None:
            the video's own where that is known (``RetakeBatch.fps``), 16 elsewhere.
        text_alignment: also emit ``align``; the prompt then becomes longer and depends on the caption.
        greyscale_motion: show the motion score a grey video (some recipes do); costs a second pass.
        videos_per_forward: bounds the activation memory.
        graphs: replay CUDA graphs on CUDA devices.
        memory: what it shares with other scorers; None: a graph pool of its own, and weights that stay.
        frames: where the inputs of all scorers of a run are made; None makes those of this one alone.
    """

    name = "videoalign"

    def __init__(
        self,
        network: RewardQwen,
        encode: Encode,
        template: str,
        *,
        clip_fps: float | None = None,
        text_alignment: bool = False,
        greyscale_motion: bool = False,
        videos_per_forward: int = 4,
        graphs: bool = True,
        memory: ScorerMemory | None = None,
        frames: SharedFrames | None = None,
    ) -> None:
        self.parts = ("vq", "mq", "ta") if text_alignment else ("vq", "mq")
        self.keys = tuple(_VIDEOALIGN_KEYS[part] for part in self.parts)
        if clip_fps is not None and not 0 < clip_fps < math.inf:
            raise UsageError(f"clip_fps must be positive, got {clip_fps}")
        self.encode, self.template, self.clip_fps = encode, template, clip_fps
        self._fps = clip_fps or _FPS  # of the batch at hand
        self._run = _Runner(network, videos_per_forward, graphs, memory)
        fit = _fit(network, _VIDEOALIGN_AREA)
        self._view = (frames or SharedFrames()).clip(lambda count: sample_frames(count, self._fps), fit)
        # The grey video is another video, of the chosen frames alone.
        self._grey_view = SharedFrames().clip(range, fit) if greyscale_motion else None

    @torch.no_grad()
    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]`` in [-1, 1]; a video with a non-finite pixel is invalid."""
        self._fps = self.clip_fps or batch.fps or _FPS
        shown = self._view(videos)
        plans = self._plans(shown, batch.prompts)
        raw = self._run(shown.inputs, shown.size, plans)[..., 0]
        if self._grey_view is not None:
            motion = self.parts.index("mq")
            grey = self._grey_view(_grey(videos[:, list(shown.frames)]))
            raw[:, motion] = self._run(grey.inputs, grey.size, plans)[:, motion, 0]
        raw = raw.to(videos.device)
        scores, parts = {}, {}
        for column, (part, key) in enumerate(zip(self.parts, self.keys, strict=True)):
            mean, std = VIDEOALIGN_STATISTICS[part]
            scores[key], parts[f"{part}_raw"] = (raw[:, column] - mean) / std, raw[:, column]
        return RewardOutput(scores, shown.finite & torch.isfinite(raw).all(dim=1), parts)

    def _plans(self, shown: Shown, captions: Sequence[str]) -> list[TokenPlan]:
        tokens = self._run.visual_tokens(shown.inputs)
        reads = [_VIDEOALIGN_TOKENS[part] for part in self.parts]

        def plan(caption: str) -> TokenPlan:
            text = self.template.replace(_CAPTION_SLOT, caption)
            return prompts.plan_tokens(self.encode, text, pad=prompts.VIDEO_PAD, visual_tokens=tokens, reads=reads)

        if "ta" not in self.parts:
            return [plan("")] * len(captions)  # the prompt is cut before the caption
        return _bucketed([plan(caption) for caption in captions])


class Hpsv3Reward:
    """HPSv3 (arXiv 2508.03789): human preference of single frames, aggregated over the video as ``hps``.

    Args:
        network, encode: loaded weights and tokenizer.
        instruction, suffix: the release's prompt around the caption, and its end with the reward token.
        frame_stride: score frames 0, s, 2s, ...; 1 scores all frames. Every frame costs a full pass of the 7B model.
        caption_policy: "constant" judges looks alone and gives one static prompt; "prompt" uses each retake's prompt.
        caption: the constant caption.
        best_share: mean over this share of the best frames; 1 is the plain mean.
        frames_per_forward: bounds the activation memory.
        graphs: replay CUDA graphs on CUDA devices.
        memory: what it shares with other scorers; None: a graph pool of its own, and weights that stay.
        frames: where the inputs of all scorers of a run are made; None makes those of this one alone.
    """

    name = "hpsv3"
    keys = ("hps",)

    def __init__(
        self,
        network: RewardQwen,
        encode: Encode,
        instruction: str,
        suffix: str,
        *,
        frame_stride: int = 1,
        caption_policy: CaptionPolicy = "constant",
        caption: str = "A high-quality image.",
        best_share: float = 1.0,
        frames_per_forward: int = 8,
        graphs: bool = True,
        memory: ScorerMemory | None = None,
        frames: SharedFrames | None = None,
    ) -> None:
        if frame_stride < 1 or not 0 < best_share <= 1 or caption_policy not in ("constant", "prompt"):
            raise UsageError(
                "frame_stride must be at least 1, best_share in (0, 1] and caption_policy constant or prompt; got "
                f"{frame_stride}, {best_share}, {caption_policy}"
            )
        self.encode, self.instruction, self.suffix = encode, instruction, suffix
        self.frame_stride, self.best_share = frame_stride, best_share
        self.caption_policy, self.caption = caption_policy, caption
        self._run = _Runner(network, frames_per_forward, graphs, memory)
        self._view = (frames or SharedFrames()).still(
            lambda count: range(0, count, self.frame_stride), _fit(network, _HPSV3_AREA)
        )

    @torch.no_grad()
    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]`` in [-1, 1]; a video with a non-finite pixel is invalid."""
        shown = self._view(videos)
        count, frames = shown.inputs.shape[:2]
        patches = shown.inputs.flatten(0, 1)[:, None]
        tokens = self._run.visual_tokens(patches)
        if self.caption_policy == "prompt":
            plans = _bucketed([self._plan(caption, tokens) for caption in batch.prompts])
        else:
            plans = [self._plan(self.caption, tokens)] * count
        raw = self._run(patches, shown.size, [plan for plan in plans for _ in range(frames)])
        mean, log_std = raw[:, 0].to(videos.device).view(count, frames, 2).unbind(dim=-1)
        kept = max(1, round(self.best_share * frames))
        score = mean.topk(kept, dim=1).values.mean(dim=1) if kept < frames else mean.mean(dim=1)
        parts = {"hps_worst_frame": mean.amin(dim=1), "hps_sigma": log_std.exp().mean(dim=1)}
        return RewardOutput({"hps": score}, shown.finite & torch.isfinite(mean).all(dim=1), parts)

    def _plan(self, caption: str, tokens: int) -> TokenPlan:
        text = self.instruction.replace(_CAPTION_SLOT, caption) + self.suffix
        reads = [prompts.REWARD]
        return prompts.plan_tokens(self.encode, text, pad=prompts.IMAGE_PAD, visual_tokens=tokens, reads=reads)


def _bucketed(plans: list[TokenPlan]) -> list[TokenPlan]:
    """Right-pad to the longest, rounded up to a bucket."""
    length = -(-max(len(plan.ids) for plan in plans) // _BUCKET) * _BUCKET
    return [plan.padded(length) for plan in plans]


def _grey(frames: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of the 8-bit levels of ``[..., 3, H, W]`` in [-1, 1], as uint8 in all three channels."""
    levels = to_uint8(torch.nan_to_num(frames))
    weights = torch.tensor([0.299, 0.587, 0.114], device=levels.device).view(3, 1, 1)
    luma = (levels.float() * weights).sum(dim=-3, keepdim=True).round().to(torch.uint8)
    return luma.expand_as(levels).contiguous()


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _with_options_of(reward: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a builder that takes ``**options`` for ``reward`` show them in its signature, which the registry reads."""

    def decorate(build: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(build).parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = [p for p in inspect.signature(reward).parameters.values() if p.kind is p.KEYWORD_ONLY]
        build.__dict__["__signature__"] = inspect.Signature([*own, *taken])
        build.__annotations__ = {p.name: p.annotation for p in (*own, *taken)}
        return build

    return decorate


def _load(
    layout: QwenLayout,
    head: Callable[[QwenLayout], nn.Module],
    state: Mapping[str, Tensor],
    checkpoint: str,
    device: torch.device,
    dtype: torch.dtype,
) -> RewardQwen:
    return load_scorer(layout, head, state, source=checkpoint, device=device, matrix_dtype=dtype)


@_with_options_of(VideoAlignReward)
def build_videoalign(
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    template_folder: str | None = None,
    device: str = "auto",
    dtype: DType = "bfloat16",
    **options: Any,
) -> VideoAlignReward:
    """Build VideoAlign from configuration values; ``options`` are those of :class:`VideoAlignReward`.

    Args:
        checkpoint: the release's ``model.pth``.
        tokenizer: its tokenizer folder; by default ``tokenizer`` beside the checkpoint.
        template_folder: where ``geoalign doctor --fetch-rewards`` put the prompt; None takes the default place.
        device: "auto" takes CUDA where there is one.

    Raises:
        RewardError: weights, tokenizer or prompt are missing (the message holds the command to get them).
        CheckpointError: the weights are not the published ones.
    """
    where = named_device(device), _dtype(dtype)
    template = templates.load("videoalign", template_folder)
    state = fold_lora(strip_prefix(read_tensors(checkpoint, VIDEOALIGN.line()), PEFT_PREFIX), _LORA_SCALE)
    network = _load(VIDEOALIGN_BODY, videoalign_head, state, checkpoint, *where)
    folder = tokenizer or str(Path(checkpoint).expanduser().parent / "tokenizer")
    encode = prompts.load_encoder(folder, (prompts.VQ, prompts.MQ, prompts.TA))
    return VideoAlignReward(network, encode, template, **options)


@_with_options_of(Hpsv3Reward)
def build_hpsv3(
    checkpoint: str,
    *,
    tokenizer: str,
    template_folder: str | None = None,
    device: str = "auto",
    dtype: DType = "bfloat16",
    **options: Any,
) -> Hpsv3Reward:
    """Build HPSv3 from configuration values; ``options`` are those of :class:`Hpsv3Reward`.

    Args:
        checkpoint: the release's ``HPSv3.safetensors``.
        tokenizer: folder with the tokenizer files of Qwen/Qwen2-VL-7B-Instruct.
        template_folder: where ``geoalign doctor --fetch-rewards`` put the prompt; None takes the default place.
        device: "auto" takes CUDA where there is one.

    Raises:
        RewardError: weights, tokenizer or prompt are missing (the message holds the command to get them).
        CheckpointError: the weights are not the published ones.
    """
    where = named_device(device), _dtype(dtype)
    instruction, suffix = (templates.load(f"hpsv3_{part}", template_folder) for part in ("instruction", "suffix"))
    state = read_tensors(checkpoint, HPSV3.line())
    network = _load(HPSV3_BODY, hpsv3_head, state, checkpoint, *where)
    return Hpsv3Reward(network, prompts.load_encoder(tokenizer, (prompts.REWARD,)), instruction, suffix, **options)
