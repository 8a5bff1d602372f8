"""Settings of the conditions: source clips, target camera paths, their rescaling and the preparation cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from geoalign.config.base import Section

_OPEN = "the paper prints no numbers for its truncated Gaussians"


def _assumed(why: str) -> dict[str, Any]:
    return {"paper": "assumed", "why": why}


class TruncatedGaussian(Section):
    """A Gaussian cut to [low, high]; ``std == 0`` means the constant ``mean`` (clipped to the bounds)."""

    mean: float
    """Mean before truncation."""
    std: float = Field(ge=0)
    """Standard deviation before truncation."""
    low: float = Field(gt=0)
    """Lower bound."""
    high: float = Field(gt=0)
    """Upper bound."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got [{self.low}, {self.high}]")
        return self


class RescaleConfig(Section):
    """Truncated-Gaussian rescale of target paths (paper eq. 8 to 14) and its guards."""

    scale_mode: Literal["truncated_gaussian", "metric", "metric_then_clip"] = Field(
        "truncated_gaussian", json_schema_extra={"paper": "published", "why": "eq. 8 to 14"}
    )
    """``truncated_gaussian``: peak speeds are drawn; ``metric``: keep the metric scale of the archive;
    ``metric_then_clip``: keep it, but bring peak speeds into the bounds."""
    mode: Literal["paper", "unwrapped", "egocentric"] = Field(
        "unwrapped",
        json_schema_extra=_assumed("read literally, eq. 14 jumps where a rotation passes 180 degrees"),
    )
    """``paper``: eq. 14 literally; ``unwrapped``: rotation logs unwrapped along the path, then fixed-point passes;
    ``egocentric``: frame-to-frame increments scaled, motion stays aligned with the view."""
    play_fps: float = Field(16.0, gt=0, json_schema_extra=_assumed("Wan videos play at 16 frames a second"))
    """Frame rate at which speeds per second become speeds per frame."""
    translation: TruncatedGaussian = Field(
        TruncatedGaussian(mean=1.0, std=0.4, low=0.2, high=1.6), json_schema_extra=_assumed(_OPEN)
    )
    """Peak translation speed in metres per second."""
    rotation: TruncatedGaussian = Field(
        TruncatedGaussian(mean=12.0, std=6.0, low=2.0, high=30.0), json_schema_extra=_assumed(_OPEN)
    )
    """Peak rotation speed in degrees per second."""
    static_rotation_deg: float = Field(0.02, ge=0, json_schema_extra=_assumed("jitter must not be amplified"))
    """Up to this peak rotation (degrees per frame) the rotation is kept as it is; 0: of a path that never turns."""
    max_rotation_scale: float = Field(4.0, gt=0, json_schema_extra=_assumed("jitter must not be amplified"))
    """Largest factor that a rotation may be amplified by."""
    max_outlier_ratio: float = Field(8.0, gt=1, json_schema_extra=_assumed("one bad pose would freeze the rest"))
    """Paths whose peak speed exceeds this multiple of the median speed are rejected."""
    max_step_deg: float = Field(20.0, gt=0, json_schema_extra=_assumed("a raw step above this is a pose error"))
    """Paths with a raw frame-to-frame rotation above this are rejected."""
    max_yaw_deg: float = Field(75.0, gt=0, json_schema_extra=_assumed("arc limit of the base model's training"))
    """Rescaled paths with a total yaw span above this are rejected."""
    max_path_m: float = Field(6.0, gt=0, json_schema_extra=_assumed("keeps the camera in the mapped scene"))
    """Rescaled paths longer than this are rejected."""


class ClipsConfig(Section):
    """Where conditioning clips come from and how they are cut."""

    path: Path = Path("clips")
    """Folder of the clips, relative to ``data.root`` unless absolute."""
    metadata: Path | None = None
    """csv or jsonl table, relative to ``path`` unless absolute; default: ``metadata.csv`` or ``metadata.jsonl`` in
    ``path``, else the only csv there (several are an error), else none."""
    layout: Literal["auto", "videos", "frames", "davis"] = "auto"
    """``videos``: video files with an optional table (Sekai, OmniWorld-CityWalk, any folder of mp4);
    ``frames``: one folder of images per clip; ``davis``: a DAVIS folder; ``auto``: decided by what lies on disk."""
    stride: int = Field(2, ge=1, json_schema_extra=_assumed("every second frame of 30 fps is the base model's 15 fps"))
    """Source frames from one frame of a window to the next."""
    reader: Literal["pyav", "dali"] = "pyav"
    """``pyav``: CPU, every container; ``dali``: NVDEC on the rank's GPU, or the DALI CPU decoder (VP8, VP9, MJPEG)."""
    camera: Literal["file", "file_any_scale", "none"] = "file"
    """Source cameras: ``file``: the clip's metric camera file (or the cache); ``file_any_scale``: accept scale-free
    files too; ``none``: a static pinhole of ``default_focal``."""
    default_focal: float = Field(0.9, gt=0)
    """Focal length over frame width when ``camera`` is ``none``."""
    caption: Literal["clean", "verbatim", "blip2", "constant"] = Field(
        "clean", json_schema_extra=_assumed("the paper does not name its caption source")
    )
    """``clean``: the table's caption without sentences about camera motion; ``verbatim``: as it is; ``blip2``: the
    caption generated while preparing (an encoder without a captioner is an error); ``constant``: ``caption_text``."""
    caption_text: str = ""
    """The prompt of ``caption: constant``, and of clips without a caption."""
    val_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of source videos (not clips) kept out of training, by a hash of the video id."""
    max_bad_fraction: float = Field(0.2, ge=0, le=1)
    """A run stops when more than this share of listed clips cannot be used."""
    keep_decoded_mb: int = Field(512, ge=0)
    """Decoded windows kept in memory per process, in MiB."""


class TrajectoriesConfig(Section):
    """Where target camera paths come from."""

    path: Path = Path("trajectories")
    """Folder or file of camera paths, or ``FILE#CAMERA`` for one of several in a file, relative to ``data.root`` unless
    absolute."""
    layout: Literal["auto", "omniworld", "multicam", "files"] = "auto"
    """``omniworld``: ``*_others.tar.gz`` or unpacked scenes; ``multicam``: a MultiCamVideo ``camera_extrinsics.json``;
    ``files``: camera files of every known format (docs/data.md); ``auto``: decided by what lies on disk."""
    metadata: Path | None = None
    """OmniWorld csv with ``UID`` and ``Test Split Index`` or ``Metric Scale``; default: the csv with these columns in
    ``path`` or its folder ``metadata`` (several are an error), else none."""
    window_step: int = Field(40, ge=1)
    """Frames between window starts where the archive lists no windows of its own (OmniWorld's captions use 40)."""
    max_reprojection_error: float = Field(50.0, gt=0)
    """Splits whose refined reprojection error exceeds this are rejected."""
    skip_scenes: tuple[str, ...] = ("05017c153ac9", "05346c2f4648")
    """Scene ids that are known to be broken."""
    val_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of tracks kept out of training, by a hash of their name, where the archive names no test splits."""
    intrinsics: Literal["source", "trajectory"] = Field(
        "source", json_schema_extra=_assumed("the base model uses the source camera's intrinsics for the target")
    )
    """Intrinsics of the target camera: those of the source clip's first frame, or those of the path."""
    rescale: RescaleConfig = RescaleConfig()
    """How raw paths become target paths."""


DEFAULT_NEGATIVE_PROMPT = "blurry, low quality, distorted, jittery, watermark, text"
"""Our own wording of what a video should not look like."""


class PrepareConfig(Section):
    """What ``geoalign prepare`` writes."""

    windows_per_clip: int = Field(1, ge=1)
    """Windows encoded of each clip, evenly spaced."""
    clips_per_shard: int = Field(64, ge=1)
    """Encoded windows of one safetensors shard."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of stored latents and embeddings, and of the text and image encoders while they run."""
    codec: Path | None = None
    """VAE that encodes the clips: ``Wan2.1_VAE.pth`` or a diffusers ``vae`` folder; default: the codec of
    ``train.base``, which it must equal in training."""
    text: Path | None = None
    """umT5 encoder: ``models_t5_umt5-xxl-enc-bf16.pth`` or a transformers folder; None stores no text embedding."""
    tokenizer: Path | None = None
    """Tokenizer folder of ``text``; default: the same folder."""
    negative_prompt: str | None = None
    """Text of the second pass of ``flow.guidance``, ``default`` for ours; None stores no embedding of it."""
    text_length: int = Field(512, gt=0)
    """Tokens that prompts are cut to (``model.text_length`` of the policy)."""
    image: Path | None = None
    """CLIP vision encoder: the open-clip ``.pth`` of Wan2.1 or a transformers folder; None stores no image tokens."""
    captioner: Path | None = None
    """BLIP-2 folder; needed by ``clips.caption=blip2``."""
    evaluator: str | None = None
    """Pose evaluator that estimates the source camera of clips without a metric camera file (``mapanything``). Frames
    are taken to have the focal length ``clips.default_focal``."""
    evaluator_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword options of ``evaluator`` (for ``mapanything``: ``checkpoint``)."""


class DataConfig(Section):
    """Conditions of training: a source clip, a prompt and a target camera path each."""

    root: Path = Path("data/world")
    """Folder of clips and trajectories; the embedded presets render missing data into it."""
    cache: Path = Path("data/cache")
    """Folder of the shards that ``geoalign prepare`` writes."""
    use_cache: bool = False
    """Read prepared conditions from ``cache`` (run ``geoalign prepare`` first) instead of encoding in the loop."""
    num_frames: int = Field(81, ge=2, json_schema_extra={"paper": "published", "why": "81 frames"})
    """Frames of a clip and of a target path, frame 0 included."""
    height: int = Field(480, gt=0, json_schema_extra={"paper": "published", "why": "480 x 832"})
    """Frame height in pixels."""
    width: int = Field(832, gt=0, json_schema_extra={"paper": "published", "why": "480 x 832"})
    """Frame width in pixels."""
    clips: ClipsConfig = ClipsConfig()
    """Conditioning clips."""
    trajectories: TrajectoriesConfig = TrajectoriesConfig()
    """Target camera paths."""
    prepare: PrepareConfig = PrepareConfig()
    """The preparation cache."""

    @property
    def video(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.num_frames, self.height, self.width

    @property
    def clips_path(self) -> Path:
        """Folder of the clips."""
        return self.root / self.clips.path

    @property
    def trajectories_path(self) -> Path:
        """Folder or file of the camera paths."""
        return self.root / self.trajectories.path
