"""The commit of this code, from git."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path


def commit_of(file: Path) -> str | None:
    """The checked-out commit of a tracked file, such as "1a2b3c4d5e6f", with "+changes" if tracked files differ.

    None without git, and for a file that its repository does not track.
    """
    with suppress(OSError, subprocess.SubprocessError):
        _git(file.parent, "ls-files", "--error-unmatch", file)
        changed = _git(file.parent, "status", "--porcelain", "-uno")
        return _git(file.parent, "rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    return None


def _git(folder: Path, *command: str | Path) -> str:
    """The output of git, which neither takes nor waits for locks. Variables of a hook for its repository are unset."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", folder, *command],
        env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
