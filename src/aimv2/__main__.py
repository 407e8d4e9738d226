"""``python -m aimv2``, for torchrun."""

from aimv2.cli.main import run

run()
