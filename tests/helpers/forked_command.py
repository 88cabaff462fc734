"""Runs commands in forks of a process that has imported the command line already.

Importing takes most of the time of a short command. The process reads requests from the socket
that is its stdin, each with the stdin, stdout and stderr of the command, and answers with its
exit status. It imports and does nothing else: MLX, which does not work after a fork once it has
computed, has not computed yet.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# Imports, the interpreter and libraries do not read these, so a fork may have others.
CHANGEABLE = ("HF_", "HOME", "MLX_SMOLVLM_CACHE", "MLX_SMOLVLM_HISTORY", "NO_COLOR", "NO_PROXY")
CHANGEABLE += ("TRANSFORMERS_OFFLINE", "XDG_", "PYTEST_", "http", "HTTP", "no_proxy")


class Runner:
    """Starts the process when the first command is run, and sends it the others.

    `modules` are imported too, if they read only variables that all its commands share.

    Attributes:
        environment: The variables that the process was started with.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str] = ()) -> None:
        self.environment = dict(environment)
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        self._replies = self._socket.makefile("r")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.forked_command", *modules],
                stdin=theirs,
                env=self.environment,
            )

    def close(self) -> None:
        """End the process."""
        self._replies.close()
        self._socket.close()
        self._process.wait()

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether a fork with these variables is as a new process with them."""
        ours = self.environment
        names = {n for n in ours.keys() | environment.keys() if ours.get(n) != environment.get(n)}
        return all(name.startswith(CHANGEABLE) for name in names)

    def run(
        self, request: dict[str, Any], stdin: bytes, timeout: float
    ) -> tuple[int, bytes, bytes]:
        """Return the exit status, stdout and stderr of a command.

        Raises:
            subprocess.TimeoutExpired: It ran longer than `timeout` seconds, and was killed.
        """
        with self._lock:
            pipes = [os.pipe(), os.pipe(), os.pipe()]
            (read_in, write_in), (read_out, write_out), (read_err, write_err) = pipes
            theirs = array.array("i", [read_in, write_out, write_err])
            message = json.dumps(request).encode() + b"\n"
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, theirs)]
            sent = self._socket.sendmsg([message], rights)
            self._socket.sendall(message[sent:])
            for descriptor in theirs:
                os.close(descriptor)
            output: dict[int, bytes] = {}
            threads = [
                threading.Thread(target=_read, args=(one, output)) for one in (read_out, read_err)
            ]
            threads.append(threading.Thread(target=_write, args=(write_in, stdin)))
            pid = int(self._replies.readline())
            timer = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
            for thread in (*threads, timer):
                thread.start()
            status = int(self._replies.readline())
            is_late = not timer.is_alive() and status == -signal.SIGKILL
            timer.cancel()
            for thread in threads:
                thread.join()
        if is_late:
            raise subprocess.TimeoutExpired(request["arguments"], timeout)
        return status, output[read_out], output[read_err]


def _read(descriptor: int, output: dict[int, bytes]) -> None:
    """Read to the end."""
    with open(descriptor, "rb") as file:
        output[descriptor] = file.read()


def _write(descriptor: int, data: bytes) -> None:
    """Write all, unless nobody reads."""
    try:
        with open(descriptor, "wb", buffering=0) as file:
            file.write(data)
    except BrokenPipeError:
        pass


def serve() -> list[str]:
    """Fork for each request.

    Returns:
        In each fork, the command's arguments; its environment and streams are set up.
    """
    link = socket.socket(fileno=os.dup(0))
    while True:
        data, descriptors, _, _ = socket.recv_fds(link, 65536, 3)
        if not data:
            os._exit(0)
        while not data.endswith(b"\n"):
            data += link.recv(65536)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of the threads of OpenBLAS
            pid = os.fork()
        if not pid:
            break
        for descriptor in descriptors:
            os.close(descriptor)
        link.sendall(f"{pid}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        link.sendall(f"{status}\n".encode())
    link.close()
    request = json.loads(data)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        old: IO[str] = getattr(sys, name)
        new = open(number, mode, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    exec(request["prelude"], {})
    arguments: list[str] = request["arguments"]
    return arguments


MODULES = [
    "importlib.metadata",
    "importlib.resources",
    "jinja2.ext",
    "mlx.nn",
    "numpy",
    "tokenizers",
    "typer._adapters",
    "PIL.Image",
    "mlx_smolvlm.cli.app",
    "mlx_smolvlm.cli.command_table",
    "mlx_smolvlm.cli.printer",
    "mlx_smolvlm.convert.hub",
    "mlx_smolvlm.convert.run",
    "mlx_smolvlm.generate.stream",
    "mlx_smolvlm.media.tiles",
    "mlx_smolvlm.prompt.builder",
    "mlx_smolvlm.prompt.sandbox",
    "mlx_smolvlm.smolvlm",
]


def preload() -> None:
    """Import what commands import, except what reads the environment when it is imported."""
    import mlx_smolvlm  # before mlx.core, so that it loads OpenBLAS

    assert mlx_smolvlm.__name__ in sys.modules
    for name in MODULES:  # a library's own libraries change with its version
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    assert "huggingface_hub" not in sys.modules
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # or each fork copies the pages of what it inherits when it collects garbage


if __name__ == "__main__":
    preload()
    arguments = serve()
    sys.argv = [str(Path(sys.modules["mlx_smolvlm.cli.app"].__file__ or "")), *arguments]
    sys.modules["mlx_smolvlm.cli.app"].main()
