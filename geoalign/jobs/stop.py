"""A clean stop on SIGINT or SIGTERM: the iteration in hand is finished and its checkpoint written."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from geoalign.training.processes.launcher import started_by_launcher


@dataclass(slots=True)
class StopRequest:
    """Set by the first SIGINT or SIGTERM.

    Attributes:
        signal_name: of the first signal; empty before.
        presses: number of SIGINT so far.
    """

    signal_name: str = ""
    presses: int = 0

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle the signals inside the block.

        Any number of SIGTERM is one: a scheduler signals every process of a job, and torchrun passes on to the workers
        what they already got, a moment or seconds later. A second SIGINT, which a person sent, raises KeyboardInterrupt
        at once; of torchrun's workers the third, for torchrun passes on Ctrl-C too. After a stop SIGTERM stays ignored,
        so that a late one does not end the process with another exit code while it closes down.
        """
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, old in before.items():
                signal.signal(number, old)
            if self.signal_name:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _handle(self, number: int, _: Any) -> None:
        self.presses += number == signal.SIGINT
        if self.presses > (2 if "TORCHELASTIC_RUN_ID" in os.environ else 1):
            raise KeyboardInterrupt
        if not self.signal_name:
            self.signal_name = signal.Signals(number).name
            if started_by_launcher() and os.environ["RANK"] != "0":
                return  # every rank got it, one says so
            # Not print: the signal may have come while a line was being written, and buffered files refuse to nest.
            text = f"\n{self.signal_name}: stopping after this iteration (Ctrl-C again: at once)\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
