"""geoalign_kernels by itself: an attention prologue with its gradient, one sampler step, and what runs where.

pip install ./kernels && python examples/kernels_alone.py
"""

import torch

from geoalign_kernels import NoiseKey, attention, flow_step, qk_norm_rotary, report

device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (torch.randn(2, 96, 4, 64, device=device, requires_grad=True) for _ in range(3))
weight, angles = torch.ones(4 * 64, device=device), torch.rand(96, 32, device=device)
turned = qk_norm_rotary(q, k, v, weight, weight, angles)  # RMSNorm over all heads, rotary positions: one kernel
attention(*turned).out.square().mean().backward()
print("gradient of q:", float(q.grad.norm()))

x, velocity = torch.randn(2, 16, 5, 8, 8, device=device), torch.randn(2, 16, 5, 8, 8, device=device)
members = torch.arange(2, device=device)
step = flow_step(x, velocity, (0.98, -0.05, 0.2, 0.0), key=NoiseKey(0, 0, 7, members, step=3))  # noise by counter
print("log-probability of each sample:", step.log_prob.tolist())
for row in report(device):
    print(f"{row['op']:>28} runs on {row['backend']}")
