"""Programs that are measured, each in a process of its own that answers requests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.runtime import find_openblas

OURS = "mlx-smolvlm"
PEER_SCRIPT = Path(__file__).with_name("peer.py")
LONGEST_ANSWER = 10**7  # characters


@dataclass(frozen=True)
class Launch:
    """How a program is started.

    Attributes:
        name: Its name in reports.
        command: The command line.
        env: Environment variables beside those of this process; None removes one.
        reads_pictures: Whether it has vision.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str | None] = field(default_factory=dict)
    reads_pictures: bool = True


def launch_ours(
    folder: Path,
    env: Mapping[str, str | None] | None = None,
    name: str = OURS,
    memory_limit: int | None = None,
) -> Launch:
    """Return how to start this package with the checkpoint in `folder`.

    With `-P`, no file of the current folder takes the place of a module.
    """
    limit = () if memory_limit is None else (str(memory_limit),)
    command = (sys.executable, "-P", "-m", "mlx_smolvlm.bench.worker", str(folder), *limit)
    return Launch(name, command, env or {})


def launch_peer(name: str, folder: Path, python: str | None, same_blas: bool) -> Launch:
    """Return how to start another program.

    Args:
        name: One of `PEERS` in `bench/peer.py`.
        folder: A checkpoint in Hugging Face's format.
        python: The interpreter that it is installed for; None for this one.
        same_blas: Whether a peer on MLX gets the OpenBLAS of this package, on Linux.

    Raises:
        SmolVLMError: The interpreter does not exist.
    """
    interpreter = shutil.which(python) if python else sys.executable
    if interpreter is None:
        raise SmolVLMError(
            f"{python} is not an interpreter; give the path of one with --peer-python"
        )
    library = find_openblas() if same_blas and name.startswith("mlx") else None
    env = {} if library is None else {"LD_PRELOAD": str(library)}
    command = (interpreter, str(PEER_SCRIPT), name, str(folder))
    return Launch(name, command, env, reads_pictures=name != "mlx-lm")


class Program:
    """A running program. Use it in a `with` statement, which ends its process.

    Attributes:
        name, reads_pictures: As in `Launch`.
        ready: Its first answer, after it has loaded its model.
        start_s: Seconds from the start of the process to that answer.

    Raises:
        SmolVLMError: It cannot be started, or fails to load the model.
    """

    def __init__(self, launch: Launch) -> None:
        self.name, self.reads_pictures = launch.name, launch.reads_pictures
        self._started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                launch.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={k: v for k, v in {**os.environ, **launch.env}.items() if v is not None},
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            reason = f"{launch.command[0]} cannot be started: {error.strerror}"
            raise SmolVLMError(f"{self.name} cannot be measured: {reason}") from None
        try:
            self.ready = self._read()
        except BaseException:  # also when the user stops it
            self.__exit__()
            raise
        self.start_s = self.seconds

    @property
    def seconds(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._started

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer; see `bench/worker.py` for what there is.

        Raises:
            SmolVLMError: The program failed, or has ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        """Read an answer; raises as `ask` does."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline(LONGEST_ANSWER)
        if not line:
            status = self._process.wait()
            raise SmolVLMError(f"{self.name} cannot be measured: it ended with status {status}")
        answer: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(line)
        if not isinstance(answer, dict):
            raise SmolVLMError(f"{self.name} cannot be measured: it printed {line.rstrip()!a:.100}")
        if "error" in answer:
            missing = answer["error"].startswith("ModuleNotFoundError")
            advice = "; install it, or give the interpreter that has it with --peer-python"
            raise SmolVLMError(
                f"{self.name} cannot be measured: {answer['error']}{advice * missing}"
            )
        return answer
