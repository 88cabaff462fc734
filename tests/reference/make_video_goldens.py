"""Writes tests/golden/videos.json.gz from transformers.

    python -m tests.reference.make_video_goldens

For frames made from numbers: which are chosen, their times, sampled pixels, and the prompts
of every checkpoint for videos, with its tokenizer reduced to what these prompts reach.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import oracle
from tests.helpers import video_cases as clips
from tests.helpers import video_oracle as videos
from tests.reference import make_media_goldens as media

HERE = Path(__file__).parent
NAMES = ("SmolVLM2-256M-Video-Instruct", "SmolVLM2-500M-Video-Instruct", "SmolVLM2-2.2B-Instruct")


def checkpoint(name: str) -> tuple[dict[str, Any], list[list[int]]]:
    """What is recorded of a checkpoint, and all its prompts."""
    _, seq_len, image_token_id, vocab_size, _ = oracle.CHECKPOINTS[name]
    folder = oracle.REFERENCE / "checkpoints" / name
    reference = videos.VideoOracle(folder, oracle.Oracle(name).tokenizer, seq_len, **oracle.SMALL)
    question = {"type": "text", "text": clips.QUESTION}
    messages = [{"role": "user", "content": [{"type": "video"}, question]}]
    rows = []
    for case in clips.FRAME_CASES:
        wished = {"fps": case.fps, "num_frames": case.max_frames}
        known = {
            "total_num_frames": case.frames,
            "fps": case.source_fps,
            "duration": case.frames / case.source_fps,
        }
        inputs = reference(
            messages,
            [np.stack(case.pictures())],
            metadata=[known],
            **{key: value for key, value in wished.items() if value is not None},
        )
        (metadata,) = inputs["video_metadata"]
        pixel_values = inputs["pixel_values"][0].permute(0, 2, 3, 1).contiguous().numpy()
        rows.append(
            {
                "indices": [int(index) for index in metadata.frames_indices],
                "timestamps_s": [float(seconds) for seconds in metadata.timestamps],
                "values": media.cases.sampled(pixel_values),
                "input_ids": inputs["input_ids"][0].tolist(),
            }
        )
    values = {
        "template": oracle.chat_template(name),
        "image_seq_len": seq_len,
        "image_token_id": image_token_id,
        "vocab_size": vocab_size,
        "video_sampling": json.loads((folder / "preprocessor_config.json").read_text())[
            "video_sampling"
        ],
        "cases": rows,
    }
    return values, [row["input_ids"] for row in rows]


def main() -> None:
    """Write the file."""
    checkpoints, prompts = {}, []
    for name in NAMES:
        checkpoints[name], ids = checkpoint(name)
        prompts += ids
    tokenizer = media.reduced(oracle.tokenizer_json(NAMES[0]), prompts)
    text = json.dumps(
        {"checkpoints": checkpoints, "tokenizer": tokenizer},
        ensure_ascii=False,
        separators=(",", ":"),
    )
    path = media.cases.GOLDEN / "videos.json.gz"
    path.write_bytes(gzip.compress(text.encode("utf-8"), 9, mtime=0))
    sys.stderr.write(f"{path}: {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
