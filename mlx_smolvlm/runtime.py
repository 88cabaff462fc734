"""What MLX needs of the process: OpenBLAS, no fork, and threads that have ended at exit.

**OpenBLAS.** MLX's wheel for Linux contains the reference BLAS, which multiplies matrices at
about 2 GFLOP/s. The dynamic linker searches the global scope for `cblas_sgemm` first, so a
library loaded with RTLD_GLOBAL before `mlx.core` replaces it. `cmeel-openblas` from PyPI, which
this package requires on Linux, contains one.

**Forks.** MLX computes in threads, which a forked child does not have: its first evaluation
would never return.

**Threads.** Before Python 3.13, a thread that has called a compiled function releases Python
objects after `Thread.join` has returned. If the interpreter shuts down first, the process
aborts. Therefore an exit handler waits for these threads.

This module must not import `mlx.core`.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mlx_smolvlm.errors import SmolVLMError

OPENBLAS_VARIABLE = "MLX_SMOLVLM_OPENBLAS"  # "0" keeps MLX's own BLAS
NUMPY_VARIABLE = "MLX_SMOLVLM_NUMPY"  # "0" computes in MLX on Linux too
_OPENBLAS = "cmeel.prefix/lib/libopenblas.so.0"

openblas_problem: str | None = None
"""Why OpenBLAS is not used on Linux; None if it is used, and on other systems."""

_TASKS = Path("/proc/self/task")  # one folder per thread of the process, on Linux
_MAX_WAIT_S = 1.0
_USUAL_WAIT_S = 0.1  # on other systems; a thread ends within a few milliseconds

_first_process: int | None = None  # id of the process in which MLX was used first
_threads: set[int] = set()  # native ids of the threads that used a model


def load_openblas() -> None:
    """Load OpenBLAS for `mlx.core`, which must not have been imported yet.

    Does nothing on systems other than Linux, or if `MLX_SMOLVLM_OPENBLAS` is 0. If OpenBLAS
    cannot be loaded, MLX still works, slowly, and `openblas_problem` says why.
    """
    global openblas_problem
    openblas_problem = _load_library() if sys.platform == "linux" else None


def _load_library() -> str | None:
    """Load the library. Returns why it was not loaded, or None."""
    if os.environ.get(OPENBLAS_VARIABLE) == "0":
        return f"{OPENBLAS_VARIABLE} is 0"
    if "mlx.core" in sys.modules:
        return "mlx.core was imported before mlx_smolvlm"
    path = find_openblas()
    if path is None:
        return "cmeel-openblas is not installed"
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None


def find_openblas() -> Path | None:
    """Return the path of the OpenBLAS that `cmeel-openblas` installed; None without it."""
    spec = find_spec("cmeel")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parents[1] / _OPENBLAS


def set_openblas_threads(count: int) -> None:
    """Set the number of threads of the OpenBLAS that is loaded; does nothing without one."""
    if sys.platform == "linux" and openblas_problem is None:
        setter = getattr(ctypes.CDLL(None), "openblas_set_num_threads", None)
        if setter is not None:
            setter(count)


@cache
def count_blas_threads() -> int:
    """Return the number of threads that OpenBLAS begins with."""
    given, cores = os.environ.get("OPENBLAS_NUM_THREADS", ""), count_cores()
    return min(int(given), cores) if given.isdecimal() and int(given) else cores


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def numpy_is_off() -> bool:
    """Whether the user wants answers to be computed in MLX on Linux too."""
    return os.environ.get(NUMPY_VARIABLE) == "0"


@contextmanager
def take_lock(lock: threading.Lock | threading.RLock, message: str) -> Iterator[None]:
    """Hold `lock` while the body runs; do not wait for it.

    Raises:
        SmolVLMError: Another thread holds `lock`; with `message`.
    """
    if not lock.acquire(blocking=False):
        raise SmolVLMError(message)
    try:
        yield
    finally:
        lock.release()


def check_process() -> None:
    """Refuse to compute in a forked process. Call this once per answer, not per token.

    Raises:
        SmolVLMError: The process was forked from one that had used MLX.
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
    """Wait for the threads that used a model and have left Python but not yet exited."""
    ending = _threads - {thread.native_id for thread in threading.enumerate()}
    if not ending:
        return
    if not _TASKS.is_dir():
        time.sleep(_USUAL_WAIT_S)
        return
    deadline = time.monotonic() + _MAX_WAIT_S
    while any((_TASKS / str(one)).exists() for one in ending) and time.monotonic() < deadline:
        time.sleep(0.001)
