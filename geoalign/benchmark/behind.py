"""What stands behind a cell of a table: the cases whose numbers it sums up, the worst first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from geoalign.benchmark.columns import Column, Row


@dataclass(frozen=True, slots=True, eq=False)
class Behind:
    """The cases of one cell.

    Attributes:
        column: which number of each.
        rows: of one method; a case occurs once.
        base: of the method that is subtracted, where the cell is a difference.
        counted: the cell counts cases, so that those without a number stand behind it too.
    """

    column: Column
    rows: Sequence[Row]
    base: Sequence[Row] | None = None
    counted: bool = False

    def worst_first(self) -> list[tuple[Row, float | None]]:
        """Each case with its number, of a pair the difference. NaN: it failed, or lacks its partner, and comes first.

        Cases where the number is not defined (TransErr of a path that turns in place) stand behind no mean, nor here;
        behind a count they come last, with None.
        """
        found = self._alone() if self.base is None else self._paired(self.base)
        return [(row, value) for _, row, value in sorted(found, key=lambda item: (-item[0], item[1]["case"]))]

    def _alone(self) -> list[tuple[float, Row, float | None]]:
        found = ((row, self.column.of(row)) for row in self.rows)
        return [
            (-math.inf if value is None else self.column.badness(value), row, value)
            for row, value in found
            if self.counted or value is not None
        ]

    def _paired(self, base: Sequence[Row]) -> list[tuple[float, Row, float | None]]:
        ours, theirs = ({row["case"]: row for row in rows} for rows in (self.rows, base))
        found: list[tuple[float, Row, float | None]] = []
        for case, row in (theirs | ours).items():
            new, old = (self.column.of(side[case]) if case in side else None for side in (ours, theirs))
            if new is not None and old is not None and math.isfinite(new) and math.isfinite(old):
                found.append((self.column.badness(new) - self.column.badness(old), row, new - old))
            elif new is not None or old is not None:
                found.append((math.inf, row, math.nan))
        return found
