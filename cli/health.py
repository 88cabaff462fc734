"""What a person with a problem needs to know of this machine, one finding after another."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from mlx_smolvlm.cli.render import size
from mlx_smolvlm.quoting import one_line, redact

Status = Literal["ok", "note", "broken"]

# What pip calls what this package needs, then what it can use.
NEEDED = (
    *("mlx", "mlx-lm", "huggingface-hub", "pillow", "av", "typer", "prompt_toolkit", "rich"),
    *("tokenizers", "jinja2", "numpy", "num2words", "markdown-it-py"),
)
EXTRAS = {"llguidance": "json"}
LITTLE_DISK = 2 * 10**9  # bytes, about what the largest 4-bit conversion takes
VARIABLES = (
    *("MLX_SMOLVLM_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MLX_SMOLVLM_OPENBLAS", "NO_COLOR", "TERM"),
)
SECRETS = ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # only whether they are set


@dataclass(frozen=True)
class Finding:
    """What a check found; `advice` says what to do about it."""

    name: str
    status: Status
    text: str
    advice: str = ""


def software() -> Iterator[Finding]:
    """Versions of Python, the system and the packages."""
    from mlx_smolvlm import __version__

    yield Finding("mlx-smolvlm", "ok", __version__)
    where = f"{platform.python_version()} at {sys.executable}"
    yield Finding("python", "ok", where)
    machine = platform.machine()
    system = f"{platform.platform()} on {machine}"
    if sys.platform == "darwin" and machine == "x86_64":
        yield Finding("system", "broken", system, "MLX needs an arm64 Python on Apple silicon")
    else:
        yield Finding("system", "ok", system)
    versions, missing = [], []
    for name in NEEDED:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("packages", "ok", ", ".join(versions))
    if missing:
        command = f"pip install {' '.join(missing)}"
        yield Finding("packages", "broken", f"missing: {', '.join(missing)}", command)
    for name, extra in EXTRAS.items():
        try:
            yield Finding(f"extra {extra}", "ok", f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            advice = f"pip install 'mlx-smolvlm[{extra}]' if you need it"
            yield Finding(f"extra {extra}", "note", f"{name} is not installed", advice)


def device() -> Iterator[Finding]:
    """Where MLX computes, whether it does, and in how much memory."""
    import mlx.core as mx

    kind = mx.default_device()
    information = mx.device_info() if mx.metal.is_available() else {}
    named = f"{kind} {information.get('device_name', '')}".strip()
    try:
        x = mx.arange(64.0).reshape(8, 8)
        right = (x @ mx.eye(8) == x).all().item()
    except Exception as error:  # a broken driver can raise anything
        yield Finding("device", "broken", f"{named}: {one_line(error)}", "reinstall mlx")
    else:
        if right:
            yield Finding("device", "ok", named)
        else:
            yield Finding("device", "broken", f"{named} multiplies wrongly", "reinstall mlx")
    if sys.platform == "darwin" and not information:
        yield Finding("metal", "note", "not available", "models run on the CPU, slowly")
    if sys.platform == "linux" and kind.type == mx.DeviceType.cpu:
        yield _blas()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{size(total)}, MLX may use {size(mx.get_memory_limit())}"
    yield Finding("memory", "ok", text)


def _blas() -> Finding:
    """What multiplies matrices on the CPU."""
    from mlx_smolvlm import blas

    if blas.problem is None:
        return Finding("blas", "ok", "OpenBLAS")
    advice = "pip install cmeel-openblas"
    if "libgfortran" in blas.problem:
        advice = "install libgfortran5 (apt install libgfortran5)"
    elif "imported" in blas.problem:
        advice = "import mlx_smolvlm first"
    elif blas.VARIABLE in blas.problem:
        advice = f"unset {blas.VARIABLE}"
    return Finding("blas", "note", f"MLX's own, which is slow: {blas.problem}", advice)


def storage() -> Iterator[Finding]:
    """The cache folders: where, how large, writable, and how much room is left."""
    from huggingface_hub import constants

    from mlx_smolvlm.cached import list_cached
    from mlx_smolvlm.hub import cache_folder

    ours, theirs = cache_folder(), Path(constants.HF_HUB_CACHE)
    models = list_cached()
    taken = size(sum(model.nbytes for model in models))
    yield _folder("cache", ours, f"{len(models)} conversions, {taken}")
    yield _folder("hub cache", theirs, "")
    left = [model for model in models if model.state in ("damaged", "unfinished", "outdated")]
    for model in left:
        advice = f"mlx-smolvlm models rm '{model.name}'"
        status: Status = "broken" if model.state == "damaged" else "note"
        yield Finding("cache", status, f"{model.name} is {model.state}", advice)


def _folder(name: str, path: Path, text: str) -> Finding:
    """Whether the folder at `path`, or the nearest there is above it, can be written to."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        return Finding(name, "broken", f"{path}: {error.strerror}", "choose another folder")
    text = ", ".join(part for part in (str(path), text, f"{size(free)} free") if part)
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        return Finding(name, "broken", f"{text}, not writable", "set MLX_SMOLVLM_CACHE or HF_HOME")
    if free < LITTLE_DISK:
        return Finding(name, "note", text, "a conversion may not fit; make room")
    return Finding(name, "ok", text)


def surroundings() -> Iterator[Finding]:
    """The terminal, the encoding, and what the environment sets."""
    from mlx_smolvlm.cli import terminal
    from mlx_smolvlm.offline import is_offline

    if terminal.can_draw():
        columns, rows = terminal.columns_and_rows()
        shown = terminal.graphics(os.environ)
        plain = ", plain (NO_COLOR)" if terminal.wants_plain() else ""
        text = f"{columns} by {rows}, pictures inline: {shown}{plain}"
    else:
        text = "none, or one that cannot be drawn on: lines are read and written as they are"
    yield Finding("terminal", "ok", text)
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    if encoding == "utf8":
        yield Finding("encoding", "ok", "UTF-8")
    else:
        text = f"{sys.stdout.encoding}, so some characters show as ?"
        yield Finding("encoding", "note", text, "set LANG or PYTHONUTF8=1")
    yield Finding("network", "ok", "never used" if is_offline() else "used when a model is fetched")
    names = [f"{name}={redact(os.environ[name])}" for name in VARIABLES if name in os.environ]
    for name in SECRETS:
        if os.environ.get(name) or os.environ.get(name.lower()):
            names.append(f"{name} is set")
    yield Finding("environment", "ok", ", ".join(names) or "nothing set")
