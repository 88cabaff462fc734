"""What a source's model card says of licence, language and origin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_smolvlm.checkpoint import CARD_FILE, CONFIG_FILE
from mlx_smolvlm.convert.source import Source, is_hub_id
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.origin import ORIGIN_FILE, Origin, parse_origin

_LARGEST_CARD = 1 << 20  # bytes
_LONGEST_TEXT = 300  # characters of a name or link


def trace(source: Source) -> Origin:
    """Where the checkpoint `source` comes from, as far as its files tell."""
    from mlx_smolvlm import __version__

    converter = f"mlx-smolvlm {__version__}"
    if source.is_own and source.has(ORIGIN_FILE):
        own = parse_origin(source.json(ORIGIN_FILE), source.folder / ORIGIN_FILE)
        name, revision = source.name, source.revision
        return replace(own, source=name, revision=revision, converter=converter)
    card = read_card(source)
    base = source.name if is_hub_id(source.name) else None
    for stated in (card.get("base_model"), _name_in_config(source)):
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


def read_card(source: Source) -> Mapping[str, Any]:
    """The front matter of the source's model card; nothing if there is none to be read."""
    if not source.has(CARD_FILE):
        return {}
    try:
        text = source.text(CARD_FILE, _LARGEST_CARD).removeprefix("\ufeff")
        from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

        return RepoCard(text).data.to_dict() if REGEX_YAML_BLOCK.search(text) else {}
    except Exception:  # the card is text by people, and no weight depends on it
        return {}


def _name_in_config(source: Source) -> Any:
    """What config.json calls the model."""
    try:
        return source.json(CONFIG_FILE).get("_name_or_path")
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
