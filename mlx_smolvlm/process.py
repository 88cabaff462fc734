"""What MLX needs of processes and threads: no work after a fork, and threads that end in time.

MLX computes in threads of its own, which a forked child does not have, so that its first
evaluation would wait for ever.

A thread that has called a compiled function releases Python objects while it ends, which is
after `Thread.join` has returned (before Python 3.13). If the interpreter is shut down by then,
the process aborts. So the end of the program waits for these threads.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from pathlib import Path

from mlx_smolvlm.errors import SmolVLMError

_TASKS = Path("/proc/self/task")  # a folder for each thread of the process, on Linux
_LONGEST_WAIT_S = 1.0
_USUAL_WAIT_S = 0.1  # elsewhere; the end of a thread takes a few milliseconds

_first_process: int | None = None  # that a model was loaded or ran in
_threads: set[int] = set()  # native ids of threads that used a model


def check_process() -> None:
    """Call this before MLX computes: once for an answer, not for each token.

    Raises:
        SmolVLMError: The process was forked from one in which MLX computed.
    """
    global _first_process
    if _first_process is None:
        _first_process = os.getpid()
        atexit.register(_wait_for_threads)
    if os.getpid() != _first_process:
        raise SmolVLMError(
            f"process {os.getpid()} was forked after process {_first_process} had loaded a model, "
            "and MLX does not compute after a fork; use the 'spawn' start method of "
            "multiprocessing, and load the model in the new process"
        )
    if threading.current_thread() is not threading.main_thread():
        _threads.add(threading.get_native_id())


def _wait_for_threads() -> None:
    """Wait until the threads that used a model, and whose Python code has ended, are gone."""
    ending = _threads - {thread.native_id for thread in threading.enumerate()}
    if not ending:
        return
    if not _TASKS.is_dir():
        time.sleep(_USUAL_WAIT_S)
        return
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while any((_TASKS / str(one)).exists() for one in ending) and time.monotonic() < deadline:
        time.sleep(0.001)
