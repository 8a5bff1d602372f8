"""Where the samples of an iteration run, and how ranks join their results; one interface for one and many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from geoalign.errors import ConfigError
from geoalign.rl.objective import RatioStats
from geoalign.rl.score import Scores


class Engine:
    """Joins the ranks. A subclass gives :meth:`all_reduce`; every other method is built on it.

    Every rank calls every method in the same order whatever happened to its samples, so no collective is ever skipped.

    Attributes:
        rank, world_size: this process among all.
    """

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max", "min"]) -> Tensor:
        """``tensor`` reduced over the ranks (the argument may be overwritten)."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)

    def sum(self, value: float) -> float:
        """The sum of one number over the ranks, in float64."""
        return float(self.all_reduce(torch.tensor(value, dtype=torch.float64), "sum"))

    def maximum(self, value: float) -> float:
        """The largest of one number over the ranks; NaN if any is NaN."""
        poisoned = self.sum(float(value != value))
        largest = float(self.all_reduce(torch.tensor(value, dtype=torch.float64), "max"))
        return float("nan") if poisoned else largest

    def join(self, stats: RatioStats) -> RatioStats:
        """Ratio statistics of all ranks."""
        joined = {}
        for field in fields(stats):
            kind = field.name.rpartition("_")[2]
            operation: Literal["sum", "max", "min"] = "max" if kind == "max" else "min" if kind == "min" else "sum"
            joined[field.name] = self.all_reduce(getattr(stats, field.name).clone(), operation)
        return RatioStats(**joined)

    def reduce_gradients(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Sum the gradients over the ranks, one flat collective per dtype.

        Losses carry the global denominator, hence a sum; a parameter without gradient on this rank counts as zero.
        """
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in trained.values():
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = self.all_reduce(torch.cat([part.flatten() for part in parts]), "sum")
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter).clone()


class LocalEngine(Engine):
    """One process: nothing to join."""

    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max", "min"]) -> Tensor:
        """The tensor itself."""
        return tensor

    def reduce_gradients(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Gradients are complete already."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The part of an iteration that one rank runs.

    Attributes:
        group_ids: ``[M]`` global ids of its groups.
        member_ids: ``[G']`` ids of its members inside each group.
        group_size: G of the whole group.
        conditions: groups of the iteration over all ranks.
    """

    group_ids: Tensor
    member_ids: Tensor
    group_size: int
    conditions: int

    @property
    def rows(self) -> Tensor:
        """``[M * G']`` global row (group * G + member) of each local row."""
        return (self.group_ids[:, None] * self.group_size + self.member_ids).flatten()


def place_groups(conditions: int, size: int, rank: int, world_size: int) -> Placement:
    """Whole groups on a rank if ranks divide them, else each group split over equally many ranks.

    Raises:
        ConfigError: neither is possible without idle ranks.
    """
    if conditions % world_size == 0:
        share = conditions // world_size
        return Placement(torch.arange(rank * share, (rank + 1) * share), torch.arange(size), size, conditions)
    ranks_per_group, rest = divmod(world_size, conditions)
    if rest or size % ranks_per_group:
        raise ConfigError(
            f"{conditions} groups of {size} do not divide over {world_size} ranks: groups.conditions must be a "
            "multiple of the ranks, or the ranks a multiple of it with groups.size divisible by the quotient"
        )
    group, part = divmod(rank, ranks_per_group)
    share = size // ranks_per_group
    return Placement(torch.tensor([group]), torch.arange(part * share, (part + 1) * share), size, conditions)


def gather_scores(engine: Engine, place: Placement, scores: Scores) -> Scores:
    """The scores of all ranks in global row order, equal on every rank.

    One sum of a buffer that is zero outside the own rows, so values arrive bit for bit and advantages do not depend on
    the layout. ``failures`` are summed and ``seconds`` are those of the slowest rank.
    """
    if engine.world_size == 1:
        return scores
    tables = (scores.scores, scores.parts, scores.diagnostics)
    total = place.conditions * place.group_size
    columns = [scores.valid.double(), *(value.double() for table in tables for value in table.values())]
    buffer = torch.zeros(len(columns), total, dtype=torch.float64)
    # Values of failed rows may be NaN, which a sum would spread; they are excluded by ``valid`` everywhere.
    buffer[:, place.rows] = torch.nan_to_num(torch.stack([column.cpu() for column in columns]))
    gathered = iter(engine.all_reduce(buffer, "sum"))
    valid = next(gathered) > 0
    joined = [{name: next(gathered).to(value.dtype) for name, value in table.items()} for table in tables]
    failures = {name: int(engine.sum(float(count))) for name, count in scores.failures.items()}
    seconds = {name: engine.maximum(value) for name, value in scores.seconds.items()}
    return replace(
        scores,
        valid=valid,
        scores=joined[0],
        parts=joined[1],
        diagnostics=joined[2],
        failures=failures,
        seconds=seconds,
    )
