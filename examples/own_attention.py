"""The fused ops in an attention block of your own; needs only `pip install ./kernels`.

python examples/own_attention.py
"""

import torch
from torch import Tensor, nn

from geoalign_kernels import attention, gated_residual, modulated_norm, qk_norm_rotary, report


class Block(nn.Module):
    """x + gate * attention(norm(x)), with RMSNorm and rotary positions on queries and keys; x is [B, S, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, angles: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        h = modulated_norm(x, scale, shift)  # LayerNorm(x) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, S, H, hd] each, no copies
        q, k, v = qk_norm_rotary(q, k, v, self.norm_q, self.norm_k, angles)
        return gated_residual(x, self.out(attention(q, k, v).out.flatten(2)), gate)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    batch, tokens, dim, heads = 2, 120, 64, 4
    block = Block(dim, heads).to(device)
    angles = torch.outer(torch.arange(tokens), 10_000 ** -torch.linspace(0, 1, dim // heads // 2)).to(device)
    x = torch.randn(batch, tokens, dim, device=device)
    scale, shift, gate = torch.randn(3, batch, dim, device=device).mul(0.1).unbind()
    y = block(x, angles, scale, shift, gate)
    y.square().mean().backward()
    print(f"out {tuple(y.shape)}, gradient of the query norm {block.norm_q.grad.norm():.3g}")
    print("\n".join(f"{row['op']:<28} {row['backend']}" for row in report()))


if __name__ == "__main__":
    main()
