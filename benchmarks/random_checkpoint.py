"""Make a checkpoint of SmolVLM2-256M's sizes with random weights and the published tokenizer.

    python -m benchmarks.random_checkpoint FOLDER [--files FILES]

Writes FOLDER/hf in the published format, for other programs, and FOLDER/converted for this
package. The tokenizer, chat template and image settings come from FILES, a folder with the small
files of the published checkpoint, or from the hub (4 MB). `mlx-smolvlm bench --random` needs
neither: it takes the demo's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_smolvlm.bench.random_model import make_config, make_random_source
from mlx_smolvlm.convert.run import convert_checkpoint

SOURCE = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
SMALL_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def find_small_files(files: Path | None) -> Path:
    """Return a folder with the files of the published checkpoint except the weights."""
    if files is not None:
        return files
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(SOURCE, allow_patterns=list(SMALL_FILES)))


def make_random_checkpoint(folder: Path, files: Path | None = None) -> Path:
    """Make `folder`/hf and `folder`/converted unless they exist, and return the latter."""
    converted, source = folder / "converted", folder / "hf"
    if converted.exists():
        return converted
    found = find_small_files(files)
    tokenizer = json.loads((found / "tokenizer.json").read_text(encoding="utf-8"))
    (image,) = (one["id"] for one in tokenizer["added_tokens"] if one["content"] == "<image>")
    make_random_source(source, replace(make_config("256m", "float32"), image_token_id=image))
    (source / "chat_template.jinja").unlink(missing_ok=True)  # the demo's
    for name in SMALL_FILES:
        if (found / name).exists():
            shutil.copyfile(found / name, source / name)
    return convert_checkpoint(source, converted)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Make a random checkpoint of SmolVLM2-256M's sizes."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=Path)
    options = parser.parse_args(arguments)
    print(make_random_checkpoint(options.folder, options.files))


if __name__ == "__main__":
    main()
