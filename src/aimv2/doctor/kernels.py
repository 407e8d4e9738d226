"""Check attention backends and torch.compile on a few tokens.

Legend: B samples, H heads, N positions, d head dim.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.doctor.check import Check
from aimv2.errors import first_line

SHAPE = (2, 2, 32, 64)  # B, H, N, d
REQUIRED = "math"  # the fallback of all others
TOLERANCE = 1e-4  # for a compiled function in fp32


def training_device() -> torch.device:
    """The device that a run would train on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention() -> Iterator[Check]:
    """Check which attention backends work, forward and backward."""
    device = training_device()
    for name, attend in backends().items():
        passes, why = try_backend(attend, device)
        if len(passes) == 2:
            yield Check("kernels", name, "ok", f"forward and backward on {device}")
        elif name == REQUIRED:
            found = f"{' and '.join(passes) or 'nothing'} works on {device}: {why}"
            yield Check("kernels", name, "fail", found, "reinstall torch: https://pytorch.org/get-started/locally")
        elif name == "flash" and device.type == "cuda":
            advice = "a GPU of compute capability 8.0 or more has it; others use a slower backend"
            yield Check("kernels", name, "warn", f"not on this GPU: {why}", advice)
        else:
            yield Check("kernels", name, "off", f"{'only ' + ' and '.join(passes) if passes else 'not'} on {device}")


def backends() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> attention of q, k, v [B, H, N, d]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def fixed(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    return {
        REQUIRED: fixed(SDPBackend.MATH),
        "flash": fixed(SDPBackend.FLASH_ATTENTION),
        "efficient": fixed(SDPBackend.EFFICIENT_ATTENTION),
        "flex": flex,
        "varlen": varlen,
    }


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention, not compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    out = flex_attention(q, k, v)
    assert isinstance(out, Tensor)
    return out


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Variable-length attention without padding."""
    from torch.nn.attention.varlen import varlen_attn

    batch, _, length, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * N, H, d]
    starts = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * length
    out = varlen_attn(q, k, v, starts, starts, length, length)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


def try_backend(attend: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device) -> tuple[list[str], str]:
    """Passes (forward, backward) that work and agree with a reference, and the error of the first that does not."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(SHAPE, generator=generator).to(device, kind) for _ in range(3))
    wanted = torch.softmax(q.float() @ k.float().transpose(-1, -2) / SHAPE[-1] ** 0.5, -1) @ v.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about each backend that it skips
        try:
            with torch.no_grad():
                off = (attend(q, k, v).float() - wanted).abs().max().item()
            if off > (0.05 if kind == torch.bfloat16 else TOLERANCE):
                return [], f"differs from plain attention by {off:.2g}"
        except Exception as error:  # anything that a backend raises on this device
            return [], first_line(error)
        try:
            attend(q.requires_grad_(), k, v).float().sum().backward()
        except Exception as error:
            return ["forward"], first_line(error)
    return ["forward", "backward"], ""


def compiled() -> Check:
    """Check that torch.compile finds its compiler and agrees with eager mode."""
    device, name = training_device(), "torch.compile"
    compiler = compiler_name(device)
    advice = "install a C++ compiler, such as g++ (apt install g++); until then runs are eager, about a sixth slower"
    if device.type == "cuda":
        advice = "install the triton version that your build of torch requires; until then runs are eager"
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(device)
            with torch.no_grad():
                off = (torch.compile(sample)(x) - sample(x)).abs().max().item()
    except Exception as error:  # missing compiler, headers, Triton, ..
        return Check("kernels", name, "warn", f"{compiler}: {first_line(error)}", advice)
    seconds = time.perf_counter() - began
    if off > TOLERANCE:
        advice = "train with train.compile=off, and report it"
        return Check("kernels", name, "fail", f"{compiler}: differs from eager by {off:.2g}", advice, seconds)
    return Check("kernels", name, "ok", f"{compiler}; equals eager", seconds=seconds)


def sample(x: Tensor) -> Tensor:
    """The compiled function: a norm, a gate, a matmul."""
    return F.silu(F.rms_norm(x, x.shape[-1:])) * x @ x.T


def compiler_name(device: torch.device) -> str:
    """The compiler that torch.compile uses."""
    if device.type == "cuda":
        return "Triton"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return get_cpp_compiler()
    except Exception:  # none found, or another version's API
        return "no C++ compiler"
