"""SHA-256 sums of a checkpoint's files, in the form that `sha256sum -c` reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import sha256_file
from mlx_smolvlm.json_files import read_text

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")
_LARGEST_LIST = 1 << 20  # bytes


def sums_text(sums: Mapping[str, str]) -> str:
    """The contents of `SUMS_FILE` for hexadecimal `sums` by file name."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))


def read_sums(folder: Path) -> dict[str, str] | None:
    """The stated sums of the files in `folder`, by name; None if it states none.

    Raises:
        CheckpointError: The list cannot be read, or names files elsewhere.
    """
    path = folder / SUMS_FILE
    if not path.exists():
        return None
    sums = {}
    for line in read_text(path, _LARGEST_LIST).splitlines():
        match = _LINE.fullmatch(line)
        if match is None or Path(match[2]).name != match[2]:
            raise CheckpointError(f"{path} is damaged; convert or fetch the checkpoint again")
        sums[match[2]] = match[1]
    return sums


def check_sums(folder: Path) -> Iterator[tuple[str, str | None]]:
    """The name of each file with a stated sum, and what is wrong with it, one after another.

    A weight file that the list does not name is wrong too. Nothing if there is no list.

    Raises:
        CheckpointError: As `read_sums`.
    """
    sums = read_sums(folder)
    if sums is None:
        return
    for name, wanted in sums.items():
        try:
            found = sha256_file(folder / name)
        except FileNotFoundError:
            yield name, "is missing"
        except OSError as error:
            yield name, f"cannot be read: {error.strerror}"
        else:
            yield name, None if found == wanted else f"differs from its sum in {SUMS_FILE}"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in sums:
            yield path.name, f"is not listed in {SUMS_FILE}"
