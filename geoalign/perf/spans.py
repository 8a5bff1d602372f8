"""Named ranges for Nsight (NVTX domain ``geoalign``) and the torch profiler; nearly free while nobody watches.

Names form a tree by their slashes: ``rollout/{encode,prefix,window,tail,decode}``, ``reward/<name>``,
``update/{forward,backward,optimizer}``, ``sync/*``. The first part is the NVTX category.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

import torch

try:
    import nvtx
except ImportError:  # not on the machine, e.g. a stripped container: ranges then reach the torch profiler only
    nvtx = None

DOMAIN = "geoalign"


class span:
    """Context manager that names a stretch of work for Nsight and for the torch profiler.

    It never touches ``torch.cuda``: the ``nvtx`` package talks to the tool itself and does nothing when none is
    attached, so the same code runs on machines without a driver.
    """

    __slots__ = ("_record", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._record: Any = None

    def __enter__(self) -> span:
        if nvtx is not None:
            domain, attributes = _attributes(self.name)
            domain.push_range(attributes)
        if torch.autograd.profiler._is_profiler_enabled:
            self._record = torch.profiler.record_function(self.name)
            self._record.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._record is not None:
            self._record.__exit__(kind, error, trace)
            self._record = None
        if nvtx is not None:
            _attributes(self.name)[0].pop_range()


@functools.lru_cache(maxsize=1024)
def _attributes(name: str) -> tuple[Any, Any]:
    """Build the domain and event attributes of a name once: a push then costs about a microsecond."""
    assert nvtx is not None
    domain = nvtx.get_domain(DOMAIN)
    return domain, domain.get_event_attributes(message=name, category=name.partition("/")[0])
