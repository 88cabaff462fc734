"""Settings of MLX and OpenBLAS that `mlx-smolvlm bench --tune` saved for this machine.

They are environment variables that the libraries read when they start, so the command line sets
them before it imports MLX. Variables that the user has set are kept. The file holds nothing that
was not measured to be faster here, and is ignored on another kind of machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_smolvlm.files import locate_cache, read_file

FILE = "tuning.json"
LARGEST_FILE = 10_000  # bytes
THREADS = "OPENBLAS_NUM_THREADS"
VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", THREADS)

applied: dict[str, str] = {}
"""The variables that `apply_settings` set in this process."""


def find_settings_file() -> Path:
    """Return the path of the file, which may not exist; it lies in the cache folder.

    Raises:
        OSError: The home directory is unknown.
    """
    return locate_cache() / FILE


def describe_host() -> str:
    """Return what kind of machine this is; settings of another kind do not apply."""
    system = os.uname()
    return f"{system.sysname} {system.machine}, {os.cpu_count()} cores"


def apply_settings() -> None:
    """Set the saved variables in `os.environ`, except those that are set already.

    A file that cannot be read, is another user's, or is not what `format_settings` writes,
    changes nothing.
    """
    for name, value in _read_variables().items():
        if name not in os.environ:
            os.environ[name] = applied[name] = value
    if THREADS in applied:  # OpenBLAS is loaded with the package, and has read its variables
        from mlx_smolvlm.runtime import set_openblas_threads

        set_openblas_threads(int(applied[THREADS]))


def format_settings(variables: Mapping[str, str], seconds: Mapping[str, float]) -> str:
    """Return the contents of the file.

    Args:
        variables: Values of some of `VARIABLES`.
        seconds: What was measured, for the reader.
    """
    values = {"host": describe_host(), "variables": dict(variables), "seconds": dict(seconds)}
    return json.dumps(values, indent=2) + "\n"


def _read_variables() -> dict[str, str]:
    """Return the saved variables for this machine; none without a usable file."""
    try:
        values: Any = json.loads(read_file(find_settings_file(), LARGEST_FILE, own_only=True))
        variables = values["variables"] if values["host"] == describe_host() else {}
        return {
            name: str(variables[name])
            for name in VARIABLES
            if name in variables and re.fullmatch(r"[1-9][0-9]{0,4}", str(variables[name]))
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
