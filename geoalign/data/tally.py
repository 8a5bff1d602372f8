"""Counting what a data set offers and why parts of it cannot be used: defects are skipped and listed, never silent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from geoalign.errors import DataError

_LISTED = 5


@dataclass(slots=True)
class Tally:
    """Accepted items, rejected items with their cause, and remarks on accepted ones.

    Attributes:
        what: plural noun for messages ("clips", "camera paths").
        accepted: number of usable items.
        rejected: item name -> cause, each item once (the first cause counts).
        remarks: cause -> number of items that are used although something is odd about them.
    """

    what: str
    accepted: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)

    def reject(self, item: str, cause: str) -> None:
        """Count ``item`` as unusable."""
        self.rejected.setdefault(item, cause)

    @property
    def causes(self) -> dict[str, int]:
        """Cause -> number of rejected items, most frequent first."""
        return dict(Counter(self.rejected.values()).most_common())

    @property
    def bad_fraction(self) -> float:
        """Rejected over all items; 0 if there are none."""
        total = self.accepted + len(self.rejected)
        return len(self.rejected) / total if total else 0.0

    def check(self, max_bad_fraction: float) -> None:
        """Raise DataError with counts by cause and examples if too much is unusable."""
        if self.bad_fraction > max_bad_fraction:
            raise DataError(
                f"{len(self.rejected)} of {self.accepted + len(self.rejected)} {self.what} cannot be used, more than "
                f"the allowed fraction {max_bad_fraction:g}:\n{self.summary()}"
            )

    def summary(self) -> str:
        """A few lines for people: counts, causes and examples."""
        lines = [f"{self.accepted} {self.what} usable, {len(self.rejected)} rejected"]
        for cause, count in self.causes.items():
            examples = [item for item, reason in self.rejected.items() if reason == cause][:_LISTED]
            lines.append(f"  {count} x {cause}: {', '.join(examples)}{', ...' if count > len(examples) else ''}")
        lines += [f"  ({count} x used although: {remark})" for remark, count in self.remarks.most_common()]
        return "\n".join(lines)
