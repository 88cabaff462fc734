"""Describe the machine and the software that were measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_smolvlm.runtime import count_cores
from mlx_smolvlm.tuning import VARIABLES

LIBRARIES = ("mlx", "numpy", "cmeel-openblas")


def describe_machine() -> dict[str, Any]:
    """Return chip, cores, memory, system, device, versions and the variables that change speed."""
    import mlx.core as mx

    from mlx_smolvlm import __version__

    versions = {"mlx-smolvlm": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "chip": find_chip(),
        "cores": count_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": "GPU" if mx.default_device().type == mx.DeviceType.gpu else "CPU",
        "versions": versions,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def find_chip() -> str:
    """Return the name of the processor."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    match = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def format_machine(machine: dict[str, Any]) -> str:
    """Format the result of `describe_machine` as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    set_here = "".join(f", {name}={value}" for name, value in machine["variables"].items())
    return (
        f"{machine['chip']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}, on the {machine['device']}; {versions}{set_here}"
    )
