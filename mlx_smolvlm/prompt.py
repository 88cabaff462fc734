"""Messages and image grids to `input_ids`.

The checkpoint's own chat template is rendered, and the result is tokenized piece
by piece, so that a special token counts only where the template wrote it. What a
user types, `<image>` or `<end_of_utterance>` included, stays text. Letter in
shapes: L prompt length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import CheckpointError, PromptError

if TYPE_CHECKING:
    import jinja2
    from tokenizers import AddedToken, Tokenizer

    from mlx_smolvlm.image import Grid

Message = Mapping[str, Any]

ROLES = ("user", "assistant", "system")
IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
GLOBAL = "<global-img>"
MAX_TILES_PER_SIDE = 6  # rows and columns that the format has a name for

_PROBE = "probe"


class PromptBuilder:
    """Prompts of one checkpoint.

    `tokenizer` is set to read special tokens in text as text; it decodes as usual.
    """

    def __init__(self, tokenizer_json: Path, chat_template: str, config: Config) -> None:
        self.config = config
        self.tokenizer = _read_tokenizer(tokenizer_json)
        self._tokens = _added_tokens(self.tokenizer)
        self._split = _split_pattern(self._tokens)
        self._special = [text for text, token in self._tokens.items() if token[1].special]
        self._template = _compile(chat_template)
        self.takes_images = self._probe()
        self._image_ids: dict[Grid, list[int]] = {}
        self._check_tokens()

    def build(
        self,
        messages: Sequence[Message],
        grids: Sequence[Grid],
        add_generation_prompt: bool = True,
    ) -> np.ndarray:
        """`input_ids` int32 (L,) of a conversation.

        Args:
            messages: Each has a "role" of `ROLES` and a "content", a text or a list of
                {"type": "text", "text": ...} and {"type": "image"}.
            grids: One for each image item, in order.
            add_generation_prompt: Whether the prompt ends with the start of an answer.

        Raises:
            PromptError: A message is malformed, images and grids differ in number, or
                the chat template refuses the messages.
        """
        plain = [_checked(message, number) for number, message in enumerate(messages, 1)]
        if not plain:
            raise PromptError("there are no messages; give at least one")
        images = sum(item["type"] == "image" for message in plain for item in message["content"])
        if images != len(grids):
            raise PromptError(
                f"the messages have {images} images and {len(grids)} pictures are given"
            )
        if images and not self.takes_images:
            raise PromptError(
                f"the messages have {images} images and this checkpoint's chat template takes text "
                "only; use a vision checkpoint or leave the images out"
            )
        mark = _unused_character(plain)
        prompt = self._render(_marked(plain, mark, self._special), add_generation_prompt)
        placeholders = [self.image_ids(grid) for grid in grids]
        return np.array(list(self._encode(prompt, mark, placeholders)), dtype=np.int32)

    def tokens_of(self, grid: Grid) -> int:
        """Tokens that a picture cut into `grid` takes in the prompt."""
        return len(self.image_ids(grid))

    def image_ids(self, grid: Grid) -> list[int]:
        """Ids that stand for a picture cut into `grid`.

        Raises:
            PromptError: The grid has more rows or columns than the format can name.
        """
        if grid not in self._image_ids:
            self._image_ids[grid] = list(self._encode(_image_text(grid, self.config), None, None))
        return self._image_ids[grid]

    def _encode(self, text: str, mark: str | None, images: list[list[int]] | None) -> Iterator[int]:
        """Ids of `text`, whose added tokens are tokens.

        Args:
            text: With `mark` where a user's text has to stay text.
            mark: A character to take out; None if there is none.
            images: Ids in place of each `<image>`, in order; None leaves `<image>` as it is.
        """
        place, placeholders = 0, iter(images or [])
        for match in self._split.finditer(text):
            yield from self._encode_run(text[place : match.start()], mark)
            place = match.end()
            token = match[0].strip() if match[0] not in self._tokens else match[0]
            if token == IMAGE and images is not None:
                yield from self._next_image(placeholders, len(images))
            else:
                yield self._tokens[token][0]
        yield from self._encode_run(text[place:], mark)
        if images is not None and next(placeholders, None) is not None:
            self._refuse_placeholders(len(images))

    def _encode_run(self, text: str, mark: str | None) -> list[int]:
        """Ids of text between two added tokens."""
        if mark is not None:
            text = text.replace(mark, "")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def _next_image(self, placeholders: Iterator[list[int]], count: int) -> list[int]:
        ids = next(placeholders, None)
        return self._refuse_placeholders(count) if ids is None else ids

    def _refuse_placeholders(self, count: int) -> NoReturn:
        raise PromptError(
            f"the messages have {count} images and the chat template writes another number of "
            f"{IMAGE}; it may not take images in a system or assistant message"
        )

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The chat template's text for `messages`."""
        if not self.takes_images:
            messages = [{**message, "content": _joined(message["content"])} for message in messages]
        try:
            return self._run_template(messages, add_generation_prompt)
        except Exception as error:  # a template runs any expression
            raise PromptError(f"the chat template refuses the messages: {_line(error)}") from None

    def _run_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

    def _probe(self) -> bool:
        """Whether the template takes content as a list of items, so also images; else a text.

        A template for text that is given a list either fails or prints the list.
        """
        failure: Exception | None = None
        items = [{"type": "text", "text": _PROBE}]
        for content, takes_images in ((items, True), (_PROBE, False)):
            try:
                text = self._run_template([{"role": "user", "content": content}], True)
            except Exception as error:  # a template runs any expression
                failure = error
                continue
            if _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text:
                return takes_images
        reason = f": {_line(failure)}" if failure else ", it leaves the text out"
        raise CheckpointError(f"the chat template cannot render a plain question{reason}")

    def _check_tokens(self) -> None:
        """Refuse a tokenizer that does not belong to this configuration."""
        vocab_size, limit = self.tokenizer.get_vocab_size(), self.config.text.vocab_size
        if vocab_size > limit:
            raise CheckpointError(
                f"the tokenizer has {vocab_size} tokens and config has text.vocab_size {limit}; "
                "they belong to different checkpoints"
            )
        if not self.takes_images:
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


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in `path`, without truncation and padding, special tokens read as text."""
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        decoder = tokenizer.get_added_tokens_decoder()
        names = _structural(token.content for token in decoder.values())
        if any(token.content in names and not token.special for token in decoder.values()):
            # Only special tokens can be read as text: what the format is made of must be.
            values = json.loads(text)
            for token in values["added_tokens"]:
                token["special"] = token["special"] or token["content"] in names
            tokenizer = Tokenizer.from_str(json.dumps(values))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; convert the checkpoint again") from None
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer: {_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _structural(texts: Iterator[str]) -> set[str]:
    """Which of `texts` shape a prompt, whether or not the tokenizer calls them special."""
    pattern = re.compile(
        r"<image>|<fake_token_around_image>|<global-img>|<row_\d_col_\d>|<end_of_utterance>|<\|.+\|>"
    )
    return {text for text in texts if pattern.fullmatch(text)}


def _added_tokens(tokenizer: Tokenizer) -> dict[str, tuple[int, AddedToken]]:
    """Id and flags of each added token, by its text."""
    decoder = tokenizer.get_added_tokens_decoder()
    return {token.content: (token_id, token) for token_id, token in decoder.items()}


def _split_pattern(tokens: dict[str, tuple[int, AddedToken]]) -> re.Pattern[str]:
    """A pattern that finds added tokens as the tokenizer does: leftmost, then longest."""
    parts = []
    for text in sorted(tokens, key=len, reverse=True):
        token = tokens[text][1]
        part = re.escape(text)
        if token.single_word:
            part = rf"(?<!\w){part}(?!\w)"
        before, after = r"\s*" * token.lstrip, r"\s*" * token.rstrip
        parts.append(before + part + after)
    return re.compile("|".join(parts) or "(?!)")


def _compile(chat_template: str) -> jinja2.Template:
    """The chat template, in a sandbox with the names that transformers gives it."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals = {
        "range": environment.globals["range"],
        "namespace": environment.globals["namespace"],
        "raise_exception": raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
    }
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    try:
        return environment.from_string(chat_template)
    except Exception as error:
        raise CheckpointError(f"the chat template cannot be read: {_line(error)}") from None


def _checked(message: Message, number: int) -> dict[str, Any]:
    """`message` rebuilt from plain values, its content a list of items."""
    where = f"message {number}"
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise PromptError(
            f"{where} must be an object with 'role' and 'content', not {message!r:.100}"
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(f"{where} has the role {role!r}; it must be one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not content:
        raise PromptError(f"{where} ({role}) has no content; give it a text or an image")
    return {"role": str(role), "content": [_checked_item(item, where) for item in content]}


def _checked_item(item: Any, where: str) -> dict[str, str]:
    """A content item rebuilt from plain values."""
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "image":
        return {"type": "image"}
    if kind != "text":
        raise PromptError(f"{where} has content of type {kind!r}; it must be 'text' or 'image'")
    text = item.get("text")
    if not isinstance(text, str):
        raise PromptError(f"{where} has a text item whose text is {text!r:.100}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where} has a character that is not valid Unicode at position {error.start}; "
            "its source may not be UTF-8"
        ) from None
    return {"type": "text", "text": str(text)}


def _joined(items: list[dict[str, str]]) -> str:
    """The text of items without images."""
    return "".join(item["text"] for item in items)


def _unused_character(messages: list[dict[str, Any]]) -> str:
    """A private-use character that no message holds."""
    texts = [
        item["text"]
        for message in messages
        for item in message["content"]
        if item["type"] == "text" and not item["text"].isascii()
    ]
    used = set("".join(texts))
    return next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)


def _marked(messages: list[dict[str, Any]], mark: str, special: list[str]) -> list[dict[str, Any]]:
    """`messages` with `mark` inside every special token that a text spells, and around texts.

    The marks around a text keep two texts from spelling a token together. They are set
    inside of leading and trailing white space, which templates may strip.
    """
    longest_first = sorted((re.escape(text) for text in special), key=len, reverse=True)
    starts = re.compile(f"(?=(?:{'|'.join(longest_first) or '(?!)'}))(.)", re.DOTALL)

    def guard(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        inner = starts.sub(rf"\1{mark}", core)
        return f"{text[:start]}{mark}{inner}{mark}{text[start + len(core) :]}"

    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": guard(item["text"])} if item["type"] == "text" else item
                for item in message["content"]
            ],
        }
        for message in messages
    ]


def _image_text(grid: Grid, config: Config) -> str:
    """The text that stands for a picture cut into `grid`."""
    if not 0 <= max(grid.rows, grid.cols) <= MAX_TILES_PER_SIDE or (grid.rows > 0) != (
        grid.cols > 0
    ):
        raise PromptError(
            f"a grid of {grid.rows} x {grid.cols} tiles has no name in the prompt; "
            f"rows and columns go to {MAX_TILES_PER_SIDE}"
        )
    tile = IMAGE * config.image_seq_len
    rows = "".join(
        "".join(f"{FAKE}<row_{row}_col_{col}>{tile}" for col in range(1, grid.cols + 1)) + "\n"
        for row in range(1, grid.rows + 1)
    )
    gap = "\n" if grid.rows else ""
    return f"{rows}{gap}{FAKE}{GLOBAL}{tile}{FAKE}"


def _line(error: Exception | None) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
