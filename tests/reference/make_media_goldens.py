"""Writes tests/golden/images.json.gz and prompts.json.gz from transformers.

    python -m tests.reference.make_media_goldens

The tokenizers in prompts.json.gz are the published ones without the merges that the
recorded conversations cannot reach, so the recorded ids are those of the published ones.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from tests.helpers import media_cases as cases
from tests.helpers import oracle

HERE = Path(__file__).parent


def image_goldens() -> list[dict[str, Any]]:
    """Grid and sampled pixel values of every size, mode and scale."""
    runs = [(tile, edge, True, size, "RGB") for tile, edge in cases.SCALES for size in cases.SIZES]
    runs += [(512, 1024, True, (300, 200), mode) for mode in cases.MODES]
    runs += [(512, 1024, True, (700, 300), "RGB"), (384, 384, True, (700, 300), "RGB")]
    runs += [(tile, edge, False, (640, 400), "RGB") for tile, edge in cases.SCALES]
    goldens = []
    for tile, edge, splitting, size, mode in runs:
        processor = oracle.image_processor("smolvlm", tile, edge, splitting)
        pixel_values, grid = oracle.processed(processor, cases.picture(size, mode))
        goldens.append(
            {
                "tile": tile,
                "longest_edge": edge,
                "splitting": splitting,
                "size": size,
                "mode": mode,
                "grid": grid,
                "shape": pixel_values.shape,
                "values": cases.sampled(pixel_values),
            }
        )
    return goldens


def prompt_goldens() -> dict[str, Any]:
    """Ids of every conversation and checkpoint, with templates and reduced tokenizers."""
    checkpoints, tokenizers = {}, {}
    for name, (kind, seq_len, image_token_id, vocab_size, _) in oracle.CHECKPOINTS.items():
        path, template, reference = (
            oracle.tokenizer_json(name),
            oracle.chat_template(name),
            oracle.Oracle(name),
        )
        ids = [
            reference.input_ids(*conversation)
            for conversation in cases.CONVERSATIONS
            if kind != "text" or not conversation[1]
        ]
        key = f"{vocab_size}"
        tokenizers.setdefault(key, (path, []))[1].extend(ids)
        checkpoints[name] = {
            "tokenizer": key,
            "template": template,
            "takes_images": kind != "text",
            "image_seq_len": seq_len,
            "image_token_id": image_token_id,
            "vocab_size": vocab_size,
            "input_ids": ids,
        }
    return {
        "conversations": cases.CONVERSATIONS,
        "checkpoints": checkpoints,
        "tokenizers": {k: reduced(path, ids) for k, (path, ids) in tokenizers.items()},
    }


def reduced(path: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """The tokenizer at `path` with only the merges that could act inside `prompts`."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    full = Tokenizer.from_file(str(path))
    full.decoder = decoders.Fuse()
    text = "\0".join(full.decode(ids, skip_special_tokens=False) for ids in prompts)
    model, added = values["model"], {token["content"] for token in values["added_tokens"]}
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    kept = [(left, right) for left, right in merges if left + right in text]
    wanted = {token for merge in kept for token in (*merge, "".join(merge))} | added
    vocab = {token: i for token, i in model["vocab"].items() if len(token) == 1 or token in wanted}
    vocab |= {token["content"]: token["id"] for token in values["added_tokens"]}
    model["vocab"], model["merges"] = vocab, [" ".join(merge) for merge in kept]
    return values


def main() -> None:
    """Write both files."""
    for name, values in (("images", image_goldens()), ("prompts", prompt_goldens())):
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        path = cases.GOLDEN / f"{name}.json.gz"
        path.write_bytes(gzip.compress(text.encode("utf-8"), 9, mtime=0))
        sys.stderr.write(f"{path}: {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
