"""The integer words of the kernels' generator, for the interpreter suite and the GPU suite."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from geoalign_kernels.ops.flow_step.triton_impl import philox_block
from geoalign_kernels.philox import philox_words

KEY, SAMPLE, GROUP, STEP = (0xFEDCBA98, 3), 2**31 + 5, 2**32 - 1, 7 + (3 << 16)


@triton.jit
def words_kernel(Out, k0, k1, step, sample, group, BLOCK: tl.constexpr):
    block, zero = tl.arange(0, BLOCK).to(tl.uint32), tl.zeros((BLOCK,), tl.uint32)
    words = philox_block(
        block, zero + step.to(tl.uint32), zero + sample.to(tl.uint32), zero + group.to(tl.uint32),
        zero + k0.to(tl.uint32), zero + k1.to(tl.uint32),
    )  # fmt: skip
    for w in tl.static_range(4):
        tl.store(Out + w * BLOCK + tl.arange(0, BLOCK), words[w].to(tl.int64))


def assert_words_equal(device: str, count: int) -> None:
    """The first `count` blocks of one counter, bit for bit, with ids that fill all 32 bits."""
    out = torch.empty(4, count, dtype=torch.int64, device=device)
    words_kernel[(1,)](out, *KEY, STEP, SAMPLE, GROUP, BLOCK=count)
    counter = tuple(torch.tensor(c) for c in (list(range(count)), [STEP], [SAMPLE], [GROUP]))
    assert torch.equal(out.cpu(), torch.stack(philox_words(counter, KEY)))
