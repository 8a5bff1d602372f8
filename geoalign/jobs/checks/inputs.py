"""What a run reads: weights of policy, encoders and rewards, clips, camera paths, prepared windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from geoalign.config.data import ClipsConfig
from geoalign.config.published import BASE, BLIP2, CAMERAS, CLIPS, DAVIS, RECAMMASTER, REDIRECTOR, WAN_T2V, Published
from geoalign.config.schema import Config
from geoalign.data.clips import list_clips, read_clip_list
from geoalign.data.tally import Tally
from geoalign.data.trajectories import list_path_files
from geoalign.errors import UserError
from geoalign.files.check import Check, absent, look, look_at
from geoalign.files.need import Need, looks_like_tokenizer
from geoalign.geometry.cameras.door import split_name
from geoalign.jobs.prepare import open_prepared
from geoalign.models.captions import check_captioner
from geoalign.models.encoders import check_image_encoder, check_text_encoder
from geoalign.models.wan_vae import check_wan_codec
from geoalign.policy.locate import locate, vae_of
from geoalign.policy.open import describe_base
from geoalign.rewards.registry import evaluator_needs, reward_needs
from geoalign.training.drift import choose_command, profile_file
from geoalign.world.dataset import is_complete


def policy(config: Config) -> Iterator[Check]:
    """The base and what was trained on top of it: the very tensors of the model section."""
    base, delta = config.train.base, config.train.delta
    parts = [] if base is None else [("base weights", base, _base_line(config, base))]
    trained = RECAMMASTER if config.model.camera == "modulated" else REDIRECTOR
    parts += [] if delta is None else [("weights trained on the base", delta, trained.line_for(delta))]
    if missing := [part for part in parts if _is_missing(part[1])]:
        yield from (absent(name, path, get) for name, path, get in missing)
        return

    def opened() -> str:
        files = describe_base(config)
        tensors = sum(len(part.shapes) for part in files.parts)
        return f"{' + '.join(str(path) for _, path, _ in parts)}: {files.title}, {tensors:,} tensors"

    yield look("base weights", "put the weights there that the model section describes", opened)


def autoencoder(config: Config) -> Iterator[Check]:
    """The video autoencoder beside the base, where the codec is one."""
    base = config.train.base
    if config.codec.kind != "wan_vae" or base is None:
        return
    get = _base_line(config, base)
    if _is_missing(base):
        yield absent("video autoencoder", base, get)
    else:
        yield look("video autoencoder", get, lambda: _vae(base))


def _is_missing(path: Path) -> bool:
    return not str(path).startswith("builtin:") and not path.exists()


def _published_base(config: Config) -> Published:
    return WAN_T2V if config.model.camera == "modulated" else BASE


def _base_line(config: Config, base: Path) -> str:
    """What makes a base: a download for the published codec, pre-training for the embedded one."""
    if config.codec.kind == "wan_vae":
        return _published_base(config).line_into(base)
    return f"geoalign pretrain {config.asked} --out {base}"


def _vae(base: Path) -> str:
    path = vae_of(locate(base).home)
    return f"{path}: {check_wan_codec(path)}"


def encoders(config: Config) -> Iterator[Check]:
    """What ``data.prepare`` names; a run with ``data.use_cache`` reads it too, to know its cache."""
    settings = config.data.prepare
    named: list[tuple[str, Path, str, Callable[[Path], str]]] = []
    if settings.codec is not None:
        get = _published_base(config).line_for(settings.codec)
        named.append(("autoencoder of prepare", settings.codec, get, check_wan_codec))
    if settings.text is not None:
        published, words = _published_base(config), settings.tokenizer or settings.text
        named.append(("text encoder", settings.text, published.line_for(settings.text), check_text_encoder))
        named.append(("tokenizer", words, published.line_for(words), looks_like_tokenizer))
    if settings.image is not None:
        named.append(("image encoder", settings.image, BASE.line_for(settings.image), check_image_encoder))
    if settings.captioner is not None:
        named.append(("captioner", settings.captioner, BLIP2.line(settings.captioner), check_captioner))
    for name, path, get, verify in named:
        yield look_at(Need(name, path, get, verify))
    if settings.evaluator is not None:
        for need in evaluator_needs(settings.evaluator, settings.evaluator_options):
            yield look_at(Need(f"{need.title} (source cameras)", need.path, need.get, need.verify))


def rewards(config: Config) -> Iterator[Check]:
    """Weights, tokenizers and prompts of the scorers; of a user's own code nothing is known."""
    for name, reward in config.rewards.items():
        try:
            needs = reward_needs(f"rewards.{name}.options", reward.kind, reward.options)
        except UserError as error:
            yield Check(f"reward {name}", "wrong", str(error), f"correct rewards.{name}", error)
            continue
        for need in needs:
            yield look_at(Need(f"{need.title} (rewards.{name})", need.path, need.get, need.verify))


def drift(config: Config) -> Iterator[Check]:
    """The profile by which reused steps are chosen, which a run reads in its first iteration."""
    path = config.ode.reuse_profile
    if config.ode.reuse != "off" and path is not None:

        def opened() -> str:
            profile_file(config)
            return str(path)

        yield look("drift profile", choose_command(config.asked, path), opened)


def clips(config: Config) -> Iterator[Check]:
    """Source clips: listed, not decoded; ``geoalign data check`` looks into them."""
    path = config.data.clips_path
    if config.world is not None:
        state = "complete" if is_complete(config.data, config.world) else "is rendered when a run starts"
        yield Check("embedded world", "present", f"{config.data.root}: {state}")
    elif not path.exists():
        yield absent("source clips", path, CLIPS.line(path))
    else:
        fix = "put clips there, or set data.root and data.clips"
        yield look("source clips", fix, lambda: _listed(path, config.data.clips))


def camera_paths(config: Config) -> Iterator[Check]:
    """Target camera paths: files that may hold some, by their names."""
    path = split_name(config.data.trajectories_path)[0]
    if config.world is not None:
        return
    found = list_path_files(config.data.trajectories_path, config.data.trajectories) if path.exists() else []
    if not found:
        yield absent("camera paths", path, CAMERAS.line(path), empty=True)
    else:
        what = f"{path}: {len(found):,} archives or files (`geoalign data trajectories` looks into them)"
        yield Check("camera paths", "present", what)


def _listed(path: Path, settings: ClipsConfig) -> str:
    tally = Tally("clips")
    records = list_clips(path, settings, tally)
    tally.check(settings.max_bad_fraction)
    left_out = f", {len(tally.rejected):,} rows left out" if tally.rejected else ""
    return f"{path}: {len(records):,} clips{left_out} (`geoalign data check` looks into them)"


def benchmark(config: Config) -> Iterator[Check]:
    """What the benchmark's section names: clips, their list, captioner and the weights of its pose estimators."""
    settings = config.benchmark
    folder, chosen = settings.clips, settings.clip_list
    if folder is not None:
        name, get = "benchmark clips", DAVIS.line(folder)
        if not folder.exists():
            yield absent(name, folder, get)
        else:
            yield look(name, get, lambda: _listed(folder, ClipsConfig()))
    if folder is not None and chosen is not None:
        name, fix = "list of clips", "write the names of the clips there, one a line (docs/benchmark.md)"
        if not chosen.exists():
            yield absent(name, chosen, fix)
        else:
            yield look(name, fix, lambda: f"{chosen}: {len(read_clip_list(chosen)):,} names")
    if settings.captioner is not None:
        get = BLIP2.line(settings.captioner)
        yield look_at(Need("captioner (benchmark)", settings.captioner, get, check_captioner))
    for name, estimator in settings.estimators.items():
        for need in evaluator_needs(estimator.kind, estimator.options):
            yield look_at(Need(f"{need.title} (benchmark.estimators.{name})", need.path, need.get, need.verify))


def cache(config: Config) -> Iterator[Check]:
    """The prepared windows of these settings; encoders that are missing are told as such, not here."""
    if not config.data.use_cache:
        return

    def opened() -> str:
        found = open_prepared(config)
        return f"{found.path}: {len(found.entries()):,} windows"

    fix = f"geoalign prepare {config.asked}"
    if not config.data.cache.exists():
        yield absent("prepared windows", config.data.cache, fix)
    else:
        yield look("prepared windows", fix, opened)
