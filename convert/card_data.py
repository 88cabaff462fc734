"""What a source's model card says of licence, language and origin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_smolvlm.checkpoint import CARD_FILE
from mlx_smolvlm.convert.source import Source, is_hub_id
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.json_files import read_json
from mlx_smolvlm.origin import Origin, read_origin

_LARGEST_CARD = 1 << 20  # bytes
_LONGEST_TEXT = 300  # characters of a name or link


def trace(source: Source) -> Origin:
    """Where the checkpoint `source` comes from, as far as its files tell."""
    from mlx_smolvlm import __version__

    converter = f"mlx-smolvlm {__version__}"
    own = read_origin(source.folder) if source.is_own else None
    if own is not None:
        name, revision = source.name, source.revision
        return replace(own, source=name, revision=revision, converter=converter)
    card = read_card(source.folder)
    base = source.name if is_hub_id(source.name) else None
    for stated in (card.get("base_model"), _name_in_config(source.folder)):
        base = base or _hub_id(stated)
    license_id = _text(card.get("license"))
    languages = card.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    return Origin(
        source=source.name,
        revision=source.revision,
        base_model=base,
        license=license_id,
        license_name=_text(card.get("license_name")),
        license_link=_text(card.get("license_link")),
        languages=tuple(text for one in languages if (text := _text(one))),
        converter=converter,
    )


def read_card(folder: Path) -> Mapping[str, Any]:
    """The front matter of the model card in `folder`; nothing if there is none to be read."""
    path = folder / CARD_FILE
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_CARD:
            return {}
        from huggingface_hub import metadata_load

        return metadata_load(path) or {}
    except Exception:  # the card is text by people, and no weight depends on it
        return {}


def _name_in_config(folder: Path) -> Any:
    """What config.json calls the model."""
    try:
        return read_json(folder / "config.json").get("_name_or_path")
    except CheckpointError:
        return None


def _hub_id(value: Any) -> str | None:
    """`value`, or the first of it, if it is a hub id."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) and is_hub_id(value) else None


def _text(value: Any) -> str | None:
    """`value` if it is one short line of text."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    usable = isinstance(value, str) and re.fullmatch(r"\S[^\x00-\x1f\x7f]*", value)
    return value.strip() if usable and len(value) <= _LONGEST_TEXT else None
