"""The door: every verb that takes a model, with every kind of model: accepted, or refused by one line with the fix."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sealed_files import unsealed
from tiny_base import MODEL as PUBLISHED
from tiny_base import tiny_vae
from training_cases import smoke

from geoalign.cli.main import main
from geoalign.config.load import load_config, to_yaml
from geoalign.config.model import ModelConfig
from geoalign.config.schema import Config
from geoalign.config.world import WorldConfig
from geoalign.data.video import write_video
from geoalign.errors import UserError
from geoalign.files import weights
from geoalign.jobs.evaluate import Evaluation, HeldOut
from geoalign.jobs.prepare import encoder_identity
from geoalign.models.dit import RetakeDiT
from geoalign.policy import open as door
from geoalign.policy.files import new_policy, save_policy
from geoalign.policy.formats import save_pretrained
from geoalign.policy.retake import retake
from geoalign.training.checkpoint import RunSettings, TrainState, save_checkpoint
from geoalign.training.engines.snapshot import Snapshot
from geoalign.world.pairs import paired_videos

TINY_BASE = Path(door.__file__).parents[1] / "_assets" / "tiny_base.safetensors"
MODULATED = PUBLISHED | {
    "in_channels": 16, "camera": "modulated", "pluecker_adapter": False, "rope_layout": "sequential",
}  # fmt: skip

VERBS = ("train", "evaluate", "sample", "export", "fingerprint", "prepare")


@dataclass(frozen=True)
class Case:
    """A model by the name that a user gives, in a folder of the fixture ``models``.

    Attributes:
        model, delta: what the user gives.
        refused: what the one line of the refusal must say; empty: accepted.
        settings: the configuration that describes the model.
        accepted: verbs that need less than the whole model, and so accept it.
    """

    model: str
    delta: str = ""
    refused: str = ""
    settings: str = "embedded.yaml"
    accepted: tuple[str, ...] = ()


LOOK, CODEC = ("fingerprint",), ("prepare",)
CASES = {
    "builtin": Case("builtin:tiny_base"),
    "policy file": Case("policy.safetensors"),
    "policy file and delta": Case("policy.safetensors", "trained.safetensors"),
    "run": Case("runs/embedded"),
    "checkpoint": Case("runs/embedded/checkpoints/step_000002"),
    "checkpoint of a run that has not ended": Case("runs/begun/checkpoints/step_000002"),
    "exported folder": Case("exported"),
    "exported folder and delta": Case("exported", "trained.safetensors"),
    "published base and ReDirector delta": Case("base", "delta.safetensors", settings="learned.yaml"),
    "published base and ReCamMaster file": Case("base", "recam.ckpt", settings="modulated.yaml"),
    "run on published weights": Case("runs/published", settings="learned.yaml"),
    "checkpoint on published weights": Case("runs/published/checkpoints/step_000002", settings="learned.yaml"),
    "published base alone": Case(
        "base", refused="cannot retake videos by itself; give what was trained on top with --checkpoint (train.delta)",
        settings="learned.yaml", accepted=LOOK + CODEC,
    ),
    "run that has not ended": Case(
        "runs/begun", refused="without a trained policy; let the run end (geoalign train --resume auto), or give one of"
    ),
    "run whose base is gone": Case("runs/orphan", refused="was trained on gone/base, which is not there"),
    "checkpoint without its run": Case("lone/checkpoints/step_000002", refused="needs the settings of its run"),
    "checkpoint of another format": Case("runs/other/checkpoints/step_000002", refused="format 99, this version reads"),
    "torn checkpoint": Case(
        "runs/torn/checkpoints/step_000002", refused="average.safetensors: no such weight file", accepted=CODEC
    ),
    "checkpoint of another model": Case(
        "runs/foreign/checkpoints/step_000002", accepted=CODEC,
        refused="is not the trained part (\\.self_attn\\.) of a model of 130 tensors, 621,169 parameters: 4",
    ),
    "checkpoint on an earlier base of that name": Case(
        "runs/earlier/checkpoints/step_000002", accepted=CODEC,
        refused="was trained on another model than",
    ),
    "delta of another model": Case(
        "exported", "delta.safetensors", refused="is not the trained part (self_attn)", accepted=LOOK + CODEC
    ),
    "missing delta": Case("exported", "none.safetensors", refused="no such weight file", accepted=LOOK + CODEC),
    "delta alone": Case(
        "trained.safetensors", accepted=LOOK,
        refused="a delta; not a geoalign policy file (header kind None); weights trained on top of a model are given",
    ),
    "wrong kind": Case(
        "kind.safetensors", refused="not a geoalign policy file (header kind 'geoalign-window')", accepted=LOOK
    ),
    "full state dict alone": Case(
        "recam.ckpt", accepted=LOOK, refused="not a geoalign policy file (those end in .safetensors); weights trained"
    ),
    "truncated": Case("cut.safetensors", refused="truncated or not a safetensors file"),
    "unexpected tensor": Case("unexpected.safetensors", refused="1 unexpected: extra"),
    "unexpected part": Case("stranger.safetensors", refused="1 unexpected tensors: optimizer.step"),
    "missing tensor": Case("missing.safetensors", refused="1 missing: head.head.bias"),
    "reshaped tensor": Case("reshaped.safetensors", refused="1 of another shape: head.head.bias [3] (expected [81])"),
    "quantised tensor": Case("quantised.safetensors", refused="first head.head.bias (I8); quantised files cannot be"),
    "missing path": Case("none", refused="none: no such model file or folder; `geoalign train`"),
    "unknown builtin": Case("builtin:huge", refused="no such built-in policy (there are: builtin:tiny_base)"),
    "empty folder": Case("empty", refused="holds no .safetensors file"),
    "unreadable settings": Case("unreadable", refused="config.json: not a readable model configuration"),
}  # fmt: skip
NO_CODEC = {"empty folder": "no autoencoder; a folder vae or a file Wan2.1_VAE.pth is needed"}  # what prepare misses


FIRST = load_config(
    Config, "smoke", ["codec.luma=5", "codec.chroma=3", "model.in_channels=43", "model.out_channels=43"]
)
"""Model and codec of the first edition of the embedded default."""


def lively(config: ModelConfig, seed: int) -> RetakeDiT:
    torch.manual_seed(seed)
    model = RetakeDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


def self_attention(model: RetakeDiT) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".self_attn." in name}


def write_run(folder: Path, config: Config, trained: dict[str, torch.Tensor]) -> None:
    """Settings and a checkpoint whose average is not its trained state."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    raw = {name: value + 1 for name, value in trained.items()}
    save_checkpoint(
        folder / "checkpoints", TrainState(2, Snapshot(raw, trained, {}), {}), config=RunSettings("", {}), keep=1
    )


def write_damaged(folder: Path) -> None:
    """Copies of the shipped policy with one fault each."""
    with safe_open(TINY_BASE, framework="pt") as file:
        header = unsealed(file.metadata())  # others are tried
    name = "model.head.head.bias"
    faults: dict[str, Callable[[dict[str, Any]], object]] = {
        "unexpected": lambda tensors: tensors.update({"model.extra": torch.ones(1)}),
        "stranger": lambda tensors: tensors.update({"optimizer.step": torch.ones(1)}),
        "missing": lambda tensors: tensors.pop(name),
        "reshaped": lambda tensors: tensors.update({name: torch.ones(3)}),
        "quantised": lambda tensors: tensors.update({name: torch.ones(81, dtype=torch.int8)}),
        "kind": lambda tensors: header.update({"kind": "geoalign-window"}),
    }
    for fault, harm in faults.items():
        tensors = load_file(TINY_BASE)
        harm(tensors)
        save_file(tensors, folder / f"{fault}.safetensors", header)
    (folder / "cut.safetensors").write_bytes(TINY_BASE.read_bytes()[:-100])


def write_embedded(folder: Path) -> None:
    """The embedded default: file, delta, exported folder, runs."""
    shutil.copy(TINY_BASE, folder / "policy.safetensors")
    files = door.describe(TINY_BASE)
    save_pretrained(files.network()[0], folder / "exported", None, files.patch)
    trained = self_attention(lively(files.config, 1))
    save_file(trained, folder / "trained.safetensors")
    config = load_config(Config, "smoke")
    (folder / "embedded.yaml").write_text(to_yaml(config))
    for name in ("embedded", "begun", "other", "torn"):
        write_run(folder / "runs" / name, config, trained)
    shutil.copy(TINY_BASE, folder / "runs" / "embedded" / "policy.safetensors")
    shutil.copytree(folder / "runs" / "begun" / "checkpoints", folder / "lone" / "checkpoints")
    (folder / "runs/other/checkpoints/step_000002/state.json").write_text('{"format": 99}')
    (folder / "runs/torn/checkpoints/step_000002/average.safetensors").unlink()
    write_run(folder / "runs" / "earlier", FIRST, trained)
    less = dict(sorted(trained.items())[4:])
    write_run(folder / "runs" / "foreign", config, less)


def write_published(folder: Path) -> None:
    """Scaled-down published weights, what was trained on top, and runs that started there."""
    learned = smoke(model=PUBLISHED, codec={"kind": "wan_vae"})
    plain = learned.model.model_copy(update={"camera": "none", "source": "none"})
    (folder / "base").mkdir()
    save_file(lively(plain, 2).state_dict(), folder / "base" / "diffusion_pytorch_model.safetensors")
    tiny_vae().save_pretrained(folder / "base" / "vae")
    save_file(self_attention(lively(learned.model, 3)), folder / "delta.safetensors")
    modulated = smoke(model=MODULATED, codec={"kind": "wan_vae"})
    torch.save(lively(modulated.model, 4).state_dict(), folder / "recam.ckpt")
    (folder / "learned.yaml").write_text(to_yaml(learned))
    (folder / "modulated.yaml").write_text(to_yaml(modulated))
    after = self_attention(lively(learned.model, 5))
    for name, base in (("published", Path("base")), ("orphan", Path("gone/base"))):
        train = learned.train.model_copy(update={"base": base, "delta": Path("delta.safetensors")})
        write_run(folder / "runs" / name, learned.model_copy(update={"train": train}), after)
        save_file(after, folder / "runs" / name / "delta.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_embedded(folder)
    write_published(folder)
    write_damaged(folder)
    (folder / "empty").mkdir()
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "config.json").write_text('{"retake": {"dim": "wide"}}')
    ramp = torch.arange(5 * 48 * 64 * 3).reshape(5, 48, 64, 3)
    write_video(folder / "in.mp4", (ramp % 251).to(torch.uint8), 12.0)
    return folder


@pytest.fixture(autouse=True)
def small_layouts(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published layouts, scaled down; the work behind each verb ends after the model is open."""
    monkeypatch.chdir(models)
    monkeypatch.setattr(door, "REDIRECTOR", ModelConfig(**PUBLISHED))
    monkeypatch.setattr(door, "RECAMMASTER", ModelConfig(**MODULATED))
    monkeypatch.setattr("geoalign.jobs.evaluate.evaluate", lambda *_, **__: Evaluation({}, {}, {}))
    monkeypatch.setattr("geoalign.jobs.evaluate.HeldOut.build", lambda *_: HeldOut({}))
    # None of these folders holds the 11 GB of a text encoder, without which `sample` refuses them.
    monkeypatch.setattr("geoalign.jobs.encode.reads_text_of", lambda *_: False)

    def opened(*arguments: Any) -> None:
        door.open_base(*arguments)
        raise UserError("opened")

    monkeypatch.setattr("geoalign.jobs.train.open_base", opened)


def take(verb: str, case: Case, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error text of a verb that is given the model of a case."""
    named = ["--model", case.model, *(["--checkpoint", case.delta] if case.delta else [])]
    base = [f"train.base={case.model}", *([f"train.delta={case.delta}"] if case.delta else [])]
    commands = {
        "train": ["train", "--config", case.settings, *base, f"run.dir={out / 'run'}"],
        "evaluate": ["evaluate", "--config", case.settings, *named],
        "sample": ["sample", "--dry-run", "--video", "in.mp4", "--trajectory", "pan_right", "--out",
                   str(out / "out.mp4"), "--size", "48x64", *named],
        "export": ["export", "--format", "diffusers", "--out", str(out / "exported"), *named],
        "fingerprint": ["model", "fingerprint", case.model],
    }  # fmt: skip
    if verb == "prepare":  # its first act, and the last one of the door
        try:
            encoder_identity(load_config(Config, case.settings, base))
        except UserError as error:
            return error.exit_code, f"error: {error}\n"
        return 0, ""
    code, text = main(commands[verb]), capsys.readouterr().err
    if verb == "train":  # says what it will do once the settings are read, before anything is loaded
        said = r"^\d\d:\d\d:\d\d (smoke: .* rollouts on one process|reading the weights of .*)\n"
        text = re.sub(said, "", text, flags=re.MULTILINE)
    elif verb in ("evaluate", "sample", "export"):
        began, _, text = text.partition("\n")
        assert re.fullmatch(rf"\d\d:\d\d:\d\d {verb}: loading", began)
    return (0, "") if verb == "train" and text == "geoalign: error: opened\n" else (code, text)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", CASES)
def test_every_verb_takes_every_kind_of_model_or_says_in_one_line_why_not(
    kind: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[kind]
    code, message = take(verb, case, tmp_path, capsys)
    if not case.refused or verb in case.accepted:
        assert code == 0, message
        return
    assert code in (1, 2) and message.count("error:") == 1, message
    listed = verb == "train" and "(docs/real-weights.md):" in message  # all that is missing, each with its way out
    assert listed or len(message.splitlines()) == 1, message
    refused = NO_CODEC.get(kind, case.refused) if verb == "prepare" else case.refused
    assert ("is not there" if listed else refused) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if not case.refused])
def test_a_file_is_opened_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            opened[str(path)] += 1
            return original(path, *arguments, **options)

        return call

    monkeypatch.setattr(weights, "safe_open", counting(weights.safe_open))
    monkeypatch.setattr(torch, "load", counting(torch.load))
    case = CASES[kind]
    door.describe(case.model, Path(case.delta) if case.delta else None).policy()
    assert opened and set(opened.values()) == {1}, opened


def expected_weights(case: Case) -> dict[str, torch.Tensor]:
    """What a model must be, by the files alone: base tensors, replaced by those that were trained last."""
    if case.delta == "recam.ckpt":
        return torch.load("recam.ckpt", weights_only=True)
    if case.settings == "learned.yaml":
        base = load_file("base/diffusion_pytorch_model.safetensors") | load_file("delta.safetensors")
    else:
        base = {n.removeprefix("model."): v for n, v in load_file(TINY_BASE).items() if n.startswith("model.")}
    last = case.delta
    if "step_" in case.model:
        last = f"{case.model}/average.safetensors"
    elif case.model == "runs/published":
        last = "runs/published/delta.safetensors"
    return base | (load_file(last) if last else {})


@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if not case.refused])
def test_the_weights_are_those_of_the_files(kind: str) -> None:
    case = CASES[kind]
    files = door.describe(case.model, Path(case.delta) if case.delta else None)
    expected, found = expected_weights(case), files.network()[0].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert files.parameters == sum(value.numel() for value in expected.values())
    assert files.codec().latent_channels == (81 if case.settings == "embedded.yaml" else 16)


def test_a_policy_file_of_the_first_edition_is_opened_and_samples(tmp_path: Path) -> None:
    """Codec and width of latents are those of the file, whatever ships today; its notes name settings that are gone."""
    made = new_policy(FIRST.model, FIRST.codec, seed=3)
    notes = {"pretrain": {"translation_bias": [0.34, 0.35], "rotation_bias": [0.0, 0.2]}}
    save_policy(tmp_path / "old.safetensors", made, FIRST.codec, notes)
    opened = door.open_policy(tmp_path / "old.safetensors")
    assert opened.codec.latent_channels == 43 and door.describe(tmp_path / "old.safetensors").notes == notes
    pairs = paired_videos(WorldConfig(), 1, torch.Generator().manual_seed(1))  # five frames of a map without streets
    videos = [retake(policy, pairs.batch, FIRST.flow, seed=2) for policy in (made, opened)]
    assert torch.equal(*videos) and videos[0].shape == (1, 5, 3, 48, 64)


def test_an_opened_policy_is_frozen() -> None:
    """Else a model that reads text would seem to train its cross-attention, which evaluation without text refuses."""
    policy = door.open_policy("base", Path("delta.safetensors"))
    assert not policy.model.trains_text and not any(p.requires_grad for p in policy.model.parameters())


def test_weights_keep_their_types_or_take_the_one_asked_for() -> None:
    files = door.describe("base", Path("delta.safetensors"))
    assert files.policy(dtype=torch.bfloat16).dtype == torch.bfloat16
    half = {name: value.bfloat16() for name, value in load_file("delta.safetensors").items()}
    save_file(half, "half.safetensors")
    mixed, _ = door.describe("base", Path("half.safetensors")).network(dtype=None)
    for name, value in mixed.state_dict().items():
        assert value.dtype == (torch.bfloat16 if "self_attn" in name else torch.float32)


EXPORTS = [
    ("builtin", "redirector", "camera=geometric, which would be lost; formats that hold it: diffusers, lora"),
    ("builtin", "recammaster", "camera=geometric, which would be lost; formats that hold it: diffusers, lora"),
    ("builtin", "diffusers", ""),
    ("published base and ReCamMaster file", "redirector", "formats that hold it: recammaster, diffusers, lora"),
    ("published base and ReCamMaster file", "recammaster", ""),
    ("published base and ReDirector delta", "redirector", ""),
    ("published base and ReDirector delta", "recammaster", "formats that hold it: redirector, diffusers, lora"),
]


@pytest.mark.parametrize(("kind", "target", "refused"), EXPORTS)
def test_an_export_never_loses_the_camera(
    kind: str, target: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    case, suffix = CASES[kind], {"redirector": ".safetensors", "recammaster": ".ckpt", "diffusers": ""}[target]
    if refused:
        monkeypatch.setattr(door, "load_dit", lambda *_, **__: pytest.fail("read weights before the check"))
    named = ["--model", case.model, *(["--checkpoint", case.delta] if case.delta else [])]
    code = main(["export", "--format", target, "--out", str(tmp_path / f"out{suffix}"), *named])
    began, *message = capsys.readouterr().err.splitlines()
    assert began.endswith(" export: loading") and len(message) == bool(refused)
    assert code == (2 if refused else 0) and refused in "".join(message)
    assert bool(list(tmp_path.iterdir())) == (not refused)


def test_fingerprint_says_what_a_run_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for name in ("builtin:tiny_base", "policy.safetensors", "runs/embedded", "runs/begun/checkpoints/step_000002"):
        assert main(["model", "fingerprint", name, "--json", "-"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert {row["path"] for row in found} >= {"builtin:tiny_base", "runs/embedded"}
    assert len({(row["tensors"], row["parameters"], row["fingerprint"]) for row in found}) == 1
    assert found[0]["parameters"] == sum(v.numel() for n, v in load_file(TINY_BASE).items() if n.startswith("model."))


READERS = {
    "geoalign/files/weights.py": "the one reader of weight files",
    "geoalign/data/cache.py": "prepared windows: shards of many samples, of which a few tensors are read at a time",
    "geoalign/rewards/running/worker.py": "messages between a run and its own worker processes",
}


def test_no_verb_reads_weights_on_its_own() -> None:
    """Whoever needs weights asks :mod:`geoalign.files.weights` or the door."""
    root = Path(door.__file__).parents[2]
    reading = re.compile(r"\b(safe_open|torch\.load|load_file|pickle\.loads?|_load_state|torch\.jit\.load)\b")
    found = {
        str(path.relative_to(root)): sorted(set(reading.findall(path.read_text(encoding="utf-8"))))
        for path in sorted((root / "geoalign").rglob("*.py"))
    }
    assert {name for name, calls in found.items() if calls} == set(READERS), found
    verbs = "\n".join(path.read_text(encoding="utf-8") for path in (root / "geoalign" / "cli").glob("*.py"))
    assert "TensorFile" not in verbs and "read_policy_file" not in verbs
