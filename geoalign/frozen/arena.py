"""Fixed addresses for scorers that take turns: one device buffer that holds the weights of one scorer at a time.

CUDA graphs record weight addresses, so ``module.cpu()`` and back would break them. Here every scorer keeps its weights
on the host and owns fixed offsets in a shared device buffer; bringing a scorer back is one copy to the same addresses.
The device cost is the largest scorer instead of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from geoalign.errors import UsageError
from geoalign.frozen.graphed import CaptureBackend, CudaGraphBackend

# CUDA allocations and vectorised loads want at least this alignment, in bytes.
_ALIGNMENT = 256


class WeightArena:
    """Weights of several frozen modules in one device buffer, one module resident at a time.

    Building the arena moves all parameters and buffers of ``modules`` into it (their addresses are final from then on)
    and keeps the master copy in host memory, page-locked where the device is CUDA. No module is resident at first.

    Args:
        modules: frozen modules by name; a tensor shared inside one module is stored once.
        device: where the buffer lives.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device | str) -> None:
        device = torch.device(device)
        self._host = {name: _pack(module, pin=device.type == "cuda") for name, module in modules.items()}
        self._buffer = torch.empty(
            max((flat.numel() for flat in self._host.values()), default=0), dtype=torch.uint8, device=device
        )
        self.resident: str | None = None
        for module in modules.values():
            for tensor, start, size in _offsets(module)[0]:
                tensor.data = self._buffer[start : start + size].view(tensor.dtype).view(tensor.shape)

    @property
    def device_bytes(self) -> int:
        """Bytes of the shared device buffer."""
        return self._buffer.numel()

    def activate(self, name: str) -> None:
        """Make ``name`` the resident module; a no-op when it is. Ordered after earlier work of the current stream."""
        if name not in self._host:
            raise UsageError(f"no scorer {name!r} in this arena (it holds {', '.join(sorted(self._host))})")
        if self.resident != name:
            flat = self._host[name]
            self._buffer[: flat.numel()].copy_(flat, non_blocking=True)
            self.resident = name


class ScorerMemory:
    """What the scorers of a run share: the pool of their graphs and, if they take turns, the device memory of weights.

    The arena is made when the first scorer runs, so scorers can be built one after another.

    Args:
        take_turns: keep weights in host memory and bring those of one scorer at a time to the device.
    """

    def __init__(self, *, take_turns: bool = False) -> None:
        self.capture: CaptureBackend = CudaGraphBackend()
        self.take_turns = take_turns
        self.arena: WeightArena | None = None
        self._modules: dict[str, nn.Module] = {}

    def enter(self, module: nn.Module) -> Callable[[], None]:
        """What ``module``'s scorer must call before every run.

        Raises UsageError once a scorer has run: the arena has the size of the modules that entered before.
        """
        if not self.take_turns:
            return _nothing
        if self.arena is not None:
            raise UsageError("a scorer cannot join others that already take turns; build all of them first")
        name = str(len(self._modules))
        self._modules[name] = module
        return lambda: self._bring(name)

    def _bring(self, name: str) -> None:
        if self.arena is None:
            self.arena = WeightArena(self._modules, next(self._modules[name].parameters()).device)
        self.arena.activate(name)


def _nothing() -> None:
    """Weights that stay need nothing."""


def _offsets(module: nn.Module) -> tuple[list[tuple[Tensor, int, int]], int]:
    """(tensor, first byte, bytes) of all parameters and buffers, aligned, and the total size."""
    places, end = [], 0
    for tensor in (*module.parameters(), *module.buffers()):
        size = tensor.numel() * tensor.element_size()
        places.append((tensor, end, size))
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _pack(module: nn.Module, *, pin: bool) -> Tensor:
    """All weights of ``module`` as one host byte tensor."""
    places, total = _offsets(module)
    flat = torch.zeros(total, dtype=torch.uint8, pin_memory=pin)
    for tensor, start, size in places:
        flat[start : start + size].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
    return flat
