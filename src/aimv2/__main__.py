"""``python -m aimv2``, for torchrun."""

import os
import sys
from pathlib import Path

# the working folder may be somebody else's: its torch.py is not imported
if sys.path and sys.path[0] == os.getcwd() != str(Path(__file__).resolve().parents[1]):
    del sys.path[0]

from aimv2.cli.dispatch import run

run()
