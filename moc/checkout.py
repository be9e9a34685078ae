"""What code runs is noted beside whatever it makes: the commit of its checkout, which git tells, and versions."""

import subprocess
from importlib.metadata import version
from pathlib import Path

from moc import __version__

ROOT = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Returns versions of what decides a film's bits, and the commit where this is a checkout."""
    found = {"moc": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return found | ({"commit": at} if (at := commit()) else {})


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
