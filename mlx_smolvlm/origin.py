"""What a checkpoint states about where it comes from, beside its configuration.

It is read to list and to publish checkpoints, never to run them, so it may be absent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.json_files import read_json
from mlx_smolvlm.records import read_record

ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """Where weights come from; None and () stand for what is not known.

    Attributes:
        source: The hub id or the folder's name.
        revision: The commit on the hub.
        base_model: The hub id of the model that was converted.
        license: As on the hub, such as "apache-2.0"; `license_name` and `license_link`
            say more of "other".
        languages: Codes such as "en".
        converter: Name and version of the program that wrote the folder.
    """

    source: str
    revision: str | None = None
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    converter: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The contents of `ORIGIN_FILE`."""
        return dataclasses.asdict(self)


def read_origin(folder: Path) -> Origin | None:
    """The origin that `folder` states; None if it states none.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / ORIGIN_FILE
    return parse_origin(read_json(path), path) if path.is_file() else None


def parse_origin(values: dict[str, Any], path: Path) -> Origin:
    """The origin that `values` of the file at `path` state; unknown keys are ignored.

    Raises:
        CheckpointError: A value is of another type, or the source is missing.
    """
    names = [one.name for one in dataclasses.fields(Origin)]
    known = {name: values[name] for name in names if values.get(name) is not None}
    try:
        return read_record(Origin, known)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; delete the file, or mend it") from None
