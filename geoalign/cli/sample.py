"""``geoalign sample``: retake one video along a camera path."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import (
    add_cameras,
    add_model,
    add_reward,
    examples,
    four_numbers,
    frame_count,
    frame_size,
    positive,
    read_reward,
    whole,
)
from geoalign.config.data import DEFAULT_NEGATIVE_PROMPT
from geoalign.evaluators.table import EVALUATORS, WITH_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from geoalign.config.flow import FlowConfig
    from geoalign.jobs.sample import CostEstimate
    from geoalign.policy.open import ModelFiles
    from geoalign.policy.policy import RetakePolicy
    from geoalign.rewards.base import Reward
    from geoalign.types import RetakeBatch


def add_parser(subparsers: argparse._SubParsersAction, summary: str) -> None:
    """Register ``sample``."""
    shown = examples(
        "geoalign sample --model runs/tiny_cpu --video clip.mp4 --trajectory zoom_in --speed 8 --out out.mp4",
        "geoalign sample --model runs/tiny_cpu --video clip.mp4 --trajectory path.json --speed 1.5 --out out.mp4",
        "geoalign sample --model weights/Wan2.1-Fun-V1.1-1.3B-Control-Camera \\",
        "                --checkpoint weights/redirector/step20000.safetensors --video in.mp4 \\",
        '                --source-camera poses.npz --trajectory pan_right --prompt "a bear walks" \\',
        "                --device cuda --out out.mp4",
        "geoalign sample --model runs/tiny_cpu --video clip.mp4 --trajectory zoom_in --speed 8 --best-of 4 --out 4.mp4",
    )
    parser = subparsers.add_parser("sample", description=summary, **shown)
    add = parser.add_argument
    add_model(parser)
    add("--video", type=Path, required=True, help="source video file, or a folder of frames")
    add_cameras(
        parser, required=True, target="A file gives its first poses; one shorter than the video is spread over it",
        source="its intrinsics and ground plane are used (default: the npz beside the video, which is called like it; "
        "without one the camera does not move)",
    )  # fmt: skip
    add("--speed", type=positive("--speed"), default=1.0, help="multiplies the camera's motion per frame (default 1)")
    add(
        "--source-estimator",
        metavar="NAME",
        help=f"estimate the source camera: {', '.join(sorted(EVALUATORS))}, or your own (docs/api.md)",
    )
    add("--estimator-weights", type=Path, help="of mapanything (model.safetensors or its folder) or depth_anything_3")
    add(
        "--intrinsics",
        type=four_numbers("--intrinsics"),
        metavar="FX,FY,CX,CY",
        help="of the source frames, fractions of W,H,W,H",
    )
    add(
        "--ground-plane",
        type=four_numbers("--ground-plane"),
        metavar="NX,NY,NZ,D",
        help="n.X = d in metres (default: the camera file's); for geometric models",
    )
    add(
        "--frames", type=frame_count, metavar="N|all",
        help="length (Wan: 4k + 1); all: the longest of the video that fits; default: that, but at most 81",
    )  # fmt: skip
    add("--size", type=frame_size, metavar="HxW", help="frame size after scale and centre crop (Wan default 480x832)")
    add("--prompt", help="what the video shows, or @FILE with the text")
    add("--captioner", type=Path, metavar="FOLDER", help="BLIP-2 that writes the prompt when --prompt is not given")
    add("--negative-prompt", help="text of the second guidance pass, or @FILE (default: our own)")
    add(
        "--settings", choices=("default", "published"), default="default",
        help="published: as ReDirector's inference script samples (native length, 50 steps, its negative prompt, "
        "rounding, noise and frame rate; docs/benchmark.md)",
    )  # fmt: skip
    add(
        "--guidance",
        type=positive("--guidance"),
        help="classifier-free guidance (default 5 with a text encoder, else 1)",
    )
    add("--steps", type=int, help="sampling steps (default 25)")
    add("--shift", type=float, help="time shift of the noise levels (default 5)")
    add("--seed", type=whole("--seed", 0), help="seed of the initial noise (default 0)")
    add(
        "--best-of",
        type=whole("--best-of", 1),
        default=1,
        metavar="N",
        help="make N retakes (seeds from --seed on) and keep the best",
    )
    add("--keep-all", action="store_true", help="with --best-of: write the others too, as OUT.seedK.mp4")
    add_reward(parser)
    add("--device", default="cpu", help="cpu (default), cuda, cuda:N or auto")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default bfloat16 on cuda, float32 on cpu)")
    add("--tiled", action="store_true", help="encode and decode in tiles (less memory, faint borders)")
    add("--out", type=Path, required=True, help="an .mp4; a side-by-side mp4, a JSON and a camera plot lie beside it")
    add("--dry-run", action="store_true", help="print shapes, tokens, memory and predicted time, and stop")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    _check_arguments(args)
    import torch

    from geoalign.files.atomic import check_writable
    from geoalign.frozen.device import named_device
    from geoalign.jobs.encode import Encoders, choose_guidance, reads_text_of
    from geoalign.jobs.sample import estimate, read_inputs, sampler
    from geoalign.jobs.sample_files import outputs, used_values, write_retake
    from geoalign.policy.open import describe
    from geoalign.policy.policy import RetakePolicy

    _settle(args)
    paths = outputs(args.out)
    device = named_device(args.device, "--device")
    args.device = str(device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    flow = sampler(args.steps, args.shift)
    files = describe(args.model, args.checkpoint)
    empty = files.codec_rules()
    camera, told = _source_camera(args)
    batch, fps = read_inputs(
        args.video, args.trajectory, codec=empty, speed=args.speed, frames=args.frames, size=args.size,
        source_camera=camera, intrinsics=args.intrinsics, ground_plane=args.ground_plane,
    )  # fmt: skip
    fps = args.fps or fps
    reads_text = reads_text_of(files)
    guidance = choose_guidance(
        args.guidance, reads_text, args.model, prompt=args.prompt, negative_prompt=args.negative_prompt,
        captioned=args.captioner is not None,
    )  # fmt: skip
    negative = _negative_prompt(args, reads_text)
    forwards = args.steps * (1 if guidance == 1.0 else 2)
    cost = estimate(files.config, files.parameters, empty, batch.source.video.shape, forwards, dtype, args.device)
    print(f"model    {files.location.what}: {files.title}")
    if told:
        print(f"camera   {told}")
    _print_cost(args, batch, fps, cost)
    for path in (*paths.values(), *_kept(args)):
        check_writable(path)
    _check_files(args, files, batch)
    if args.dry_run:
        return 0
    batch, prompt = _estimate_camera(args, batch), _prompt(args, batch, dtype)
    reward = _reward(args)
    encoders = Encoders(files, dtype=dtype, device=args.device)
    batch = replace(batch, encodings=encoders(batch, prompt, negative))
    model, _ = files.network(dtype=dtype, device=args.device)
    codec = files.codec(dtype=dtype, device=args.device, tiled=args.tiled)
    policy = RetakePolicy(model.requires_grad_(False), codec, guidance)  # nothing is trained, so text may be missing
    video, record = _sample(args, policy, batch, flow, reward, fps, forwards)
    given = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if _plain(v)}
    record |= {"arguments": given, "tokens": cost.tokens, "forwards": cost.forwards}
    used = used_values(guidance, prompt, negative, camera, args.source_estimator)
    written = write_retake(args.out, batch, video, fps, record, used, published=args.settings == "published")
    print("\n".join(f"{name:13}{path}" for name, path in written.items()))
    return 0


def _check_files(args: argparse.Namespace, files: ModelFiles, batch: RetakeBatch) -> None:
    """Look at the headers of everything that will be loaded, and read the texts; raises UserError before any is."""
    from geoalign.files.check import require
    from geoalign.jobs.encode import check_encoders, read_text
    from geoalign.models.captions import check_captioner
    from geoalign.rewards.registry import evaluator_needs, reward_needs

    files.check_codec()
    check_encoders(files)
    if args.prompt is not None:
        read_text(args.prompt)
    elif args.captioner is not None:
        check_captioner(args.captioner)
    if args.source_estimator in WITH_WEIGHTS:
        require(evaluator_needs(args.source_estimator, {"checkpoint": str(args.estimator_weights)}))
    if args.best_of > 1:
        from geoalign.jobs.best_of import check_reward

        kind, options = read_reward(args)
        check_reward(options.get("evaluator"), batch)
        require(reward_needs("--set", kind, options))


def _check_arguments(args: argparse.Namespace) -> None:
    from geoalign.errors import UsageError

    if args.source_camera and args.source_estimator:
        raise UsageError("--source-camera gives the camera that --source-estimator would estimate; use one of them")
    if (args.source_estimator in WITH_WEIGHTS) != (args.estimator_weights is not None):
        raise UsageError(f"--source-estimator {' or '.join(WITH_WEIGHTS)} and --estimator-weights PATH go together")
    if args.best_of == 1 and (args.keep_all or args.reward or args.evaluator or args.set):
        raise UsageError("--keep-all, --reward, --evaluator and --set choose among several: give --best-of N")


def _settle(args: argparse.Namespace) -> None:
    """Fill in what was not given; the published settings are a whole, so that none of theirs can be given."""
    from geoalign.errors import UsageError
    from geoalign.policy.published import FOLDER_FPS, SEED, SHIFT, STEPS

    published = args.settings == "published"
    fixed = ("steps", "shift", "seed", "guidance", "dtype")
    if published and (given := [name for name in fixed if getattr(args, name) is not None]):
        raise UsageError(f"--settings published has its own --{given[0]}; drop one of both")
    if published and (args.best_of > 1 or args.tiled):
        raise UsageError("--settings published makes one retake, untiled; drop --best-of and --tiled")
    values = {"steps": STEPS, "shift": SHIFT, "seed": SEED} if published else {"steps": 25, "shift": 5.0, "seed": 0}
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if published:
        args.dtype, args.frames = "bfloat16", args.frames or "all"
    args.fps = FOLDER_FPS if published and args.video.is_dir() else None


def _kept(args: argparse.Namespace) -> list[Path]:
    """What ``--keep-all`` writes beside the best."""
    from geoalign.jobs.sample_files import candidate_path

    return [candidate_path(args.out, args.seed + i) for i in range(args.best_of)] if args.keep_all else []


def _source_camera(args: argparse.Namespace) -> tuple[str | None, str]:
    """The camera of the source, given or found beside it, and what to say of one that was found."""
    from geoalign.jobs.sample import find_source_camera

    if args.source_camera:
        return args.source_camera, ""
    return find_source_camera(
        args.video, poses=args.source_estimator is None, lens=args.intrinsics is None, plane=args.ground_plane is None
    )


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


def _negative_prompt(args: argparse.Namespace, reads_text: bool) -> str:
    """The text of the second guidance pass: the given one, else that of the settings."""
    from geoalign.jobs.encode import read_text
    from geoalign.rewards.vlm import templates

    if args.negative_prompt is not None:
        return read_text(args.negative_prompt)
    published = args.settings == "published" and reads_text
    return templates.load("wan_negative_prompt") if published else DEFAULT_NEGATIVE_PROMPT


def _prompt(args: argparse.Namespace, batch: RetakeBatch, dtype: Any) -> str | None:
    """The given prompt, else a generated one, under our settings without sentences about the source's camera motion."""
    from geoalign.data.captions import remove_camera_motion
    from geoalign.jobs.encode import read_text
    from geoalign.models.captions import load_captioner

    if args.prompt is not None or args.captioner is None:
        return None if args.prompt is None else read_text(args.prompt)
    caption = load_captioner(args.captioner, dtype=dtype, device=args.device).caption(batch.source.video[0])
    prompt = caption if args.settings == "published" else remove_camera_motion(caption) or caption
    print(f"prompt   {prompt}")
    return prompt


def _reward(args: argparse.Namespace) -> Reward | None:
    """What chooses among several retakes; None for one."""
    if args.best_of == 1:
        return None
    from geoalign.rewards.registry import build_reward

    return build_reward(*read_reward(args))


def _sample(
    args: argparse.Namespace,
    policy: RetakePolicy,
    batch: RetakeBatch,
    flow: FlowConfig,
    reward: Reward | None,
    fps: float,
    forwards: int,
) -> tuple[Tensor, dict[str, Any]]:
    """The video ``[1, F, 3, H, W]``, the best of several with ``reward``, and what to record of the choice."""
    from geoalign.data.video import write_video
    from geoalign.jobs.best_of import best_of
    from geoalign.jobs.progress import bar
    from geoalign.jobs.sample_files import candidate_path
    from geoalign.policy.published import published_retake
    from geoalign.policy.retake import retake

    with bar(args.best_of * (forwards + 1), "sampling", "forward") as shown:

        def decoding() -> None:
            shown.set_description("decoding")

        def make(seed: int) -> Tensor:
            shown.set_description("sampling")
            if args.settings == "published":
                video = published_retake(policy, batch, on_pass=shown.update, on_decode=decoding)
            else:
                video = retake(policy, batch, flow, seed=seed, on_pass=shown.update, on_decode=decoding, strict=True)
            shown.update()  # the decoder counts as one forward
            return video

        def keep(seed: int, video: Tensor) -> None:
            if args.keep_all:
                write_video(candidate_path(args.out, seed), video[0], fps)

        if reward is None:
            return make(args.seed), {}
        seeds = range(args.seed, args.seed + args.best_of)
        best, video, rows = best_of(seeds, make, reward, batch, keep)
    for row in rows:
        total = "invalid" if row["total"] is None else f"{row['total']:.4f}"
        print(f"seed {row['seed']:<4} {total}{'  best' if row['seed'] == best else ''}")
    return video, {"best_of": {"reward": reward.name, "seed": best, "scores": rows}}


def _print_cost(args: argparse.Namespace, batch: RetakeBatch, fps: float, cost: CostEstimate) -> None:
    from geoalign.jobs.sample import device_memory_gb

    _, frames, _, height, width = batch.source.video.shape
    print(f"video    {frames} frames of {height} x {width} at {fps:g} fps")
    print(
        f"latents  {' x '.join(map(str, cost.latent_shape))} (channels, frames, rows, columns), {cost.tokens:,} tokens"
    )
    each = f", {args.best_of} times" if args.best_of > 1 else ""
    print(f"work     {cost.forwards} forwards, {cost.tflop:,.3g} TFLOP{each}")
    limit = device_memory_gb(args.device)
    over = "; it will not fit: use fewer --frames or a smaller --size" if cost.memory_gb > limit else ""
    print(f"memory   about {cost.memory_gb:.3g} GB of the {limit:.3g} GB of {args.device}{over}")
    print(f"time     about {cost.seconds:,.3g} s of denoising{each} (predicted from a matrix product on this device)")


def _plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | Path | tuple)
