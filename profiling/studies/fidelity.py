"""How faithful are approximate tails? The table of docs/fidelity.md, on the shipped base and on a trained policy.

Every variant is one call of `geoalign fidelity run`, whose JSON in --work is continued after a stop. The rows also go
into the package, where `geoalign budget` reads them. About 135 CPU-minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learning
from record import Scale, config_settings, fingerprint, shipped_base, write_result

from geoalign.cli.fidelity import DEFAULT_SETTINGS
from geoalign.files.atomic import atomic_write_text

RESULT, PAGE = Path("docs/results/fidelity.json"), Path("docs/fidelity.md")
SHIPPED = Path("geoalign/_assets/fidelity.json")
CONFIG, PRICED = "bench_levers", "paper_64xa800"
SECOND = json.dumps(
    {"levels": [[3.0, 5], [1.5, 3]], "step": 5, "offset": 1, "reference": "first"}, separators=(",", ":")
)
CONTROL = " ".join(f"rewards.{name}.options.evaluator_options={SECOND}" for name in ("geometry", "consistency"))
"""The second evaluator scores the same exact videos: how repeatable the reward itself is."""
SHORT_SETTINGS = ("flow.tail_solver=dpm2m", "flow.tail_ratio=0.4 flow.tail_solver=dpm2m", "flow.tail_grid=sigma")


@dataclass(frozen=True)
class Variant:
    """A policy, a sampler and windows.

    Attributes:
        ladder: whether `geoalign budget` may show its rows, controls aside: of windows that training has.
        price: the run whose tail and hours are priced; None: no hours, and the cost of this policy's own tail.
    """

    name: str
    trained: bool = False
    overrides: tuple[str, ...] = ()
    windows: tuple[int, ...] = (2, 10)
    config: str = CONFIG
    settings: tuple[str, ...] = (CONTROL, *DEFAULT_SETTINGS)
    ladder: bool = True
    price: str | None = PRICED


CPS = ("flow.sde=cps", "objective.loss_weight=exact_inverse")
VARIANTS = (
    Variant("base, flow"),
    Variant("trained, flow", trained=True),
    Variant("base, cps", overrides=CPS),
    Variant("trained, cps", trained=True, overrides=CPS),
    Variant("base, flow, late window", windows=(18,), ladder=False),
    Variant(
        "base, T = 6", windows=(0, 2), config="tiny_cpu", settings=SHORT_SETTINGS, price=None
    ),  # its tail has other steps than the paper's
)


def settings(scale: Scale) -> dict[str, Any]:
    """What the table depends on."""
    made_of = {
        variant.name: {
            **config_settings(variant.config, (*scale.grouped, *variant.overrides)),
            "windows": variant.windows,
            "settings": variant.settings,
            "price": variant.price,
        }
        for variant in VARIANTS
    }
    priced = config_settings(PRICED)
    return {"variants": made_of, "base": shipped_base(), "groups": scale.groups, "priced": priced}


def run(result: Path, work: Path, scale: Scale) -> None:
    """Measure all variants and write the table, also where the package keeps it."""
    rows, made = [], {}
    for variant in VARIANTS:
        made = json.loads(measure(variant, work, scale).read_text())
        rows += [
            {"variant": variant.name, "ladder": variant.ladder and row["approximations"] != {}, **row}
            | ({} if variant.price else {"hours": None})
            for row in made["rows"]
        ]
    named = {name: made[name] for name in ("versions", "device", "cores", "commit")}
    write_result(result, {"price": PRICED, **named, "rows": rows}, settings(scale))
    atomic_write_text(result.parents[2] / SHIPPED, result.read_text())


def measure(variant: Variant, work: Path, scale: Scale) -> Path:
    """One call of `geoalign fidelity run`; its JSON, which another call continues or finds finished."""
    base = str(_trained(work, scale.learning)) if variant.trained else "builtin:tiny_base"
    file = work / f"fidelity_{learning.slug(variant.name)}_{fingerprint(settings(scale))}.json"
    world = learning.render_world(work, variant.config)
    own = (f"data.root={world}", f"train.base={base}", *scale.grouped)
    options = [word for setting in variant.settings for word in ("--setting", setting)]
    options += [word for start in variant.windows for word in ("--window", str(start))]
    command = ("--config", variant.config, *own, *variant.overrides, "--groups", str(scale.groups), "--json", str(file))
    options += ["--price", variant.price] if variant.price else []
    learning.geoalign("fidelity", "run", *command, *options)
    return file


def _trained(work: Path, config: str) -> Path:
    """The policy of the first learning run, trained here if that run was made elsewhere."""
    study = learning.STUDIES[0]
    folder = work / f"{learning.slug(study.name)}_{fingerprint(learning.settings(study, config))}"
    if not (folder / "policy.safetensors").exists():
        learning.run_study(study, work / "trained_for_fidelity.json", work, config)
    return folder


def page(root: Path) -> str:
    """The table, from the result file alone."""
    if not (root / RESULT).exists():
        return "Not measured yet on the base that ships: `make results` makes the table."
    result = json.loads((root / RESULT).read_text())
    head = (
        "setting", "Spearman (p10)", "Kendall", "signs changed (weighted)", "bias trans, rot", "PSNR, members (dB)",
        "cost", "hours", "accepted",
    )  # fmt: skip
    parts = []
    for variant, window in dict.fromkeys((row["variant"], row["window"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["variant"], row["window"]) == (variant, window)]
        groups = f"{min(row['groups'] for row in rows):.0f} groups"
        lines = [head, ("---",) * len(head), *(_cells(row) for row in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{variant}, window from step {window}** ({groups})\n\n{table}")
    made = (
        f"{result['device']}, {result['cores']} cores, torch {result['versions']['torch']}, commit {result['commit']}"
    )
    return "\n\n".join([*parts, f"Measured on {made}; cost and hours predicted for `{result['price']}` on 64 A800."])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = "second evaluator, same videos" if "rewards." in row["setting"] else f"`{row['setting']}`"
    return (
        name,
        f"{row['spearman']:.3f} ({row['spearman_p10']:.3f})",
        f"{row['kendall']:.3f}",
        f"{100 * row['flips']:.1f} % ({100 * row['flips_weighted']:.1f} %)",
        f"{row['bias_trans']:+.2f}, {row['bias_rot']:+.2f}",
        f"{row['psnr']:.0f}, {row['distance']:.0f}",
        f"{row['cost']:.2f}",
        "" if row["hours"] is None else f"{row['hours']:.1f}",
        "yes" if row["accepted"] else "no: " + ", ".join(text.split()[0] for text in row["shortfalls"]),
    )
