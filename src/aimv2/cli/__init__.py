"""The command line: parse, complete, print."""

from aimv2.cli.dispatch import main as main
from aimv2.cli.dispatch import run as run
