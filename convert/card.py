"""The origin of a checkpoint, and the model card (README.md) to publish it with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_smolvlm.checkpoint.load import CARD_FILE, CONFIG_FILE, read_config
from mlx_smolvlm.checkpoint.provenance import (
    ORIGIN_FILE,
    Origin,
    PartSize,
    measure_parts,
    parse_origin,
    read_origin,
)
from mlx_smolvlm.config import PARTS, Config
from mlx_smolvlm.convert.source import Source, is_hub_id
from mlx_smolvlm.errors import CheckpointError

_LARGEST_CARD = 1 << 20  # bytes
_LONGEST_TEXT = 300  # characters of a name or link


def trace_origin(source: Source) -> Origin:
    """Collect the origin of the checkpoint `source` from its files."""
    from mlx_smolvlm import __version__

    converter = f"mlx-smolvlm {__version__}"
    if source.is_own and source.has(ORIGIN_FILE):
        own = parse_origin(source.read_json(ORIGIN_FILE), source.folder / ORIGIN_FILE)
        name, revision = source.name, source.revision
        return replace(own, source=name, revision=revision, converter=converter)
    card = read_card(source)
    base = source.name if is_hub_id(source.name) else None
    for stated in (card.get("base_model"), _read_name(source)):
        base = base or _pick_hub_id(stated)
    license_id = _clean_text(card.get("license"))
    languages = card.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    return Origin(
        source=source.name,
        revision=source.revision,
        base_model=base,
        license=license_id,
        license_name=_clean_text(card.get("license_name")),
        license_link=_clean_text(card.get("license_link")),
        languages=tuple(text for one in languages if (text := _clean_text(one))),
        converter=converter,
    )


def read_card(source: Source) -> Mapping[str, Any]:
    """Read the front matter of the source's model card; empty if it cannot be read."""
    if not source.has(CARD_FILE):
        return {}
    try:
        text = source.read_text(CARD_FILE, _LARGEST_CARD).removeprefix("\ufeff")
        from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

        return RepoCard(text).data.to_dict() if REGEX_YAML_BLOCK.search(text) else {}
    except Exception:  # people write cards, and no weights depend on them
        return {}


def _read_name(source: Source) -> Any:
    """Read the model's name in config.json."""
    try:
        return source.read_json(CONFIG_FILE).get("_name_or_path")
    except CheckpointError:
        return None


def _pick_hub_id(value: Any) -> str | None:
    """Return `value`, or its first item, if it is a hub id; else None."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) and is_hub_id(value) else None


def _clean_text(value: Any) -> str | None:
    """Return `value`, or its only item, if it is a short line of text; else None."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    usable = isinstance(value, str) and re.fullmatch(r"\S[^\x00-\x1f\x7f]*", value)
    return value.strip() if usable and len(value) <= _LONGEST_TEXT else None


UNKNOWN_LICENSE = "unknown"  # an identifier of the hub


def format_model_card(folder: Path, repo: str, section: str = "") -> str:
    """Format the model card of the checkpoint in `folder`.

    Args:
        folder: A checkpoint folder of this format.
        repo: The hub id to publish it as.
        section: Markdown to insert before the last section, such as a comparison with the source.

    Raises:
        CheckpointError: `folder` is not a complete checkpoint of this format.
    """
    config = read_config(folder)
    origin = read_origin(folder) or Origin(config.source)
    body = [
        _format_introduction(config, origin, repo),
        _format_usage(config, repo),
        _format_sizes(folder, config),
    ]
    if section:
        body.append(section.strip())
    body.append(_format_files(origin))
    return f"---\n{_format_front_matter(config, origin)}---\n\n" + "\n\n".join(body) + "\n"


def find_base_model(config: Config, origin: Origin) -> str | None:
    """Return the hub id of the model that was converted; None if unknown."""
    if origin.base_model is not None:
        return origin.base_model
    return config.source if is_hub_id(config.source) else None


def _format_front_matter(config: Config, origin: Origin) -> str:
    """Format the YAML metadata for the hub."""
    from huggingface_hub import ModelCardData

    parts = {part: getattr(config.quantization, part) for part in PARTS}
    quantized = any(parts.values())
    tags = ["mlx", "mlx-smolvlm", "smolvlm", "vision-language-model"]
    if config.video is not None:
        tags.append("video-text-to-text")
    if parts["text"] is not None:
        tags.append(f"{parts['text'].bits}-bit")
    base = find_base_model(config, origin)
    values: dict[str, Any] = {}
    if base is not None and quantized:
        values["base_model_relation"] = "quantized"
    data = ModelCardData(
        language=list(origin.languages) or None,
        license=origin.license or UNKNOWN_LICENSE,
        license_name=origin.license_name,
        license_link=origin.license_link,
        base_model=base,
        library_name="mlx-smolvlm",
        pipeline_tag="image-text-to-text",
        tags=tags,
        **values,
    )
    return f"{data.to_yaml()}\n"


def _format_introduction(config: Config, origin: Origin, repo: str) -> str:
    """Format the title, the source and, if unknown, a note about the licence."""
    base = find_base_model(config, origin)
    source = f"`{origin.source}`" if base is None else f"[{base}](https://huggingface.co/{base})"
    if origin.revision:
        source += f" at commit `{origin.revision}`"
    text = f"# {repo.rpartition('/')[2]}\n\n{source}, converted for mlx-smolvlm."
    if origin.license is None:
        text += (
            "\n\nThe checkpoint that it was made from states no licence. "
            "Ask its author before you use or share it."
        )
    return text


def _format_usage(config: Config, repo: str) -> str:
    """Format the section on how to run the model."""
    lines = [
        "## Use",
        "```",
        "pip install mlx-smolvlm",
        f'mlx-smolvlm chat "What is in this picture?" -i photo.png -m {repo}',
    ]
    if config.video is not None:
        lines.append(f'mlx-smolvlm chat "What happens?" -v clip.mp4 -m {repo}')
    code = ["import mlx_smolvlm as smolvlm", "", f'vlm = smolvlm.load("{repo}")']
    code.append('print(vlm.ask("What is in this picture?", images=["photo.png"]).text)')
    return "\n".join([*lines, "```", "```python", *code, "```"])


def _format_sizes(folder: Path, config: Config) -> str:
    """Format the table of each part's precision and size."""
    sizes = measure_parts(folder)
    rows = ["## Precision", "| part | stored as | weights | bytes | bits per weight |"]
    rows.append("|---|---|---:|---:|---:|")
    for part, size in sizes.items():
        kind = getattr(config.quantization, part)
        stored = config.dtype
        if kind is not None:
            stored = f"{kind.bits} bits, groups of {kind.group_size}, {kind.mode}"
        rows.append(_format_row(part, stored, size))
    rows.append(_format_row("all", "", sum(sizes.values(), PartSize(0, 0))))
    text = "\n".join(rows)
    if overrides := len(config.quantization.overrides):
        text += f"\n\n{overrides} modules differ from their part; `config.json` names them."
    return text


def _format_row(name: str, stored: str, size: PartSize) -> str:
    """Format a row of that table."""
    return (
        f"| {name} | {stored} | {size.weights:,} | {size.nbytes:,} | {size.bits_per_weight:.2f} |"
    )


def _format_files(origin: Origin) -> str:
    """Format the section on how the files were made and how to check them."""
    by = origin.converter or "mlx-smolvlm"
    return (
        f"## Files\nWritten by {by}. `sha256sum -c SHA256SUMS` checks the files, and so does "
        "`mlx-smolvlm doctor`."
    )
