"""What rank 0 sees of a run while it trains: metrics, films, the line of an iteration, a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from geoalign.config.schema import Config
from geoalign.errors import Refusal
from geoalign.files.atomic import atomic_write_json
from geoalign.jobs.metrics_file import MetricsWriter
from geoalign.jobs.progress import RunProgress
from geoalign.jobs.train_films import FilmWriter
from geoalign.jobs.train_profile import profiled
from geoalign.report.run_folder import STOPPED
from geoalign.training.trainer import Trainer


class Watch:
    """How an iteration is watched; this one does nothing."""

    def iteration(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Around the next step of ``trainer``."""
        return nullcontext()

    def saw(self, trainer: Trainer, numbers: Mapping[str, float]) -> None:
        """The step has ended with these metrics; ``trainer`` counts it already."""

    def refused(self, error: Refusal) -> None:
        """The step was given up, and the run ends with ``error``."""


@dataclass(frozen=True, slots=True)
class _MainWatch(Watch):
    """Writes into the run folder and to whoever reads the terminal.

    Attributes:
        profile: iteration, from 0, of which a trace is written.
    """

    folder: Path
    profile: int | None
    metrics: MetricsWriter
    films: FilmWriter
    progress: RunProgress

    def iteration(self, trainer: Trainer) -> AbstractContextManager[None]:
        trainer.film_wanted = self.films.due(trainer.iteration)
        return profiled(trainer, self.folder) if trainer.iteration == self.profile else nullcontext()

    def saw(self, trainer: Trainer, numbers: Mapping[str, float]) -> None:
        iteration = trainer.iteration - 1
        self.metrics.write(iteration, numbers)
        if trainer.film is not None:
            self.films.write(iteration, trainer.film)
        self.metrics.add_films(self.films.finished())
        self.progress.tell(trainer.iteration, numbers)

    def refused(self, error: Refusal) -> None:
        self.metrics.write(error.iteration, error.numbers)
        told = {"iteration": error.iteration, "reason": str(error), "repeats": error.repeats}
        atomic_write_json(self.folder / STOPPED, told)


@contextmanager
def watched(config: Config, trainer: Trainer, profile: int | None) -> Iterator[Watch]:
    """The watch of this rank over the rest of the run; at its end, unless an error ended it, films are waited for.

    Args:
        config: resolved configuration of the run.
        trainer: stands before the first iteration that is watched.
        profile: iteration, from 0, of which rank 0 writes a trace.
    """
    if trainer.ranks.rank != 0:
        yield Watch()
        return
    folder, total = config.run.folder, config.train.iterations
    (folder / STOPPED).unlink(missing_ok=True)  # of an earlier part of the run, whose last row the writer drops
    with (
        MetricsWriter(folder, config.run, trainer.iteration) as metrics,
        FilmWriter(folder, config.run, total, trainer.iteration) as films,
        RunProgress(total, trainer.iteration) as progress,
    ):
        yield _MainWatch(folder, profile, metrics, films, progress)
        metrics.add_films(films.finished(wait=True))
