"""Turns messages and image grids into `input_ids`.

The checkpoint's own chat template is rendered, and the result is tokenized piece by piece, so
that special tokens are recognized only where the template wrote them. Special tokens that a user
types, such as `<image>` or `<end_of_utterance>`, stay text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import CheckpointError, PromptError
from mlx_smolvlm.media.timeline import FrameTimes, format_duration, format_timestamp
from mlx_smolvlm.prompt.template import (
    ChatTemplate,
    find_unused_character,
    mark_special_tokens,
    normalize_message,
)
from mlx_smolvlm.prompt.tokenizer import FRAMING_TOKEN, convert_native_errors, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from mlx_smolvlm.media.tiles import Grid


def insert_frames(
    messages: list[dict[str, Any]], grids: Sequence[Grid], clips: Sequence[FrameTimes]
) -> tuple[list[dict[str, Any]], list[Grid]]:
    """Replace the videos in `messages` by texts and images, one image per frame.

    Source: transformers 5.23, SmolVLMProcessor.replace_video_token. It uses a separate template
    for videos; the checkpoint's template writes the same text for these items.

    Returns:
        The new messages, and the grids of all their images in order.

    Raises:
        PromptError: The numbers of videos and of `clips` differ.
    """
    videos = sum(item["type"] == "video" for m in messages for item in m["content"])
    if videos != len(clips):
        raise PromptError(f"the messages have {videos} videos and {len(clips)} clips are given")
    if not clips:
        return messages, list(grids)
    from mlx_smolvlm.media.tiles import Grid

    image_grids, later_clips, all_grids = list(grids), list(clips), list[Grid]()
    result = []
    for message in messages:
        content: list[dict[str, str]] = []
        for item in message["content"]:
            if item["type"] == "video":
                clip = later_clips.pop(0)
                content += _make_frame_items(clip)
                all_grids += [Grid(0, 0)] * len(clip.timestamps_s)
            else:
                content.append(item)
                if item["type"] == "image" and image_grids:
                    all_grids.append(image_grids.pop(0))
        result.append({**message, "content": content})
    return result, all_grids + image_grids


# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


def spell_number(number: int) -> str:
    """Return `number`, from 0 to 999,999, in words, as num2words does: "one hundred and two"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[rest]}" if rest else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, size)
    joint = " and" if rest < 100 else ","
    return f"{spell_number(count)} {name}" + (f"{joint} {spell_number(rest)}" if rest else "")


def _make_frame_items(clip: FrameTimes) -> list[dict[str, str]]:
    """Return the texts and images that stand for `clip`."""
    text = (
        f"You are provided the following series of {spell_number(len(clip.timestamps_s))} frames "
        f"from a {format_duration(clip.duration_s)} [H:MM:SS] video.\n"
    )
    items = []
    for seconds in clip.timestamps_s:
        items += [
            {"type": "text", "text": f"{text}\nFrame from {format_timestamp(seconds)}:"},
            {"type": "image"},
        ]
        text = ""
    return [*items, {"type": "text", "text": "\n\n"}]


IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
GLOBAL = "<global-img>"
NUMBER_TOKEN = re.compile(r"\W?[0-9]+|\u0120[0-9]+|<loc_[0-9]+>")  # U+0120 is a space in BPE
# Tags of DocTags that no other text has; every element of a page has its location.
DOCUMENT_TOKEN = re.compile(r"<(?:doctag|otsl|loc_(?:\d+>)?)>?")


class PromptBuilder:
    """Builds the prompts of one checkpoint.

    Attributes:
        config: The checkpoint's configuration.
        tokenizer: Encodes special tokens in a text as text; decodes as usual.
        framing_token_ids: Ids of the tokens that frame turns and pictures. They are not part
            of an answer's text.
        document_token_ids: Ids of the tokens with which a document in DocTags begins; none if the
            checkpoint does not write DocTags.
        answer_lead: White space that every answer begins with.
    """

    def __init__(self, tokenizer: Path | Tokenizer, chat_template: str, config: Config) -> None:
        self.config = config
        if isinstance(tokenizer, Path):
            tokenizer = read_tokenizer(tokenizer, config.text.vocab_size)
        self.tokenizer = tokenizer
        self._tokens = _read_added_tokens(self.tokenizer)
        self._split = _make_split_pattern(self._tokens)
        self._stripped = {text.strip(): text for text in self._tokens}
        self._special = [text for text, token in self._tokens.items() if token[1].special]
        self.framing_token_ids = frozenset(
            token_id
            for text, (token_id, _) in self._tokens.items()
            if FRAMING_TOKEN.fullmatch(text)
        )
        self.document_token_ids = frozenset(
            token_id
            for text, (token_id, _) in self._tokens.items()
            if DOCUMENT_TOKEN.fullmatch(text)
        )
        self._template = ChatTemplate(chat_template)
        self.answer_lead = self._template.find_answer_lead()
        self._image_ids: dict[Grid, tuple[int, ...]] = {}
        self._check_tokens()

    @cached_property
    def number_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that are numbers, or locations in DocTags."""
        vocabulary = self.tokenizer.get_vocab().items()
        return frozenset(token_id for text, token_id in vocabulary if NUMBER_TOKEN.fullmatch(text))

    def build(
        self,
        messages: Sequence[Mapping[str, Any]],
        grids: Sequence[Grid],
        add_generation_prompt: bool = True,
        clips: Sequence[FrameTimes] = (),
    ) -> np.ndarray:
        """Return the `input_ids` of a conversation, int32 (L,).

        Args:
            messages: Each has a "role" (see `ROLES`) and a "content", which is a text or a list
                of {"type": "text", "text": ...}, {"type": "image"} and {"type": "video"}.
            grids: One for each image item, in order.
            add_generation_prompt: Whether the prompt ends with the start of an answer.
            clips: One for each video item, in order.

        Raises:
            PromptError: A message is malformed, the numbers of images and grids or of videos
                and clips differ, or the chat template refuses the messages.
        """
        plain = [normalize_message(message, number) for number, message in enumerate(messages, 1)]
        if not plain:
            raise PromptError("there are no messages; give at least one")
        plain, grids = insert_frames(plain, grids, clips)
        images = sum(item["type"] == "image" for message in plain for item in message["content"])
        if images != len(grids):
            raise PromptError(
                f"the messages have {images} images and {len(grids)} pictures are given"
            )
        if images and not self._template.takes_images:
            raise PromptError(
                f"the messages have {images} images and this checkpoint's chat template takes text "
                "only; use a vision checkpoint or leave the images out"
            )
        mark = find_unused_character(plain)
        prompt = self._template.render(
            mark_special_tokens(plain, mark, self._special), add_generation_prompt
        )
        image_ids = [self.encode_grid(grid) for grid in grids]
        return np.array(list(self._encode(prompt, mark, image_ids)), dtype=np.int32)

    def count_image_tokens(self, grid: Grid) -> int:
        """Return the number of tokens of a picture with `grid` in the prompt."""
        return len(self.encode_grid(grid))

    def count_clip_tokens(self, clip: FrameTimes) -> int:
        """Return the number of tokens of a clip in the prompt, its timestamps included."""
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        about_clip = {"role": "user", "content": [{"type": "video"}, *question["content"]]}
        return self.build([about_clip], [], clips=[clip]).size - self.build([question], []).size

    def encode_grid(self, grid: Grid) -> tuple[int, ...]:
        """Return the token ids that stand for a picture with `grid` in the prompt.

        Raises:
            PromptError: The grid has more rows or columns than there are tokens for.
        """
        if grid not in self._image_ids:
            text = _write_image_text(grid, self.config)
            self._image_ids[grid] = tuple(self._encode(text, None, None))
        return self._image_ids[grid]

    def _encode(
        self, text: str, mark: str | None, images: list[tuple[int, ...]] | None
    ) -> Iterator[int]:
        """Yield the token ids of `text`, added tokens recognized.

        Args:
            text: A rendered chat template.
            mark: The character that `mark_special_tokens` inserted, to remove again; None if it
                inserted none.
            images: The ids that replace each `<image>`, in order; None keeps the `<image>` token.
        """
        place, placeholders = 0, iter(images or [])
        for match in self._split.finditer(text):
            yield from self._encode_run(text[place : match.start()], mark)
            place = match.end()
            token = match[0] if match[0] in self._tokens else self._stripped[match[0].strip()]
            if token == IMAGE and images is not None:
                yield from self._take_next_image(placeholders, len(images))
            else:
                yield self._tokens[token][0]
        yield from self._encode_run(text[place:], mark)
        if images is not None and next(placeholders, None) is not None:
            self._refuse_placeholders(len(images))

    def _encode_run(self, text: str, mark: str | None) -> list[int]:
        """Return the token ids of a text between two added tokens."""
        if mark is not None:
            text = text.replace(mark, "")
        if not text:
            return []
        with convert_native_errors(PromptError, "the tokenizer cannot read the prompt"):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _take_next_image(
        self, placeholders: Iterator[tuple[int, ...]], count: int
    ) -> tuple[int, ...]:
        ids = next(placeholders, None)
        return self._refuse_placeholders(count) if ids is None else ids

    def _refuse_placeholders(self, count: int) -> NoReturn:
        raise PromptError(
            f"the messages have {count} images and the chat template writes a different number of "
            f"{IMAGE}; it may not take images in a system or assistant message"
        )

    def _check_tokens(self) -> None:
        """Raise CheckpointError if the tokenizer does not fit the configuration."""
        limit = self.config.text.vocab_size
        added = [token_id for token_id, _ in self._tokens.values()]
        highest = max([self.tokenizer.get_vocab_size() - 1, *added])
        if highest >= limit:
            raise CheckpointError(
                f"the tokenizer has token id {highest} and text.vocab_size is {limit} in config; "
                "they belong to different checkpoints"
            )
        if not self._template.takes_images:
            return
        for text in (IMAGE, FAKE):
            if text not in self._tokens:
                raise CheckpointError(f"the tokenizer has no added token {text}")
        image_token_id = self._tokens[IMAGE][0]
        if image_token_id != self.config.image_token_id:
            raise CheckpointError(
                f"{IMAGE} is {image_token_id} in the tokenizer and image_token_id is "
                f"{self.config.image_token_id} in config; they belong to different checkpoints"
            )


def _read_added_tokens(tokenizer: Tokenizer) -> dict[str, tuple[int, AddedToken]]:
    """Return the id and the flags of each added token, by its text."""
    decoder = tokenizer.get_added_tokens_decoder()
    return {token.content: (token_id, token) for token_id, token in decoder.items()}


def _make_split_pattern(tokens: dict[str, tuple[int, AddedToken]]) -> re.Pattern[str]:
    """Return a pattern that finds added tokens as the tokenizer does: leftmost, then longest."""
    parts = []
    for text in sorted(tokens, key=len, reverse=True):
        token = tokens[text][1]
        part = re.escape(text)
        if token.single_word:
            part = rf"(?<!\w){part}(?!\w)"
        before, after = r"\s*" * token.lstrip, r"\s*" * token.rstrip
        parts.append(before + part + after)
    return re.compile("|".join(parts) or "(?!)")


def _write_image_text(grid: Grid, config: Config) -> str:
    """Return the text that stands for a picture with `grid` in the prompt."""
    from mlx_smolvlm.media.tiles import MAX_TILES_PER_SIDE

    names = range(1, MAX_TILES_PER_SIDE + 1)
    single = grid.rows == grid.cols == 0
    if not single and (grid.rows not in names or grid.cols not in names):
        raise PromptError(
            f"the prompt format has no tokens for a grid of {grid.rows} x {grid.cols} tiles; "
            f"rows and columns go to {MAX_TILES_PER_SIDE}"
        )
    tile = IMAGE * config.image_seq_len
    rows = "".join(
        "".join(f"{FAKE}<row_{row}_col_{col}>{tile}" for col in range(1, grid.cols + 1)) + "\n"
        for row in range(1, grid.rows + 1)
    )
    gap = "\n" if grid.rows else ""
    return f"{rows}{gap}{FAKE}{GLOBAL}{tile}{FAKE}"
