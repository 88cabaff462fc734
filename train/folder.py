"""The folder of a training: what may be in it, its lock, its log, and what its state is of.

It holds `adapter` or `model`, what was trained so far; `state.safetensors`, from which the
training goes on; and `log.jsonl`, a line a step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_smolvlm.errors import TrainingError
from mlx_smolvlm.files import lock, read_file, remove_leftovers, write_file

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"
ADAPTER, MODEL, FUSED = "adapter", "model", "fused"
OWN = (STATE_FILE, LOG_FILE, ADAPTER, MODEL, FUSED)

LARGEST_LOG = 2**30  # bytes


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else than a training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(one.name for one in out.iterdir())
    except FileExistsError:
        raise TrainingError(f"{out} is no folder; choose another with --out") from None
    except (OSError, ValueError) as error:  # a name with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"{out} cannot be used: {reason}; choose another with --out") from None
    others = [name for name in names if name not in OWN and not name.startswith(".")]
    if others:
        raise TrainingError(
            f"{out} holds {others[0]!r}, which is of no training; choose another folder with --out"
        )


def lock_folder(out: Path) -> int:
    """A descriptor that keeps other trainings out of the folder; what killed ones left goes."""
    try:
        descriptor = lock(out)
    except BlockingIOError:
        raise TrainingError(f"another training is writing to {out}; wait for it") from None
    for folder in (out, out / ADAPTER):
        remove_leftovers(folder, older_than_s=0)
    return descriptor


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Within it, what the system refuses to write is said in one line.

    Raises:
        TrainingError: It names the file and the reason; what was saved before is whole.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{error.filename or out} cannot be written: {error.strerror or error}; see to "
            "that, and the same command goes on from what was saved last"
        ) from None


def check_same(path: Path, stored: dict[str, str], own: dict[str, str]) -> None:
    """Refuse to go on from a state that other settings, data or weights led to."""
    advice = "choose another folder with --out, or remove this one"
    try:
        old = json.loads(stored.get("settings", "{}"))
    except (ValueError, RecursionError):
        old = None
    if not isinstance(old, dict):
        raise TrainingError(f"{path} is damaged; {advice}")
    new = json.loads(own["settings"])
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise TrainingError(
                f"{path} is of a training whose {name:.40} was {json.dumps(old.get(name)):.200}, "
                f"and now it is {json.dumps(new.get(name)):.200}; {advice}"
            )
    for name, what in (("data", "the data"), ("base", "the checkpoint")):
        if stored.get(name) != own[name]:
            raise TrainingError(f"{what} changed since {path} was written; {advice}")


def rewind(log: Path, step: int) -> None:
    """Take from `log` what came after `step`, or was not written to its end."""
    lines = []
    if os.path.lexists(log):
        try:
            data = read_file(log, LARGEST_LOG)
        except OSError as error:
            raise TrainingError(f"{log} cannot be read: {error.strerror}; remove it") from None
        for line in data.decode(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["step"] <= step and step > 0:
                    lines.append(line + "\n")
    with writing(log):
        write_file(log, "".join(lines), follow_links=False)
