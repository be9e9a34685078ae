"""Git tells of the checkout that this code runs from; its commit is noted beside whatever the code makes."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commit() -> str | None:
    """Returns the commit of the checkout; None where this is none, or there is no git."""
    return git("rev-parse", "HEAD")


def git(*arguments: str) -> str | None:
    """Returns what git answers, without spaces around it; None where this is no checkout, or there is no git.

    It writes nothing there: `git status` would renew the index, and leave a lock behind where the disk is full.
    """
    if not (ROOT / ".git").exists():  # an installed package may lie below somebody else's
        return None
    try:
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
