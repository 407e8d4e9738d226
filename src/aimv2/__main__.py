"""``python -m aimv2``, for torchrun."""

import sys

from aimv2.cli import main

sys.exit(main())
