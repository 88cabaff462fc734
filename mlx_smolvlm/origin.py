"""What a checkpoint states about where it comes from, beside its configuration.

It is read to list and to publish checkpoints, never to run them, so it may be absent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.json_files import read_json

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
    """The origin that `folder` states; None if it states none. Unknown keys are passed over.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Origin):
        value = values.get(field.name)
        if field.name == "languages":
            value = tuple(value) if isinstance(value, list) else ()
            usable = all(isinstance(one, str) for one in value)
        else:
            usable = isinstance(value, str) or (value is None and field.name != "source")
        if not usable:
            raise CheckpointError(
                f"{path}: {field.name} is {shorten(value)}; delete the file, or mend it"
            )
        found[field.name] = value
    return Origin(**found)
