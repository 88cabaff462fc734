"""Runs the command as users and scripts do: a process with stdin, stdout, stderr, a status."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

COMMAND = [sys.executable, "-m", "mlx_smolvlm.cli.app"]


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without what would change the output."""
    names = ("PYTHONIOENCODING", "PYTHONUNBUFFERED", "LC_ALL", "LANG", "COLUMNS")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return {**kept, "LC_ALL": "C.UTF-8", **changes}


def run(
    *arguments: str | bytes | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The finished command."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        timeout=60,
        env=environment(**(env or {})),
    )


def assert_one_error(
    result: subprocess.CompletedProcess[bytes], *words: str, status: int = 1
) -> None:
    """One clear line on stderr, nothing on stdout, no traceback."""
    error = result.stderr.decode()
    assert result.returncode == status, error
    assert result.stdout == b""
    assert "Traceback" not in error
    if status == 1:
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
    for word in words:
        assert word in error
