"""The command line: parse, complete, print."""

from aimv2.cli.main import main as main
from aimv2.cli.main import run as run
