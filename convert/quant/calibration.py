"""Reads calibration samples from texts and from datasets with pictures.

Letters in shapes: N tiles, H and W a tile's pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_smolvlm.convert.compare.samples import QUESTIONS, draw_pictures
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.generate.stream import AnswerStream
from mlx_smolvlm.media.encode import Medium
from mlx_smolvlm.prompt.messages import ImageSource, read_request
from mlx_smolvlm.smolvlm import SmolVLM

BUNDLED = Path(__file__).with_name("calibration.txt")
TEXTS, DATASETS = (".txt", ".md"), (".jsonl",)
WINDOW = 256  # tokens of a sample of text
MOST_SAMPLES = 512
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Sample:
    """Token ids `input_ids` (L,), of which those from `start` on are predicted.

    `pixel_values` (N, H, W, 3) are the tiles of the pictures; None without pictures.
    """

    input_ids: np.ndarray
    start: int = 1
    pixel_values: mx.array | None = None


def read_samples(vlm: SmolVLM, paths: Sequence[Path] = ()) -> list[Sample]:
    """Read the samples in files and folders; without `paths`, the bundled ones.

    At most `MOST_SAMPLES` are returned, evenly spread. Pictures have "low" detail.

    Args:
        vlm: The float model, which answers the questions about the bundled pictures.
        paths: Texts (.txt, .md), datasets of texts and pictures (.jsonl), or folders of them.

    Raises:
        CheckpointError: A path is not such a file or folder, or there is no token to predict.
        DatasetError: A line of a dataset is wrong.
        MediaError: A picture cannot be opened.
    """
    if paths:
        samples = [one for file in _find_files(paths) for one in _read_file(vlm, file)]
    else:
        samples = [
            *_split_text(vlm, BUNDLED.read_text(encoding="utf-8")),
            *_make_picture_samples(vlm),
        ]
    if not samples:
        raise CheckpointError("the calibration files hold no token to predict; give longer ones")
    count = min(len(samples), MOST_SAMPLES)
    return [samples[number * len(samples) // count] for number in range(count)]


def may_have_pictures(paths: Sequence[Path] = ()) -> bool:
    """Whether the samples that `read_samples` reads in `paths` may be about pictures.

    Raises:
        CheckpointError: As in `read_samples`.
    """
    return not paths or any(file.suffix.lower() in DATASETS for file in _find_files(paths))


def _find_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files to read, those of a folder sorted by path."""
    for path in paths:
        path = expand_path(path, CheckpointError)
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in inside if file.suffix.lower() in TEXTS + DATASETS]
        files = [file for file in files if file.is_file()]
        if not files:
            suffixes = ", ".join(TEXTS + DATASETS)
            raise CheckpointError(
                f"{path} is not a calibration file or a folder of them; use {suffixes}"
            )
        yield from files


def _read_file(vlm: SmolVLM, file: Path) -> Iterator[Sample]:
    """Yield the samples in `file`."""
    if file.suffix.lower() in TEXTS:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read as UTF-8 text: {error}") from None
        yield from _split_text(vlm, text)
        return
    from mlx_smolvlm.train.dataset import read_dataset

    for example in read_dataset(file):
        if example.videos:
            raise CheckpointError(f"{example.where}: calibration takes pictures, no videos")
        request = read_request([*example.prompt], tuple(example.images), (), None)
        media = vlm.engine.open_media(request, "low")
        yield from _make_answer_sample(vlm, request.messages, media, example.answers[0])


def _split_text(vlm: SmolVLM, text: str) -> Iterator[Sample]:
    """Yield the tokens of `text` in samples of up to `WINDOW` tokens."""
    ids = np.array(vlm.engine.prompt_builder.tokenizer.encode(text).ids, dtype=np.int64)
    size = min(WINDOW, vlm.config.text.max_position_embeddings)
    for start in range(0, ids.size - 1, size):
        part = ids[start : start + size]
        if part.size > 1:
            yield Sample(part)


def _make_picture_samples(vlm: SmolVLM) -> Iterator[Sample]:
    """Yield questions about the bundled pictures with the model's own answers."""
    for number, picture in enumerate(draw_pictures().values()):
        source: ImageSource = picture
        request = read_request(QUESTIONS[number % len(QUESTIONS)], (source,), (), None)
        media = vlm.engine.open_media(request, "low")
        sampling = Sampling(max_tokens=ANSWER_TOKENS)
        prompt = vlm.engine.make_prompt(request.messages, media)
        reply = AnswerStream(vlm.engine, prompt, sampling).finish()
        yield from _make_answer_sample(vlm, request.messages, media, reply.text)


def _make_answer_sample(
    vlm: SmolVLM, messages: list[dict[str, object]], media: Sequence[Medium], answer: str
) -> Iterator[Sample]:
    """Yield the sample that predicts `answer` and its end; nothing if it exceeds the context."""
    prompt = vlm.engine.make_prompt(messages, media)
    answer_ids = vlm.engine.prompt_builder.tokenizer.encode(answer, add_special_tokens=False).ids
    end = vlm.config.eos_token_ids[:1]
    ids = np.concatenate([prompt.input_ids, np.array([*answer_ids, *end], dtype=np.int64)])
    if ids.size > vlm.config.text.max_position_embeddings:
        return
    tiles = [tile for medium in media for _, tile in medium.make_tiles(vlm.config)]
    pixels = mx.array(np.stack(tiles)) if tiles else None
    yield Sample(ids, prompt.input_ids.size, pixels)
