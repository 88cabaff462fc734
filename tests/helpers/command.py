"""Runs the command as users and scripts do: a process with stdin, stdout, stderr, a status."""

import atexit
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.helpers.forked_command import Runner

COMMAND = [sys.executable, "-m", "mlx_smolvlm.cli.app"]
MAIN = """
import sys
from mlx_smolvlm.cli.app import main
sys.argv[0] = "mlx-smolvlm"
main()
"""
FORKS = sys.platform == "linux"  # Metal does not survive a fork


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without what would change the output."""
    names = ("PYTHONIOENCODING", "PYTHONUNBUFFERED", "LC_ALL", "LANG", "COLUMNS")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return {**kept, "LC_ALL": "C.UTF-8", **changes}


@cache
def start_runner() -> Runner:
    """The process that runs commands without importing everything anew."""
    runner = Runner(environment())
    atexit.register(runner.close)
    return runner


def run(
    *arguments: str | bytes | Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 60,
    prelude: str = "",
    runner: Runner | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """The finished command, whose variables are `environment()` and `env`.

    `prelude` is Python code that its process runs first. `runner` forks it, if it suits.
    """
    variables = environment(**(env or {}))
    runner = runner or (start_runner() if FORKS else None)
    if runner and runner.suits(variables):
        request = {
            "arguments": [os.fsdecode(argument) for argument in arguments],
            "cwd": str(cwd or Path.cwd()),
            "environment": variables,
            "prelude": prelude,
        }
        status, out, error = runner.run(request, stdin, timeout_s)
        return subprocess.CompletedProcess([*COMMAND, *arguments], status, out, error)
    program = [sys.executable, "-c", prelude + MAIN] if prelude else COMMAND
    return subprocess.run(
        [*program, *arguments],
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        env=variables,
        cwd=cwd,
    )


def run_text(
    *arguments: str | bytes | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 60,
    prelude: str = "",
    runner: Runner | None = None,
) -> subprocess.CompletedProcess[str]:
    """The same with what it wrote as text."""
    done = run(*arguments, env=env, cwd=cwd, timeout_s=timeout_s, prelude=prelude, runner=runner)
    out, error = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, error)


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
