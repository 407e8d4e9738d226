"""The commit of the code."""

import subprocess
from pathlib import Path


def git_state(folder: Path | None = None) -> str | None:
    """Commit of the code, and whether it was changed since; None where it is not under git."""
    home = folder or Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-c", "core.fsmonitor=false", "-C", str(home), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit or git("ls-files", "--error-unmatch", str(home)) is None:  # installed inside another project's tree
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}, {'with changes' if changed else 'clean'}"
