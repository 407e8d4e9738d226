"""fp32 matrix products on a CPU: the faster library, where it stays true fp32."""

from __future__ import annotations

import torch
from torch import nn

FP32_ERROR = 2e-6  # largest relative error of a 512-wide product that is still fp32; bf16 has 1e-3


def fast_products(device: str | torch.device = "cpu") -> str:
    """Lets a CPU use oneDNN for fp32 products where that stays true fp32 (it is the faster library there).

    A setting of the whole process, so loading a model leaves it alone: training and the command line call this, other
    programs may. ``medium`` allows lower precision; whether the library takes that liberty depends on the processor, so it
    is tried: a product is compared with fp64, and the setting kept only if its error is that of fp32.

    Args:
        device: where the products will run; on anything but a CPU nothing is changed.

    Returns:
        the precision in force, ``medium`` or ``highest``.
    """
    if torch.device(device).type != "cpu":
        return torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(512, 512, generator=draw) for _ in range(2))
    exact = x.double() @ weight.double().T
    error = (nn.functional.linear(x, weight).double() - exact).abs().max() / exact.abs().max()
    if error > FP32_ERROR:
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()
