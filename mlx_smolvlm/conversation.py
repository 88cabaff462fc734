"""Conversations: `Conversation`, and the file format that it is saved in.

A saved conversation is a safetensors file written by `reuse.disk`. It holds the transcript, the
embeddings of its media, and the keys and values of its tokens.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import mlx.core as mx

from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import (
    CheckpointError,
    ContextError,
    PromptError,
    SmolVLMWarning,
)
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.generate.engine import ANSWER_SHARE, Engine
from mlx_smolvlm.generate.sampling import Sampling, SamplingOptions, choose_sampling
from mlx_smolvlm.generate.stream import AnswerStream, Reply
from mlx_smolvlm.media.encode import Footage, Medium, Picture
from mlx_smolvlm.prompt.messages import (
    NOUNS,
    ImageSource,
    Message,
    VideoSource,
    make_system_messages,
    read_request,
)
from mlx_smolvlm.prompt.template import normalize_message
from mlx_smolvlm.reuse.content import CachedState, Content
from mlx_smolvlm.reuse.disk import (
    extract_tensors,
    is_plain,
    parse_content,
    read_state_file,
    rebuild_cache,
    serialize_content,
    write_state_file,
)
from mlx_smolvlm.runtime import take_lock

if TYPE_CHECKING:
    from mlx_smolvlm.media.tiles import Detail


KIND = "conversation"  # of the files that `Conversation.save` writes
DROP_SHARE = 4  # dropping turns frees 1/4 of the context, for turns to come


@dataclass(frozen=True)
class Turn:
    """A question as a user message, its media in order, and the answer; None if not given yet."""

    question: Message
    media: tuple[Medium, ...]
    answer: str | None = None

    @property
    def messages(self) -> list[Message]:
        """The question, and the answer if there is one."""
        if self.answer is None:
            return [self.question]
        text = {"type": "text", "text": self.answer}
        return [self.question, {"role": "assistant", "content": [text]}]


@dataclass(frozen=True)
class ConversationOptions:
    """Options for all turns; see `SmolVLM.chat`.

    Raises:
        ValueError: `on_full` is neither "error" nor "drop-oldest".
    """

    sampling: Sampling
    detail: Detail
    on_full: Literal["error", "drop-oldest"] = "error"

    def __post_init__(self) -> None:
        if self.on_full not in ("error", "drop-oldest"):
            raise ValueError(f"on_full is {self.on_full!r}; it must be 'error' or 'drop-oldest'")


class Conversation:
    """A dialogue with the model, made by `SmolVLM.chat`.

    Each turn encodes only new pictures and videos and runs only new tokens, since the keys and
    values of earlier ones are kept. The answers equal those of `SmolVLM.ask` to the whole
    transcript.
    """

    def __init__(self, engine: Engine, system: str | None, options: ConversationOptions) -> None:
        self._engine, self._system, self._options = engine, system, options
        self._turns: list[Turn] = []
        self._stream: AnswerStream | None = None
        self._state: CachedState | None = None
        self._lock = threading.RLock()  # a thread that asks waits for others; other methods do not

    @property
    def system(self) -> str | None:
        """The system message, or None.

        If it is replaced, the turns stay, and are run again with the next question. A
        `PromptError` if the chat template takes no system message.
        """
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        with self._lock_thread():
            self._finish_answer()
            before, self._system = self._system, text
            try:
                _ = self.context_used
            except Exception:
                self._system = before
                raise

    @property
    def messages(self) -> list[Message]:
        """The transcript, including the unfinished answer so far."""
        turns, stream = self._turns, self._stream
        if stream is not None and stream.reply.token_ids:
            turns = [*turns[:-1], replace(turns[-1], answer=stream.reply.text)]
        return self._list_messages(turns)

    @property
    def context_size(self) -> int:
        """The context length of the model in tokens."""
        return self._engine.context_size

    @property
    def context_used(self) -> int:
        """Number of tokens in the transcript, including the unfinished answer."""
        turns, stream = self._turns, self._stream  # another thread may replace them meanwhile
        messages = self._list_messages(turns)
        if not messages:
            return 0
        is_answering = stream is not None
        size = self._engine.count_tokens(messages, _list_media(turns), is_answering)
        return size + (0 if stream is None else stream.reply.generation_tokens)

    def reset(self) -> None:
        """Remove all turns; the system message stays."""
        with self._lock_thread():
            self._finish_answer()
            self._turns, self._state = [], None

    def ask(
        self,
        prompt: str,
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        videos: Iterable[VideoSource] = (),
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Reply:
        """Ask `prompt` as the next turn, and return the whole answer; errors as in `stream`."""
        sampling = choose_sampling(sampling, options, self._options.sampling)
        with self._lock:
            return self.stream(prompt, images, videos=videos, sampling=sampling).finish()

    def stream(
        self,
        prompt: str | Sequence[Message],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        videos: Iterable[VideoSource] = (),
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AnswerStream:
        """Ask `prompt` as the next turn, and return the answer as a stream.

        The question joins the transcript at once. Its answer is recorded, as far as it was
        generated, when the next turn begins. If this method raises an error, the conversation
        is unchanged.

        Args:
            prompt: A question, or a list of one user message whose items place the media
                between its texts.
            images: As in `SmolVLM.ask`.
            videos: As in `SmolVLM.ask`.
            sampling: How this answer is generated; None uses the conversation's sampling.
            options: Attributes of `Sampling` to change for this answer.

        Raises:
            MediaError: A picture or video cannot be read.
            ContextError: The transcript is longer than the context; with
                `on_full="drop-oldest"`, this question alone is.
            PromptError: The message is malformed.
        """
        sampling = choose_sampling(sampling, options, self._options.sampling)
        with self._lock:
            self._finish_answer()
            request = read_request(prompt, images, videos, None)
            if len(request.messages) != 1 or request.messages[0]["role"] != "user":
                raise PromptError("a turn is one message of the user")
            turn = Turn(request.messages[0], self._engine.open_media(request, self._options.detail))
            return self._start_answer([*self._turns, turn], sampling)

    def retry(self, sampling: Sampling | None = None) -> AnswerStream:
        """Answer the last question again; the new answer replaces the old one.

        Args:
            sampling: How the answer is generated; None uses the conversation's sampling.

        Raises:
            PromptError: No question was asked yet.
        """
        with self._lock_thread():
            self._finish_answer()
            if not self._turns:
                raise PromptError("there is no question to ask again")
            *turns, last = self._turns
            return self._start_answer([*turns, replace(last, answer=None)], sampling)

    def undo(self) -> str | None:
        """Remove the last turn, and return the text of its question; None if there is no turn."""
        with self._lock_thread():
            self._finish_answer()
            if not self._turns:
                return None
            *self._turns, last = self._turns
        return "".join(item.get("text", "") for item in last.question["content"])

    def fork(self) -> Conversation:
        """An independent copy of the conversation, which shares all work done so far."""
        twin = Conversation(self._engine, self._system, self._options)
        with self._lock_thread():
            self._finish_answer()
            twin._turns = self._turns  # a list of turns is replaced, never changed
            twin._state = None if self._state is None else self._state.fork()
        return twin

    def save(self, path: str | os.PathLike[str], *, with_cache: bool = True) -> None:
        """Write the transcript, its encoded media and its keys and values to one file.

        Args:
            path: The file.
            with_cache: Whether to write the keys and values, which are most of the file. Without
                them, the first question after `load` computes them again.

        Raises:
            OSError: The file cannot be written, or is a device or a pipe. An existing file is
                then unchanged.
            MediaError: A video that was not encoded yet cannot be decoded.
        """
        target = expand_path(os.fspath(path))
        with self._lock_thread():
            self._finish_answer()
            for medium in _list_media(self._turns):
                self._engine.encode([medium])
            state = self._state if with_cache else None
            saved = SavedConversation(self._system, self._turns, state)
            write_conversation(saved, target, self._engine.checkpoint_digest)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace this conversation by the one that `save` wrote to `path`.

        Raises:
            CheckpointError: The file was not written by `save`, is damaged, or belongs to
                another checkpoint or version. The conversation is then unchanged.
        """
        engine = self._engine
        source = expand_path(os.fspath(path), CheckpointError)
        saved = read_conversation(source, engine.checkpoint_digest, engine.config)
        other = Conversation(engine, saved.system, self._options)
        other._turns = saved.turns
        try:
            _ = other.context_used  # the chat template may refuse well-formed messages
        except PromptError as error:
            raise CheckpointError(f"{path} is not a conversation of this model: {error}") from None
        with self._lock_thread():
            self.reset()
            self._system, self._turns = saved.system, saved.turns
            if engine.cache_options.is_plain:  # files hold plain caches only
                self._state = saved.state

    def _start_answer(self, wanted: list[Turn], sampling: Sampling | None = None) -> AnswerStream:
        """Replace the turns by `wanted`, and return the stream of the last turn's answer.

        Warns if the oldest turns are dropped because the context is full.
        """
        turns, stream = self._fit_context(wanted, sampling or self._options.sampling)
        drops = len(wanted) - len(turns)
        if drops:
            warnings.warn(
                f"the context is full: the oldest {drops} of {len(self._turns)} questions are "
                "forgotten with their answers, and the rest is run again",
                SmolVLMWarning,
                stacklevel=3,
            )
        self._turns, self._stream = turns, stream
        return stream

    def _fit_context(
        self, turns: list[Turn], sampling: Sampling
    ) -> tuple[list[Turn], AnswerStream]:
        """Drop turns that exceed the context; return the rest and the stream of the last answer.

        Dropping a turn means that all later ones are run again. Therefore enough are dropped at
        once to make room for several turns to come.
        """
        can_drop, size = self._options.on_full == "drop-oldest", self.context_size
        answer = min(sampling.max_tokens, size // ANSWER_SHARE)
        limit = size - answer
        while True:
            messages, media = self._list_messages(turns), _list_media(turns)
            may_drop = can_drop and len(turns) > 1
            try:
                prompt = self._engine.make_prompt(messages, media)
            except ContextError:
                if not may_drop:
                    raise
            else:
                if not may_drop or prompt.input_ids.size <= limit:
                    prompt = replace(prompt, state=self._state, is_turn=True)
                    return turns, AnswerStream(self._engine, prompt, sampling)
            limit = size - answer - size // DROP_SHARE
            turns = turns[1:]

    def _list_messages(self, turns: Sequence[Turn]) -> list[Message]:
        """The messages of `turns`, after the system message."""
        messages = [message for turn in turns for message in turn.messages]
        return [*make_system_messages(self._system), *messages]

    def _lock_thread(self) -> AbstractContextManager[None]:
        """Return a lock on this conversation; a SmolVLMError if another thread asks a question."""
        return take_lock(
            self._lock,
            "a question of this conversation is being answered in another thread; wait until "
            "that is done, or use a separate conversation in each thread",
        )

    def _finish_answer(self) -> None:
        """End the open stream, and record its answer and its cache."""
        if self._stream is not None:
            self._stream.close()
            *turns, last = self._turns
            self._turns = [*turns, replace(last, answer=self._stream.reply.text)]
            self._state = self._stream.state
            self._stream = None


def _list_media(turns: Sequence[Turn]) -> list[Medium]:
    """All media of `turns`, in order."""
    return [medium for turn in turns for medium in turn.media]


@dataclass(frozen=True)
class SavedConversation:
    """What a conversation file holds."""

    system: str | None
    turns: list[Turn]
    state: CachedState | None


@dataclass(frozen=True)
class SavedFrameTimes:
    """Times of the frames of a saved video, and its duration, in seconds."""

    timestamps_s: tuple[float, ...]
    duration_s: float


def write_conversation(saved: SavedConversation, path: Path, checkpoint: str) -> None:
    """Write `saved` to `path` atomically. Its media must be encoded.

    Raises:
        OSError: The file cannot be written.
    """
    tensors: dict[str, mx.array] = {}
    turns = []
    for turn in saved.turns:
        media = []
        for medium in turn.media:
            assert medium.image_embeds is not None
            name = f"media.{len(tensors)}"
            tensors[name] = medium.image_embeds
            media.append({"tensor": name, "digest": medium.digest, **_describe_medium(medium)})
        turns.append({"question": turn.question, "answer": turn.answer, "media": media})
    values: dict[str, Any] = {"system": saved.system, "turns": turns, "content": None}
    state = saved.state
    if state is not None and state.num_tokens and is_plain(state.cache):
        tensors |= extract_tensors(state.cache, state.num_tokens)
        ids, spans = state.content.ids[: state.num_tokens], state.content.spans
        whole = tuple(span for span in spans if span.stop <= state.num_tokens)
        values["content"] = serialize_content(Content(ids, whole))
    if not tensors:
        tensors["empty"] = mx.zeros((1,))
    write_state_file(path, KIND, checkpoint, tensors, values, follow_links=True)


def read_conversation(path: Path, checkpoint: str, config: Config) -> SavedConversation:
    """Read and check the conversation that `write_conversation` wrote to `path`.

    Raises:
        CheckpointError: The file is no conversation, is damaged, or belongs to another
            checkpoint or version.
    """
    tensors, values = read_state_file(path, KIND, checkpoint)
    try:
        turns = [_read_turn(turn, tensors, config) for turn in values["turns"]]
        system, content = values["system"], values["content"]
        if system is not None:
            system = _read_text("system", system)
    except (KeyError, TypeError, ValueError, OverflowError, PromptError):
        raise CheckpointError(f"{path} is damaged") from None
    if content is None:
        return SavedConversation(system, turns, None)
    return SavedConversation(
        system, turns, CachedState(parse_content(content, config), rebuild_cache(tensors, config))
    )


def _read_turn(values: Mapping[str, Any], tensors: Mapping[str, mx.array], config: Config) -> Turn:
    """Read and check a turn.

    Raises:
        PromptError: A message is malformed.
        KeyError, TypeError, ValueError, OverflowError: A value is missing or of a wrong type.
    """
    question = normalize_message(values["question"], 1)
    media = tuple(_read_medium(one, tensors, config) for one in values["media"])
    items = [item["type"] for item in question["content"] if item["type"] in NOUNS]
    kinds = ["image" if isinstance(one, Picture) else "video" for one in media]
    if question["role"] != "user" or items != kinds:
        raise ValueError
    answer = values["answer"]
    return Turn(question, media, None if answer is None else _read_text("assistant", answer))


def _read_text(role: str, value: Any) -> str:
    """Check `value` as the text of a message of `role`; errors as in `_read_turn`."""
    if not isinstance(value, str):
        raise TypeError
    message: Message = normalize_message({"role": role, "content": value}, 1)
    return str(message["content"][0]["text"])


def _describe_medium(medium: Medium) -> dict[str, Any]:
    """The properties of `medium` that prompts depend on, as JSON values."""
    if isinstance(medium, Picture):
        return {"kind": "picture", "grid": [medium.grid.rows, medium.grid.cols]}
    times = medium.times
    return {
        "kind": "video",
        "timestamps_s": list(times.timestamps_s),
        "duration_s": times.duration_s,
    }


def _read_medium(
    values: Mapping[str, Any], tensors: Mapping[str, mx.array], config: Config
) -> Medium:
    """Rebuild a medium, with its embeddings, from `values`; errors as in `_read_turn`."""
    from mlx_smolvlm.media.tiles import Grid

    medium: Medium
    if values["kind"] == "picture":
        rows, cols = values["grid"]
        if (type(rows), type(cols)) != (int, int):
            raise TypeError
        medium = Picture(None, Grid(rows, cols), "high", str(values["digest"]))
    else:
        times = SavedFrameTimes(
            tuple(map(float, values["timestamps_s"])), float(values["duration_s"])
        )
        if not all(map(math.isfinite, times.timestamps_s)) or not 0 <= times.duration_s < math.inf:
            raise ValueError
        medium = Footage(times, None, str(values["digest"]))
    embeds = tensors[values["tensor"]]
    shape = (medium.num_tiles, config.image_seq_len, config.text.hidden_size)
    if tuple(embeds.shape) != shape or embeds.size == 0:
        raise ValueError
    if not mx.issubdtype(embeds.dtype, mx.floating):
        raise TypeError
    medium.image_embeds = embeds
    return medium
