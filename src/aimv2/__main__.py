"""``python -m aimv2``, for torchrun."""

from aimv2.cli.dispatch import run

run()
