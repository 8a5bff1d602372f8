"""Rewards and pose evaluators by name; heavy packages are imported only when something is built."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from geoalign.config.rewards import FailureConfig, RewardConfig
from geoalign.errors import ConfigError
from geoalign.evaluators.base import PoseEstimate, PoseEvaluator
from geoalign.evaluators.table import EVALUATORS, WITHOUT_RESIDUAL
from geoalign.files.need import Need
from geoalign.frozen.arena import ScorerMemory
from geoalign.frozen.frames import SharedFrames
from geoalign.rewards.base import Reward
from geoalign.rewards.running.guard import GuardedReward
from geoalign.rewards.running.worker import WorkerReward
from geoalign.types import SourceClip

# Entry points by which an installed package registers its own, as name = "package.module:Class".
GROUPS = {"reward": "geoalign.rewards", "pose evaluator": "geoalign.evaluators"}
# As evaluators.table.EVALUATORS.
REWARDS = {
    "geometry": "geoalign.rewards.geometry:GeometryReward",
    "source_consistency": "geoalign.rewards.geometry:SourceConsistencyReward",
    "videoalign": "geoalign.rewards.vlm.scorers:build_videoalign",
    "hpsv3": "geoalign.rewards.vlm.scorers:build_hpsv3",
}
# What each of these reads from the disk: the callable takes the same options and returns Needs. Names of both tables
# that are missing here read nothing, and of a user's own code nothing is known.
NEEDS = {
    "mapanything": "geoalign.evaluators.mapanything.checkpoint:needs",
    "depth_anything_3": "geoalign.evaluators.depth_anything3:needs",
    "videoalign": "geoalign.rewards.vlm.needs:videoalign",
    "hpsv3": "geoalign.rewards.vlm.needs:hpsv3",
}
# A reward's parameter of this name is given as the name of an evaluator, beside ``evaluator_options`` to build it with.
EVALUATOR = "evaluator"
# A factory's parameters of these names get what the scorers of a run share; they are no options.
SHARED = ("frames", "memory")


class LastResult:
    """Keeps an evaluator's last answer, so that several rewards of one batch share one pose estimate.

    It keeps no video alive, and one call runs at a time: a scorer that was given up as late may still be inside.
    """

    def __init__(self, evaluator: PoseEvaluator) -> None:
        self.evaluator, self.name = evaluator, evaluator.name
        self._last: tuple[weakref.ref[Tensor], weakref.ref[Tensor], PoseEstimate] | None = None
        self._turn = threading.Lock()

    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        """Estimate poses, or return the answer for the very same tensor objects."""
        with self._turn:
            last = self._last
            if last is None or last[0]() is not video or last[1]() is not source.video:
                last = weakref.ref(video), weakref.ref(source.video), self.evaluator(video, source)
                self._last = last
            return last[2]


@dataclass(frozen=True, slots=True)
class Shared:
    """What the inline rewards of a run have in common: a preprocessing pass, memory, evaluators by name and options."""

    frames: SharedFrames = field(default_factory=SharedFrames)
    memory: ScorerMemory = field(default_factory=ScorerMemory)
    evaluators: dict[str, PoseEvaluator] = field(default_factory=dict)

    def build(self, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
        """Call ``factory`` with the options, and with what is shared if it takes it."""
        taken = inspect.signature(factory).parameters
        return factory(**options, **{name: getattr(self, name) for name in SHARED if name in taken})


def _resolve(table: Mapping[str, str], name: Any, what: str) -> Callable[..., Any]:
    """The callable of a registered name, of an entry point, or of ``package.module:attribute``: the user's code."""
    name = str(name)
    if name in table or ":" in name:
        return _imported(table.get(name, name), f"{what} {name}")
    for point in entry_points(group=GROUPS[what], name=name):
        return _imported(
            point.value, f"{what} {name} (entry point of {point.dist.name if point.dist else 'a package'})"
        )
    known = sorted({*table, *entry_points(group=GROUPS[what]).names})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)}, and your own package.module:Class)")


def _imported(place: str, what: str) -> Callable[..., Any]:
    module, _, attribute = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if place.startswith("geoalign."):
            raise  # a requirement of ours, which the message names
        raise ConfigError(
            f"{what}: no module {error.name!r}; install it, or run with PYTHONPATH=FOLDER of the folder it lies in"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{what}: {module} has no {attribute!r}") from error
    if not callable(found):
        raise ConfigError(
            f"{what}: {place} is a {type(found).__name__}; a class or a function that builds one is needed"
        )
    return found


def _require(made: Any, protocol: type, what: str, needs: str) -> Any:
    """``made`` if it is what it has to be; what is not ours may be anything."""
    if not isinstance(made, protocol) or not callable(made):
        raise ConfigError(f"{what} gave a {type(made).__name__}, which needs {needs} (docs/api.md)")
    return made


def takes_evaluator(kind: str) -> bool:
    """Whether a registered reward is built on a pose evaluator; raises ConfigError for an unknown reward."""
    return EVALUATOR in inspect.signature(_resolve(REWARDS, kind, "reward")).parameters


def evaluator_options(name: str) -> set[str]:
    """Names of the options of a registered pose evaluator; raises ConfigError for an unknown one."""
    return inspect.signature(_resolve(EVALUATORS, name, "pose evaluator")).parameters.keys() - set(SHARED)


def _checked(factory: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``options`` as the types that ``factory`` declares (a YAML list becomes a tuple, an integer a float).

    Raises ConfigError for unknown options, missing ones, and values of another type.
    """
    parameters = {name: p for name, p in inspect.signature(factory).parameters.items() if name not in ("self", *SHARED)}
    for name in set(options) - set(parameters):
        near = difflib.get_close_matches(name, parameters, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: unknown option {name!r}{hint} (known: {', '.join(parameters)})")
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in options]
    if missing:
        raise ConfigError(f"{where}: needs {', '.join(missing)}")
    try:
        hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except NameError as error:  # imported for a type checker alone
        raise ConfigError(f"{where}: the type of an option cannot be read ({error}); import it at run time") from error
    return {
        name: value if name == EVALUATOR else _typed(hints.get(name, Any), value, f"{where}.{name}")
        for name, value in options.items()
    }


def _typed(hint: Any, value: Any, where: str) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"[{part}]" for part in problem["loc"] if isinstance(part, int))
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        raise ConfigError(f"{where}{place}: {message}, got {problem['input']!r}") from None


def build_evaluator(name: str, shared: Shared | None = None, /, **options: Any) -> PoseEvaluator:
    """Build a pose evaluator; names, options and errors are like those of :func:`build_reward`."""
    factory = _resolve(EVALUATORS, name, "pose evaluator")
    made = (shared or Shared()).build(factory, _checked(factory, options, f"pose evaluator {name}"))
    return _require(made, PoseEvaluator, f"pose evaluator {name}", "a name, and a call of (video, source)")


def build_reward(kind: str, options: Mapping[str, Any], shared: Shared | None = None) -> Reward:
    """Build one reward; what it needs of evaluators is taken from, and added to, ``shared``.

    Args:
        kind: a registered name, the name of an entry point, or ``package.module:Class`` of the user's own code.
        options: arguments of the reward, checked against its annotations; ``evaluator`` names a pose evaluator and
            ``evaluator_options`` are the arguments of that.
        shared: what the rewards of a run have in common.

    Raises:
        ConfigError: an unknown name or option, a value of another type, or something built that is no reward.
    """
    shared = shared or Shared()
    options, evaluator_options = _check_reward(f"reward {kind} options", kind, options)
    if EVALUATOR in options:
        key = f"{options[EVALUATOR]}:{sorted(evaluator_options.items())}"
        if key not in shared.evaluators:
            evaluator = build_evaluator(options[EVALUATOR], shared, **evaluator_options)
            shared.evaluators[key] = LastResult(evaluator)
        options[EVALUATOR] = shared.evaluators[key]
    made = shared.build(_resolve(REWARDS, kind, "reward"), options)
    return _require(made, Reward, f"reward {kind}", "a name, keys, and a call of (videos, batch)")


def evaluator_needs(name: str, options: Mapping[str, Any]) -> tuple[Need, ...]:
    """What a registered pose evaluator with these options reads from the disk."""
    return _imported(NEEDS[name], name)(**options) if name in NEEDS else ()


def reward_needs(where: str, kind: str, options: Mapping[str, Any]) -> tuple[Need, ...]:
    """What a reward and its evaluator read from the disk; nothing is built.

    Raises ConfigError, which names ``where``, for options that the reward or its evaluator does not take.
    """
    own, of_evaluator = _check_reward(where, kind, options)
    evaluator = evaluator_needs(str(own[EVALUATOR]), of_evaluator) if EVALUATOR in own else ()
    return evaluator + (_imported(NEEDS[kind], kind)(**own) if kind in NEEDS else ())


def build_rewards(
    configs: Mapping[str, RewardConfig], failures: FailureConfig | None = None, *, take_turns: bool = False
) -> dict[str, Reward]:
    """Build all rewards of a run. Inline rewards share one preprocessing pass over the pixels, and evaluators that are
    named alike with equal options.

    Args:
        configs: scorers by name.
        failures: time-out and retries; None leaves the rewards unguarded, so that they raise.
        take_turns: inline scorers keep their weights on the host and have them on the device one at a time.

    Raises:
        ConfigError: unknown reward, evaluator or option, a value of another type than the option's, an evaluator
            without what a reward reads, or two rewards that emit the same key.
        RewardError: a reward cannot be built (missing weights), here or in its worker.
    """
    shared = Shared(memory=ScorerMemory(take_turns=take_turns))
    for name, config in configs.items():
        _check_reward(f"rewards.{name}.options", config.kind, config.options)
    rewards: dict[str, Reward] = {}
    try:
        for name, config in configs.items():
            rewards[name] = _place(name, config, failures, shared)
    except BaseException:
        close_rewards(rewards)
        raise
    emitted = [key for reward in rewards.values() for key in reward.keys]
    twice = sorted({key for key in emitted if emitted.count(key) > 1})
    if twice:
        raise ConfigError(f"rewards: keys {twice} are emitted by more than one reward; remove one of them")
    if failures is None:
        return rewards
    guard = partial(GuardedReward, timeout_s=failures.timeout_s, retries=failures.retries)
    return {name: guard(reward) for name, reward in rewards.items()}


def close_rewards(rewards: Mapping[str, Reward]) -> None:
    """End the worker processes among ``rewards``."""
    for reward in rewards.values():
        inner = reward.reward if isinstance(reward, GuardedReward) else reward
        if isinstance(inner, WorkerReward):
            inner.close()


def _check_reward(where: str, kind: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checked options of a reward, and those of its evaluator; nothing is built."""
    options, evaluator_options = dict(options), {}
    if takes_evaluator(kind):
        evaluator_options = _typed(dict[str, Any], options.pop("evaluator_options", {}), f"{where}.evaluator_options")
    options = _checked(_resolve(REWARDS, kind, "reward"), options, where)
    if EVALUATOR not in options:
        return options, {}
    name = options[EVALUATOR]
    factory = _resolve(EVALUATORS, name, "pose evaluator")
    if kind == "source_consistency" and name in WITHOUT_RESIDUAL:
        known = ", ".join(sorted(set(EVALUATORS) - set(WITHOUT_RESIDUAL)))
        raise ConfigError(
            f"{where}: evaluator {name!r} measures no residual, so source_consistency would score 0 for every video; "
            f"use one of: {known}"
        )
    return options, _checked(factory, evaluator_options, f"{where}.evaluator_options")


def _place(name: str, config: RewardConfig, failures: FailureConfig | None, shared: Shared) -> Reward:
    if config.placement == "inline":
        return build_reward(config.kind, config.options, shared)
    limit = {} if failures is None or failures.timeout_s is None else {"timeout_s": failures.timeout_s}
    worker = WorkerReward(
        name,
        (),
        f"{__name__}:{build_reward.__name__}",
        options={"kind": config.kind, "options": config.options},
        python=config.python or sys.executable,
        environment=config.environment,
        **limit,
    )
    worker.start()
    return worker
