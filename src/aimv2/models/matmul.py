"""Faster fp32 matmuls on a CPU where they stay true fp32."""

from __future__ import annotations

import torch
from torch import nn
from torch._guards import detect_fake_mode

FP32_ERROR = 2e-6  # largest relative error of a 512-wide matmul that is still fp32; bf16 has 1e-3


def fast_matmul(device: str | torch.device = "cpu") -> str:
    """Let a CPU use oneDNN, the faster library, for fp32 matmuls where that stays true fp32.

    A setting of the whole process, so loading a model does not touch it: training and the command line call this, other
    programs may. ``medium`` allows lower precision, and whether oneDNN uses it depends on the processor: one matmul is
    compared with fp64, and the setting is kept only if the error is that of fp32.

    Args:
        device: where the matmuls will run; anything but a CPU changes nothing.

    Returns:
        the precision in force, ``medium`` or ``highest``.
    """
    if torch.device(device).type != "cpu" or detect_fake_mode() is not None:  # tensors without values can't be compared
        return torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = x.double() @ weight.double().T
    error = (nn.functional.linear(x, weight).double() - exact).abs().max() / exact.abs().max()
    if error > FP32_ERROR:
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()
