"""The checks of `mlx-smolvlm doctor`: software, device, storage, media, models."""

from __future__ import annotations

import io
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlx_smolvlm.cli.output import format_size
from mlx_smolvlm.errors import SmolVLMError, format_error, redact

if TYPE_CHECKING:
    from mlx_smolvlm.config import Config

Status = Literal["ok", "note", "broken"]

# The names on PyPI of the packages that are needed, then of the optional ones.
NEEDED = (
    *("mlx", "huggingface-hub", "pillow", "av", "typer", "prompt_toolkit", "rich"),
    *("tokenizers", "jinja2", "numpy", "markdown-it-py"),
)
EXTRAS = {"llguidance": "json"}
LOW_DISK_BYTES = 2 * 10**9  # about the size of the largest 4-bit conversion
VARIABLES = (
    *("MLX_SMOLVLM_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MLX_SMOLVLM_OPENBLAS", "MLX_SMOLVLM_NUMPY"),
    *("NO_COLOR", "TERM"),
)
SECRET_VARIABLES = (
    "HF_TOKEN",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
)  # their values are not shown
CLIP_SIDE, CLIP_FRAMES = 64, 8  # of the test clip, in pixels and frames
PICTURES = ("PNG", "JPEG", "WEBP")
DECODERS = ("h264", "hevc", "vp9", "av1")
REINSTALL = "pip install --force-reinstall"


@dataclass(frozen=True)
class Finding:
    """The result of a check; `advice` says what to do about it."""

    name: str
    status: Status
    text: str
    advice: str = ""


def check_software() -> Iterator[Finding]:
    """Yield the versions of Python, the system and the packages."""
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


def check_device() -> Iterator[Finding]:
    """Yield MLX's device, whether it computes correctly, and the memory."""
    import mlx.core as mx

    kind = mx.default_device()
    information = mx.device_info() if mx.metal.is_available() else {}
    name = f"{kind} {information.get('device_name', '')}".strip()
    try:
        x = mx.arange(64.0).reshape(8, 8)
        is_correct = (x @ mx.eye(8) == x).all().item()
    except Exception as error:  # a broken driver can raise anything
        yield Finding("device", "broken", f"{name}: {format_error(error)}", "reinstall mlx")
    else:
        if is_correct:
            yield Finding("device", "ok", name)
        else:
            yield Finding("device", "broken", f"{name} multiplies wrongly", "reinstall mlx")
    if sys.platform == "darwin" and not information:
        yield Finding("metal", "note", "not available", "models run on the CPU, slowly")
    if sys.platform == "linux" and kind.type == mx.DeviceType.cpu:
        yield _check_blas()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{format_size(total)}, MLX may use {format_size(mx.get_memory_limit())}"
    yield Finding("memory", "ok", text)


def _check_blas() -> Finding:
    """Return which libraries compute on the CPU."""
    from mlx_smolvlm import runtime

    answers = "MLX" if runtime.numpy_is_off() else "NumPy"
    if runtime.openblas_problem is None:
        return Finding("blas", "ok", f"answers: {answers}; training: MLX with OpenBLAS")
    advice = "pip install cmeel-openblas"
    if "libgfortran" in runtime.openblas_problem:
        advice = "install libgfortran5 (apt install libgfortran5)"
    elif "imported" in runtime.openblas_problem:
        advice = "import mlx_smolvlm first"
    elif runtime.OPENBLAS_VARIABLE in runtime.openblas_problem:
        advice = f"unset {runtime.OPENBLAS_VARIABLE}"
    text = f"answers: {answers}; training: MLX's own BLAS, which is slow"
    return Finding("blas", "note", f"{text}: {runtime.openblas_problem}", advice)


def check_storage() -> Iterator[Finding]:
    """Yield the cache folders: path, size, free space, and whether they can be written to."""
    from huggingface_hub import constants

    from mlx_smolvlm.convert.hub import find_cache_folder
    from mlx_smolvlm.convert.model_cache import list_cached_models

    ours, theirs = find_cache_folder(), Path(constants.HF_HUB_CACHE)
    models = list_cached_models()
    taken = format_size(sum(model.nbytes for model in models))
    yield _check_folder("cache", ours, f"{len(models)} conversions, {taken}")
    yield _check_folder("hub cache", theirs, "")
    unusable = [model for model in models if model.state in ("damaged", "unfinished", "outdated")]
    for model in unusable:
        advice = f"mlx-smolvlm models rm '{model.name}'"
        status: Status = "broken" if model.state == "damaged" else "note"
        yield Finding("cache", status, f"{model.name} is {model.state}", advice)


def _check_folder(name: str, path: Path, text: str) -> Finding:
    """Return whether `path`, or its nearest existing parent, can be written to."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        return Finding(name, "broken", f"{path}: {error.strerror}", "choose another folder")
    text = ", ".join(part for part in (str(path), text, f"{format_size(free)} free") if part)
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        return Finding(name, "broken", f"{text}, not writable", "set MLX_SMOLVLM_CACHE or HF_HOME")
    if free < LOW_DISK_BYTES:
        return Finding(name, "note", text, "a conversion may not fit; make room")
    return Finding(name, "ok", text)


def check_environment() -> Iterator[Finding]:
    """Yield the terminal, the encoding, the network and the environment variables."""
    from mlx_smolvlm import tuning
    from mlx_smolvlm.cli.terminal import device
    from mlx_smolvlm.media.fetch import is_offline

    if device.can_draw():
        columns, rows = device.columns_and_rows()
        shown = device.detect_graphics(os.environ)
        plain = ", plain (NO_COLOR)" if device.wants_plain() else ""
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
    names = [
        f"{name}={redact(os.environ[name])}{' (by bench --tune)' * (name in tuning.applied)}"
        for name in (*VARIABLES, *tuning.VARIABLES)
        if name in os.environ
    ]
    for name in SECRET_VARIABLES:
        if os.environ.get(name) or os.environ.get(name.lower()):
            names.append(f"{name} is set")
    yield Finding("environment", "ok", ", ".join(names) or "nothing set")


def check_pictures() -> Iterator[Finding]:
    """Yield which common image formats can be written and read back."""
    from PIL import Image

    from mlx_smolvlm.media.picture import open_image

    readable: list[str] = []
    unreadable: list[str] = []
    for kind in PICTURES:
        stream = io.BytesIO()
        try:
            Image.new("RGB", (CLIP_SIDE, CLIP_SIDE), (200, 30, 30)).save(stream, kind)
            red, green, _ = open_image(stream.getvalue()).getpixel((8, 8))  # type: ignore[misc]
        except Exception as error:  # a broken library can raise anything
            unreadable.append(f"{kind} ({format_error(error)})")
        else:
            (readable if red > 150 > green else unreadable).append(kind)
    if readable:
        yield Finding("pictures", "ok", f"{', '.join(readable)} are read")
    if unreadable:
        yield Finding(
            "pictures", "broken", f"not read: {', '.join(unreadable)}", f"{REINSTALL} pillow"
        )


def check_videos() -> Iterator[Finding]:
    """Yield whether a clip made in memory can be read, and which decoders are available."""
    try:
        import av

        from mlx_smolvlm.media.readers import open_reader

        data = _make_clip()
        reader = open_reader(lambda: io.BytesIO(data), "the trial clip")
        count = len(list(reader.read(range(reader.timeline.num_frames))))
        decoders = [name for name in DECODERS if name in av.codecs_available]
    except Exception as error:  # a broken library can raise anything
        yield Finding("videos", "broken", format_error(error), f"{REINSTALL} av")
        return
    if count != CLIP_FRAMES:
        text = f"{count} of {CLIP_FRAMES} frames are read"
        yield Finding("videos", "broken", text, f"{REINSTALL} av")
        return
    missing = [name for name in DECODERS if name not in decoders]
    text = f"a clip is read; decoders: {', '.join(decoders)}"
    if missing:
        yield Finding("videos", "note", f"{text}; none for {', '.join(missing)}", f"{REINSTALL} av")
    else:
        yield Finding("videos", "ok", text)


def _make_clip() -> bytes:
    """Return a few frames as an mp4 file."""
    import av
    import numpy as np

    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=4)
        video.width = video.height = CLIP_SIDE
        video.pix_fmt = "yuv420p"
        for number in range(CLIP_FRAMES):
            pixels = np.full((CLIP_SIDE, CLIP_SIDE, 3), 20 * number, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(video.encode(None))
    return stream.getvalue()


def check_demo() -> Iterator[Finding]:
    """Yield whether the bundled model answers."""
    from mlx_smolvlm import Sampling, load

    try:
        reply = load("demo").ask("What is this?", sampling=Sampling(max_tokens=4))
    except Exception as error:  # any failure is a finding
        yield Finding("demo", "broken", format_error(error), f"{REINSTALL} mlx-smolvlm")
        return
    text = f"answers, {reply.generation_tokens} tokens"
    yield Finding("demo", "ok" if reply.token_ids else "broken", text)


def check_checkpoint(name: str, folder: Path) -> Iterator[Finding]:
    """Yield whether the checkpoint in `folder` is complete: headers, tokenizer, template, sums."""
    from mlx_smolvlm.checkpoint.headers import read_headers
    from mlx_smolvlm.checkpoint.load import (
        build_checked_model,
        find_tokenizer,
        read_chat_template,
        read_config,
    )
    from mlx_smolvlm.checkpoint.provenance import check_sums, read_sums
    from mlx_smolvlm.prompt.builder import PromptBuilder

    advice = f"convert or fetch it again; {folder}"
    try:
        config: Config = read_config(folder)
        build_checked_model(config, read_headers(folder))
        PromptBuilder(find_tokenizer(folder), read_chat_template(folder), config)
        faults = [f"{file} {problem}" for file, problem in check_sums(folder) if problem]
        has_sums = read_sums(folder) is not None
    except SmolVLMError as error:
        yield Finding(name, "broken", f"{error}", advice)
        return
    if faults:
        yield Finding(name, "broken", "; ".join(faults), advice)
    elif has_sums:
        yield Finding(name, "ok", "every file is what was written")
    else:
        text = "its parts fit; it states no sums, so its weights cannot be verified"
        yield Finding(name, "note", text, "convert it again to have them")
