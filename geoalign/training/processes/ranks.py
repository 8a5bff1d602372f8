"""The processes of a run and what joins their results; one interface for one and many, real or simulated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from geoalign.config.layout import deal_groups
from geoalign.models.parallel import SequenceParallel
from geoalign.perf.timer import phase
from geoalign.rl.objective import RatioStats
from geoalign.rl.score import Scores

Operation = Literal["sum", "max", "min"]


class Ranks:
    """Joins the ranks. A subclass gives :meth:`collective`; every other method is built on it.

    Every rank calls every method in the same order whatever happened to its samples, so no collective is ever skipped.

    Attributes:
        rank, size: this process among all.
        sequence: neighbouring ranks that share the tokens of the same rollouts.
    """

    rank = 0
    size = 1
    sequence = 1

    def collective(self, tensor: Tensor, operation: Operation) -> Tensor:
        """``tensor`` reduced over the ranks (the argument may be overwritten)."""
        raise NotImplementedError

    def sequence_group(self) -> SequenceParallel | None:
        """What the ranks that share tokens exchange them by; None where every rank has all tokens."""
        return None

    def check_alive(self) -> None:
        """Raise RunError naming the ranks that do not answer; before long collectives, where a device would hang."""

    @property
    def data_rank(self) -> int:
        """Which share of the rollouts this rank holds."""
        return self.rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Which part of the tokens this rank holds."""
        return self.rank % self.sequence

    def all_reduce(self, tensor: Tensor, operation: Operation, what: str = "numbers") -> Tensor:
        """:meth:`collective`, timed as ``sync/<what>``."""
        with phase(f"sync/{what}"):
            return self.collective(tensor, operation)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_reduce(torch.zeros(1), "sum", "barrier")

    def sum(self, value: float) -> float:
        """The sum of one number over the shares of the rollouts, in float64."""
        mine = value if self.sequence_rank == 0 else 0.0
        return float(self.all_reduce(torch.tensor(mine, dtype=torch.float64), "sum"))

    def maximum(self, value: float) -> float:
        """The largest of one number over the ranks; NaN if any is NaN."""
        pair = torch.tensor([value, float(value != value)], dtype=torch.float64).nan_to_num(0.0)
        largest, poisoned = self.all_reduce(pair, "max").tolist()
        return float("nan") if poisoned else largest

    def join(self, stats: RatioStats) -> RatioStats:
        """Ratio statistics of all ranks; ranks that share tokens count the same pairs once each."""
        names: dict[Operation, list[str]] = {"sum": [], "max": [], "min": []}
        for field in fields(stats):
            kind = field.name.rpartition("_")[2]
            names["max" if kind == "max" else "min" if kind == "min" else "sum"].append(field.name)
        joined: dict[str, Tensor] = {}
        for operation, some in names.items():
            values = [getattr(stats, name) for name in some]
            together = self.all_reduce(torch.stack([value.double() for value in values]), operation)
            joined |= {n: new.to(old.dtype) for n, new, old in zip(some, together, values, strict=True)}
        return RatioStats(**joined)

    def union(self, names: Iterable[str]) -> list[str]:
        """All names that any rank has, sorted: equal on every rank."""
        mine = torch.frombuffer(bytearray("\n".join(sorted(names)).encode() + b"\n"), dtype=torch.uint8)
        longest = int(self.all_reduce(torch.tensor(len(mine)), "max"))
        texts = torch.zeros(self.size, longest, dtype=torch.uint8)
        texts[self.rank, : len(mine)] = mine
        lines = bytes(self.all_reduce(texts, "sum").flatten().tolist()).replace(b"\0", b"").decode().split("\n")
        return sorted(set(lines) - {""})

    def sum_tensors(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """Tensors of equal dtype summed over all ranks in one flat collective."""
        flat = self.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), "sum", what)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


class LocalRanks(Ranks):
    """One process: nothing to join."""

    def collective(self, tensor: Tensor, operation: Operation) -> Tensor:
        """The tensor itself."""
        return tensor


@dataclass(frozen=True, slots=True)
class RankRows:
    """The part of an iteration that one rank runs.

    Attributes:
        group_ids: ``[M]`` global ids of its groups.
        member_ids: ``[G']`` ids of its members inside each group.
        group_size: G of the whole group.
        conditions: groups of the iteration over all ranks.
        scored: ``[R']`` indices of the local rows that this rank decodes and scores: all of them, unless other ranks
            hold the same rollouts.
    """

    group_ids: Tensor
    member_ids: Tensor
    group_size: int
    conditions: int
    scored: Tensor

    @property
    def rows(self) -> Tensor:
        """``[M * G']`` global row (group * G + member) of each local row."""
        return (self.group_ids[:, None] * self.group_size + self.member_ids).flatten()

    @property
    def whole(self) -> bool:
        """Whether groups lie whole on their rank."""
        return self.member_ids.numel() == self.group_size

    @staticmethod
    def of(conditions: int, size: int, ranks: Ranks) -> RankRows:
        """The share of ``ranks``; raises ConfigError if the groups cannot be dealt equally."""
        share = deal_groups(conditions, size, ranks.size, ranks.sequence)
        rows = torch.arange(share.groups * share.members)
        groups_before, first_member = ranks.data_rank * share.groups, 0
        if share.members < size:
            groups_before, part = divmod(ranks.data_rank, size // share.members)
            first_member = part * share.members
        return RankRows(
            torch.arange(groups_before, groups_before + share.groups),
            torch.arange(first_member, first_member + share.members),
            size,
            conditions,
            rows.tensor_split(ranks.sequence)[ranks.sequence_rank],
        )


def gather_scores(ranks: Ranks, local: RankRows, scores: Scores) -> Scores:
    """From scores of the local rows ``local.scored`` to those of all ranks: in global row order, on the CPU.

    One sum of a float64 buffer that is zero outside the own rows, so values arrive bit for bit and advantages do not
    depend on the layout. A scorer that failed on a rank gives fewer names there, in another order: the ranks agree on
    the names first. ``failures`` are summed and ``seconds`` are those of the slowest rank.
    """
    tables = ("scores", "parts", "diagnostics")
    columns = {f"{table}/{name}": value for table in tables for name, value in getattr(scores, table).items()}
    names = ranks.union(columns)
    buffer = torch.zeros(2 + len(names), local.conditions * local.group_size, dtype=torch.float64)
    rows = local.rows[local.scored]
    buffer[0, rows], buffer[1, rows] = scores.valid.double().cpu(), scores.lost.double().cpu()
    for number, name in enumerate(names, start=2):
        if name in columns:
            buffer[number, rows] = columns[name].double().cpu()  # NaN stays NaN, in its own row: not defined there
    gathered = ranks.all_reduce(buffer, "sum", "scores")
    joined: dict[str, dict[str, Tensor]] = {table: {} for table in tables}
    for number, name in enumerate(names, start=2):
        table, _, key = name.partition("/")
        joined[table][key] = gathered[number]
    counts = ranks.all_reduce(torch.tensor([*scores.failures.values()], dtype=torch.float64), "sum", "scores")
    return replace(
        scores,
        valid=gathered[0] > 0,
        lost=gathered[1] > 0,
        **joined,
        failures=dict(zip(scores.failures, map(int, counts.tolist()), strict=True)),
        seconds={name: ranks.maximum(value) for name, value in scores.seconds.items()},
    )
