"""A captured call replays with the values, the layout and every kind of argument that it had."""

from __future__ import annotations

import json
from pathlib import Path

from profiling_runs import script


def test_captured_calls_replay_with_their_values_and_layout(tmp_path: Path) -> None:
    import torch

    from geoalign_kernels.capture import load

    program = (
        "import torch, geoalign_kernels as gk; torch.manual_seed(3)\n"
        "for _ in range(3):\n"
        "    q, k, v = torch.randn(1, 5, 3, 2, 16).unbind(2)\n"
        "    gk.qk_norm_rotary(q, k, v, torch.ones(32), torch.ones(32), None, inplace=True)\n"
    )
    done = script("-c", program, GEOALIGN_CAPTURE=f"qk_norm_rotary_:1:1:{tmp_path}")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == "qk_norm_rotary_-00001.safetensors"
    op, args = load(path, "cpu")
    torch.manual_seed(3)
    packed = [torch.randn(1, 5, 3, 2, 16) for _ in range(2)][1]
    assert op == "qk_norm_rotary_" and torch.equal(args[0], packed[:, :, 0])  # the inputs, before the op overwrote them
    assert args[0].stride() == packed[:, :, 0].stride() and args[2] is None
    replayed = script("profiling/replay.py", str(path), "--repeats", "2")
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads(replayed.stdout)["rel_l2"] == 0.0
    broken = script("-c", program, GEOALIGN_CAPTURE="qk_norm_rotary_:all")
    assert "op:first:last" in broken.stderr


def test_every_kind_of_argument_survives_a_capture(tmp_path: Path) -> None:
    """A dtype, lists of flags and of key words, host coefficients, absent tensors, a named core."""
    program = (
        "import torch, geoalign_kernels as gk\n"
        "x, y, w = (torch.randn(1, 3, 8, requires_grad=True) for _ in range(3))\n"
        "gk.modulated_norm(x, w[:, 0], w[:, 1], dtype=torch.bfloat16).float().sum().backward()\n"
        "gk.unrotate_gate_norm(y, x, w[0, 0], w[0, 1], w[0, 2], heads=2)[1].sum().backward()\n"
        "gk.flow_step(x, y, (0.9, -0.1, 0.3, 0.0), key=gk.NoiseKey(1, 2, 3, 4, 5)).log_prob.sum().backward()\n"
        "q = torch.randn(1, 5, 2, 16, requires_grad=True)\n"
        "gk.attention(q, q, q, core='sdpa_flash').out.sum().backward()\n"
        "with torch.no_grad(): gk.attention(q, q, q, mode='int8_fp8')\n"
    )
    ops = ("modulated_norm", "unrotate_gate_norm_backward", "flow_step", "flow_log_prob_backward", "attention_backward",
           "attention_int8_fp8")  # fmt: skip
    for op in ops:
        done = script("-c", program, GEOALIGN_CAPTURE=f"{op}:0:0:{tmp_path}")
        assert done.returncode == 0, done.stderr
        replayed = script("profiling/replay.py", str(tmp_path / f"{op}-00000.safetensors"), "--repeats", "2")
        assert replayed.returncode == 0, replayed.stderr
        row = json.loads(replayed.stdout)
        # the same code on the same numbers, but for attention, whose reference is another core
        assert row["op"] == op and row["rel_l2"] <= (1e-5 if op == "attention_backward" else 0.0)
    refused = script(
        "profiling/replay.py", str(tmp_path / "flow_step-00000.safetensors"), "--device", "cpu", "--profile"
    )
    assert refused.returncode == 2 and "CUDA profiler" in refused.stderr
