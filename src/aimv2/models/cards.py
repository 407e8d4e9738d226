"""Accelerators: peak FLOP/s, memory and bandwidth. Imports no torch.

Each row names the vendor's data sheet; the figures were taken from copies of it in public code and tables, not from the sheet itself.
Peaks are dense (no structured sparsity, which data sheets of NVIDIA often count in: half of their figure) and, of GeForce cards, with
accumulation in fp32, as training uses.
"""

from __future__ import annotations

from dataclasses import dataclass

from aimv2.errors import UsageError, nearest


@dataclass(frozen=True)
class Card:
    """An accelerator.

    Attributes:
        title: as people write it.
        parts: of its device name, all of which must be in it; the first card of :data:`CARDS` that fits is meant.
        bf16, fp8: dense peak FLOP/s; None: the hardware has none.
        memory: bytes, 1e9 a GB of the data sheet.
        bandwidth: of its memory, bytes a second.
        source: the data sheet.
    """

    title: str
    parts: tuple[str, ...]
    bf16: float
    fp8: float | None
    memory: float
    bandwidth: float
    source: str


def card(title: str, parts: str, bf16: float, fp8: float | None, memory: float, bandwidth: float, source: str) -> Card:
    """A row of :data:`CARDS`, in TFLOP/s, GB and TB/s."""
    return Card(title, tuple(parts.split()), bf16 * 1e12, fp8 and fp8 * 1e12, memory * 1e9, bandwidth * 1e12, source)


HOPPER = "NVIDIA H100 Tensor Core GPU, data sheet"
AMPERE = "NVIDIA A100 Tensor Core GPU, data sheet"
INSTINCT = "data sheet, AMD"
# name -> TFLOP/s in bf16 and fp8, GB, TB/s; the more special of two device names first
CARDS = {
    "b200": card("B200 SXM", "B200", 2250, 4500, 180, 7.7, "NVIDIA Blackwell, data sheet (HGX B200, each GPU)"),
    "h200": card("H200 SXM", "H200", 989, 1979, 141, 4.8, "NVIDIA H200 Tensor Core GPU, data sheet"),
    "gh200": card("GH200", "GH200", 989, 1979, 96, 4.0, "NVIDIA GH200 Grace Hopper Superchip, data sheet"),
    "h100-pcie": card("H100 PCIe", "H100 PCIe", 756, 1513, 80, 2.0, HOPPER),
    "h100-nvl": card("H100 NVL", "H100 NVL", 835, 1671, 94, 3.9, HOPPER),
    "h100": card("H100 SXM", "H100", 989, 1979, 80, 3.35, HOPPER),
    "a100-40": card("A100 40 GB", "A100 40GB", 312, None, 40, 1.555, AMPERE),
    "a100": card("A100 80 GB", "A100", 312, None, 80, 2.039, AMPERE),
    "l40s": card("L40S", "L40S", 362, 733, 48, 0.864, "NVIDIA L40S, data sheet"),
    "l40": card("L40", "L40", 181, 362, 48, 0.864, "NVIDIA L40, data sheet"),
    "l4": card("L4", "L4", 121, 242, 24, 0.300, "NVIDIA L4, data sheet"),
    "a10": card("A10", "A10", 125, None, 24, 0.600, "NVIDIA A10, data sheet"),
    "rtx5090": card("RTX 5090", "5090", 209.5, 419, 32, 1.792, "NVIDIA RTX Blackwell GPU architecture, white paper"),
    "rtx4090": card("RTX 4090", "4090", 165.2, 330.3, 24, 1.008, "NVIDIA Ada GPU architecture, white paper"),
    "rtx3090": card("RTX 3090", "3090", 71, None, 24, 0.936, "NVIDIA Ampere GA102 GPU architecture, white paper"),
    "mi325x": card("MI325X", "MI325X", 1307.4, 2614.9, 256, 6.0, f"Instinct MI325X, {INSTINCT}"),
    "mi300x": card("MI300X", "MI300X", 1307.4, 2614.9, 192, 5.3, f"Instinct MI300X, {INSTINCT}"),
}


def find_card(name: str) -> Card:
    """The card of a name as users type it: ``h100``, ``RTX 4090``, ``a100-80``.

    Raises:
        UsageError: an unknown card; the nearest is named.
    """
    key = name.strip().lower().removeprefix("nvidia").removeprefix("amd").replace(" ", "").replace("_", "-")
    key = {"a100-80": "a100", "h100-sxm": "h100", "h200-sxm": "h200", "b200-sxm": "b200"}.get(key, key)
    found = CARDS.get(key) or next((CARDS[one] for one in CARDS if one.replace("-", "") == key.replace("-", "")), None)
    if found is None:
        end = nearest(key, CARDS) or f"; known are {', '.join(CARDS)}"
        raise UsageError(f"--gpu {name}: no such card{end}", option="--gpu", code="unknown")
    return found


def card_of_device(name: str) -> Card | None:
    """The card of a device name as its driver gives it (``NVIDIA H100 80GB HBM3``); None: none of the table, or a part of one (MIG)."""
    words = name.upper().replace("-", " ").split()
    if {"LAPTOP", "MIG"} & set(words):
        return None
    return next((one for one in CARDS.values() if all(part.upper() in words for part in one.parts)), None)
