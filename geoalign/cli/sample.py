"""``geoalign sample``: retake one video along a camera path."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import add_cameras, add_model, four_numbers, frame_size, positive, whole
from geoalign.config.data import DEFAULT_NEGATIVE_PROMPT
from geoalign.evaluators.table import EVALUATORS, WITH_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from geoalign.config.flow import FlowConfig
    from geoalign.jobs.sample import CostEstimate
    from geoalign.policy.open import ModelFiles
    from geoalign.types import Encodings, RetakeBatch


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``sample``."""
    parser = subparsers.add_parser("sample", help="retake a video along a camera path")
    add = parser.add_argument
    add_model(parser)
    add("--video", type=Path, required=True, help="source video file, or a folder of frames")
    add_cameras(
        parser, required=True, target="A file gives its first poses; one shorter than the video is spread over it",
        source="its intrinsics and ground plane are used (default: the camera does not move)",
    )  # fmt: skip
    add("--speed", type=positive("--speed"), default=1.0, help="multiplies the camera's motion per frame (default 1)")
    add("--source-estimator", choices=sorted(EVALUATORS), help="estimate the source camera instead (metric)")
    add("--estimator-weights", type=Path, help="of mapanything (model.safetensors or its folder) or depth_anything_3")
    add("--intrinsics", type=four_numbers, metavar="FX,FY,CX,CY", help="of the source frames, fractions of W,H,W,H")
    add(
        "--ground-plane",
        type=four_numbers,
        metavar="NX,NY,NZ,D",
        help="n.X = d in metres (default: the camera file's); for geometric models",
    )
    add("--frames", type=whole("--frames", 1), help="length (Wan: 4k + 1; default: the longest that fits, at most 81)")
    add("--size", type=frame_size, metavar="HxW", help="frame size after scale and centre crop (Wan default 480x832)")
    add("--prompt", help="what the video shows, or @FILE with the text")
    add("--captioner", type=Path, metavar="FOLDER", help="BLIP-2 that writes the prompt when --prompt is not given")
    add("--negative-prompt", default=DEFAULT_NEGATIVE_PROMPT, help="text of the second guidance pass, or @FILE")
    add(
        "--guidance",
        type=positive("--guidance"),
        help="classifier-free guidance (default 5 with a text encoder, else 1)",
    )
    add("--steps", type=int, default=25, help="sampling steps (default 25)")
    add("--shift", type=float, default=5.0, help="time shift of the noise levels (default 5)")
    add("--seed", type=whole("--seed", 0), default=0, help="seed of the initial noise")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:N or auto")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default bfloat16 on cuda, float32 on cpu)")
    add("--tiled", action="store_true", help="encode and decode in tiles (less memory, faint borders)")
    add("--out", type=Path, required=True, help="an .mp4; a side-by-side mp4, a JSON and a camera plot lie beside it")
    add("--dry-run", action="store_true", help="print shapes, tokens, memory and predicted time, and stop")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import torch

    from geoalign.errors import UsageError
    from geoalign.frozen.device import named_device
    from geoalign.io_utils import check_writable
    from geoalign.jobs.sample import estimate, read_inputs
    from geoalign.policy.open import describe
    from geoalign.policy.policy import RetakePolicy
    from geoalign.policy.retake import retake

    _check_arguments(args)
    device = named_device(args.device, "--device")
    args.device = str(device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    flow = _flow(args)
    files = describe(args.model, args.checkpoint)
    codec = files.codec(dtype=dtype, device=args.device, tiled=args.tiled)
    batch, fps = read_inputs(
        args.video, args.trajectory, codec=codec, speed=args.speed, frames=args.frames, size=args.size,
        source_camera=args.source_camera, intrinsics=args.intrinsics, ground_plane=args.ground_plane,
    )  # fmt: skip
    encoder = _find_text_encoder(args, files)
    guidance = args.guidance if args.guidance is not None else (5.0 if encoder else 1.0)
    if guidance != 1.0 and not encoder:
        raise UsageError(f"--guidance {guidance} needs a text encoder, and {args.model} has none; use --guidance 1")
    forwards = args.steps * (1 if guidance == 1.0 else 2)
    shape = batch.source.video.shape
    cost = estimate(files.config, files.parameters, codec, shape, forwards, dtype, args.device)
    print(f"model    {files.location.what}: {files.title}")
    _print_cost(batch, fps, cost)
    if args.dry_run:
        return 0
    for path in _outputs(args.out).values():
        check_writable(path)
    batch, prompt = _estimate_camera(args, batch), _prompt(args, batch, dtype)
    batch = replace(batch, encodings=_encodings(args, files, batch, encoder, prompt, dtype))
    model, _ = files.network(dtype=dtype, device=args.device)
    policy = RetakePolicy(model.requires_grad_(False), codec, guidance)  # nothing is trained, so text may be missing
    with _progress(forwards) as bar:
        video = retake(policy, batch, flow, seed=args.seed, on_pass=bar.update, strict=True)
    _write(args, batch, video.cpu(), cost, {"guidance": guidance, "prompt": prompt, "fps": fps})
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    from geoalign.errors import UsageError

    if args.out.suffix != ".mp4":
        raise UsageError(f"--out {args.out} must end in .mp4")
    if args.source_camera and args.source_estimator:
        raise UsageError("--source-camera gives the camera that --source-estimator would estimate; use one of them")
    if (args.source_estimator in WITH_WEIGHTS) != (args.estimator_weights is not None):
        raise UsageError(f"--source-estimator {' or '.join(WITH_WEIGHTS)} and --estimator-weights PATH go together")


def _flow(args: argparse.Namespace) -> FlowConfig:
    from pydantic import ValidationError

    from geoalign.config.flow import FlowConfig
    from geoalign.errors import ConfigError

    try:
        return FlowConfig(steps=args.steps, shift=args.shift)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(map(str, found["loc"])) or "steps, shift"
        raise ConfigError(f"--{name} {found['input']}: {found['msg'][:1].lower()}{found['msg'][1:]}") from None


def _outputs(out: Path) -> dict[str, Path]:
    """Everything that is written, by what it is."""
    suffixes = {"video": ".mp4", "side_by_side": ".side_by_side.mp4", "cameras": ".cameras.png", "settings": ".json"}
    return {name: out.with_suffix(suffix) for name, suffix in suffixes.items()}


def _estimate_camera(args: argparse.Namespace, batch: RetakeBatch) -> RetakeBatch:
    """The batch with an estimated source camera if one was asked for."""
    if args.source_estimator is None:
        return batch
    from geoalign.jobs.sample import with_estimated_camera
    from geoalign.rewards.registry import build_evaluator

    options = {}
    if args.source_estimator in WITH_WEIGHTS:
        options = {"checkpoint": str(args.estimator_weights), "device": args.device}
    if args.source_estimator == "planar":
        options = {"reference": "first"}  # a source aligned to itself frame by frame would seem to stand still
    evaluator = build_evaluator(args.source_estimator, **options)
    batch, tracked = with_estimated_camera(batch, evaluator)
    length = float(batch.source.camera.path_length()[0])
    print(f"camera   estimated by {evaluator.name}: a path of {length:.3g} m, {tracked:.0%} tracked")
    return batch


def _find_text_encoder(args: argparse.Namespace, files: ModelFiles) -> tuple[Path, Path] | None:
    """Weights and tokenizer of the model's text encoder, or None for a model that reads no text.

    Raises:
        UsageError: a model that reads text without its encoder or without a prompt, or a prompt for one that does not.
    """
    from geoalign.errors import UsageError

    home = files.location.home
    pairs = (
        (home / "text_encoder", home / "tokenizer"),
        (home / "models_t5_umt5-xxl-enc-bf16.pth", home / "google" / "umt5-xxl"),
    )
    found = [pair for pair in pairs if pair[0].exists()]
    if not found and files.config.text_length > 1:
        raise UsageError(
            f"{args.model} reads text, and {home} holds no text encoder; put text_encoder/ with tokenizer/, or "
            f"{pairs[1][0].name} with google/umt5-xxl/, there"
        )
    if not found and (args.prompt or args.captioner):
        raise UsageError(f"a prompt needs a text encoder, and {args.model} has none; drop --prompt and --captioner")
    if found and args.prompt is None and args.captioner is None:
        raise UsageError(
            "this model reads text: say what the video shows with --prompt TEXT or @FILE, or give --captioner FOLDER"
        )
    return found[0] if found else None


def _prompt(args: argparse.Namespace, batch: RetakeBatch, dtype: Any) -> str | None:
    """The given prompt, else a generated one without sentences about the source's camera motion."""
    if args.prompt is not None or args.captioner is None:
        return None if args.prompt is None else _text(args.prompt)
    from geoalign.data.captions import remove_camera_motion
    from geoalign.models.captions import load_captioner

    caption = load_captioner(args.captioner, dtype=dtype, device=args.device).caption(batch.source.video[0])
    prompt = remove_camera_motion(caption) or caption
    print(f"prompt   {prompt}")
    return prompt


def _encodings(
    args: argparse.Namespace,
    files: ModelFiles,
    batch: RetakeBatch,
    encoder: tuple[Path, Path] | None,
    prompt: str | None,
    dtype: Any,
) -> Encodings | None:
    """What the encoders make of the prompts and of the first source frame; None for a model without encoders."""
    from geoalign.models.encoders import load_text_encoder
    from geoalign.types import Encodings

    context = negative = None
    if encoder is not None and prompt is not None:
        text = load_text_encoder(*encoder, dtype=dtype, device=args.device)
        text.length = files.config.text_length
        context, negative = text([prompt, _text(args.negative_prompt)]).split(1)
    found = Encodings(context=context, negative=negative, image_tokens=_image_tokens(args, files, batch, dtype))
    return found if len(found) else None


def _text(value: str) -> str:
    from geoalign.parsing import read_text

    return read_text(value[1:]).strip() if value.startswith("@") else value


def _image_tokens(args: argparse.Namespace, files: ModelFiles, batch: RetakeBatch, dtype: Any) -> Tensor | None:
    if files.config.image_dim is None:
        return None
    from geoalign.models.encoders import load_image_encoder

    names = ("image_encoder", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    for path in (files.location.home / name for name in names):
        if path.exists():
            first = batch.source.video[:, 0].to(args.device)
            return load_image_encoder(path, dtype=dtype, device=args.device)(first)
    return None


def _print_cost(batch: RetakeBatch, fps: float, cost: CostEstimate) -> None:
    _, frames, _, height, width = batch.source.video.shape
    print(f"video    {frames} frames of {height} x {width} at {fps:g} fps")
    print(
        f"latents  {' x '.join(map(str, cost.latent_shape))} (channels, frames, rows, columns), {cost.tokens:,} tokens"
    )
    print(f"work     {cost.forwards} forwards, {cost.tflop:,.3g} TFLOP, about {cost.memory_gb:.3g} GB")
    print(f"time     about {cost.seconds:,.3g} s of denoising (predicted from a matrix product on this device)")


def _progress(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="sampling", unit="forward", file=sys.stderr, disable=None)


def _write(
    args: argparse.Namespace, batch: RetakeBatch, video: Tensor, cost: CostEstimate, used: dict[str, Any]
) -> None:
    import torch

    from geoalign import __version__
    from geoalign.data.plots import plot_cameras
    from geoalign.data.video import write_video
    from geoalign.io_utils import atomic_write_json

    beside = _outputs(args.out)
    write_video(beside["video"], video[0], used["fps"])
    write_video(beside["side_by_side"], torch.cat([batch.source.video[0], video[0]], -1), used["fps"])
    cameras = {"source": batch.source.camera.c2w[0], "target": batch.target_camera.c2w[0]}
    plot_cameras(beside["cameras"], cameras)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if _plain(v)}
    plane = batch.source.ground_plane
    used |= {"frames": video.shape[1], "size": list(video.shape[-2:])}
    record = {
        "geoalign": __version__, "torch": torch.__version__, "arguments": settings, "used": used,
        "tokens": cost.tokens, "forwards": cost.forwards, "files": {k: str(v) for k, v in beside.items()},
        "target_c2w": batch.target_camera.c2w[0].tolist(), "source_c2w": batch.source.camera.c2w[0].tolist(),
        "intrinsics": batch.target_camera.intrinsics[0, 0].tolist(),
        "ground_plane": None if plane is None else plane[0].tolist(),
    }  # fmt: skip
    atomic_write_json(beside["settings"], record)
    print("\n".join(f"{name:13}{path}" for name, path in beside.items()))


def _plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | Path | tuple)
