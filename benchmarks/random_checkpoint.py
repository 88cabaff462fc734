"""Make a checkpoint of SmolVLM2-256M's sizes with random weights, for benchmarks.

    python -m benchmarks.random_checkpoint FOLDER [--files FILES]

Writes FOLDER/hf in the published format, for other programs, and FOLDER/converted for this
package. The tokenizer, chat template and image settings come from FILES, a folder with the small
files of the published checkpoint, or from the hub (4 MB).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from mlx_smolvlm.convert.run import convert_checkpoint
from tests.helpers import hf_folder as hf

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
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    found = find_small_files(files)
    for name in SMALL_FILES:
        if (found / name).exists():
            shutil.copyfile(found / name, source / name)
    values = hf.settings(
        image_token_id=49190,
        pad_token_id=2,
        scale_factor=4,
        vision__hidden_size=768,
        vision__intermediate_size=3072,
        vision__num_hidden_layers=12,
        vision__num_attention_heads=12,
        vision__image_size=512,
        vision__patch_size=16,
        text__hidden_size=576,
        text__intermediate_size=1536,
        text__num_hidden_layers=30,
        text__num_attention_heads=9,
        text__num_key_value_heads=3,
        text__head_dim=64,
        text__max_position_embeddings=8192,
        text__vocab_size=49280,
        text__pad_token_id=2,
    )
    hf.write_json(source / "config.json", values)
    hf.write_weights(source, hf.weights(values))
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
