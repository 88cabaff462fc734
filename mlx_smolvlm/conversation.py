"""A conversation: messages that build on each other, and never the same work twice."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Unpack

from mlx_smolvlm.answer import AnswerStream, Reply
from mlx_smolvlm.content import State
from mlx_smolvlm.context import ROOM
from mlx_smolvlm.engine import Engine
from mlx_smolvlm.errors import CheckpointError, ContextError, PromptError, SmolVLMWarning
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.media import Medium
from mlx_smolvlm.messages import ImageSource, Message, VideoSource, read_request, system_message
from mlx_smolvlm.sampling import Sampling, SamplingOptions, choose_sampling
from mlx_smolvlm.saved import Saved, Turn, load, save

if TYPE_CHECKING:
    from mlx_smolvlm.image import Detail

DROP_SHARE = 4  # a quarter of a full context is freed for the turns to come


@dataclass(frozen=True)
class ConversationOptions:
    """What holds for every turn; see `SmolVLM.chat`.

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
    """Messages that build on each other.

    A turn encodes the pictures and videos that are new, and runs the tokens that are:
    keys and values of the others are kept. The answers are those that the whole
    transcript would get from `SmolVLM.ask`.
    """

    def __init__(self, engine: Engine, system: str | None, options: ConversationOptions) -> None:
        self._engine, self._system, self._options = engine, system, options
        self._turns: list[Turn] = []
        self._open: AnswerStream | None = None
        self._state: State | None = None
        self._lock = threading.RLock()  # threads that ask wait for each other's whole answers

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._system

    @property
    def messages(self) -> list[Message]:
        """The transcript, with the last answer as far as it was said."""
        turns, stream = self._turns, self._open
        if stream is not None and stream.reply.token_ids:
            turns = [*turns[:-1], replace(turns[-1], answer=stream.reply.text)]
        return self._transcript(turns)

    @property
    def context_size(self) -> int:
        """Tokens that the model can look at."""
        return self._engine.context_size

    @property
    def context_used(self) -> int:
        """Tokens of the transcript, and of the answer that is being given."""
        messages = self._transcript(self._turns)
        if not messages:
            return 0
        is_answering = self._open is not None
        size = self._engine.count_tokens(messages, _media(self._turns), is_answering)
        return size + (0 if self._open is None else self._open.reply.generation_tokens)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._settle()
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
        """The whole answer to the next `prompt`; errors as in `SmolVLM.ask`."""
        sampling = choose_sampling(sampling, options, self._options.sampling)
        with self._lock:
            return self.stream(prompt, images, videos=videos, sampling=sampling).finished()

    def stream(
        self,
        prompt: str | Sequence[Message],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        videos: Iterable[VideoSource] = (),
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AnswerStream:
        """The answer to the next `prompt` as it is generated.

        A turn joins the transcript once it is asked, with what was said of its
        answer when the next one is. A turn that raises leaves no trace.

        Args:
            prompt: A question; or a list of one user message, whose items say where
                between its texts the media go.
            images: As in `SmolVLM.ask`.
            videos: Likewise.
            sampling: How this answer is generated; by default as every turn.
            options: The attributes of `Sampling` that are to differ for this answer.

        Raises:
            MediaError: A picture or video cannot be read.
            ContextError: The transcript is longer than the context (with
                `on_full="drop-oldest"`: this question alone is).
            PromptError: The message is malformed.
        """
        sampling = choose_sampling(sampling, options, self._options.sampling)
        with self._lock:
            self._settle()
            request = read_request(prompt, images, videos, None)
            if len(request.messages) != 1 or request.messages[0]["role"] != "user":
                raise PromptError("a turn is one message of the user")
            turn = Turn(request.messages[0], self._engine.open_media(request, self._options.detail))
            return self._begin([*self._turns, turn], sampling)

    def retry(self, sampling: Sampling | None = None) -> AnswerStream:
        """Another answer to the last question, in place of the one that was given.

        Args:
            sampling: How it is generated; None as every turn.

        Raises:
            PromptError: There is no question.
        """
        self._settle()
        if not self._turns:
            raise PromptError("there is no question to ask again")
        return self._begin([*self._turns[:-1], replace(self._turns[-1], answer=None)], sampling)

    def undo(self) -> str | None:
        """Take the last question and its answer back; its text, or None if there is none."""
        self._settle()
        if not self._turns:
            return None
        question = self._turns.pop().question
        return "".join(item.get("text", "") for item in question["content"])

    def fork(self) -> Conversation:
        """A conversation that goes on from here by itself; nothing is encoded or run again."""
        self._settle()
        twin = Conversation(self._engine, self._system, self._options)
        twin._turns = list(self._turns)
        twin._state = None if self._state is None else self._state.fork()
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the transcript, its encoded media and its keys and values to one file.

        Raises:
            OSError: It cannot be written, or is a device or a pipe; what was there stays as it
                was.
            MediaError: A video that was not looked at yet cannot be decoded.
        """
        target = expand_path(os.fspath(path))
        self._settle()
        for medium in _media(self._turns):
            self._engine.encode([medium])
        saved = Saved(self._system, self._turns, self._state)
        save(saved, target, self._engine.checkpoint_digest)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote to `path`; what was said here is forgotten.

        Raises:
            CheckpointError: It was not written by `save`, is damaged, or belongs to another
                checkpoint or version; the conversation stays as it was.
        """
        engine = self._engine
        source = expand_path(os.fspath(path), CheckpointError)
        saved = load(source, engine.checkpoint_digest, engine.config)
        other = Conversation(engine, saved.system, self._options)
        other._turns = saved.turns
        try:
            _ = other.context_used  # the chat template may refuse what is well formed
        except PromptError as error:
            raise CheckpointError(f"{path} is not a conversation of this model: {error}") from None
        self.reset()
        self._system, self._turns = saved.system, saved.turns
        if engine.cache_options.is_plain:  # as files are; other caches begin anew
            self._state = saved.state

    def _begin(self, wanted: list[Turn], sampling: Sampling | None = None) -> AnswerStream:
        """The stream of the last answer to `wanted`, which replaces the turns so far.

        Warns of the oldest turns that the context does not hold.
        """
        turns, stream = self._fit(wanted, sampling or self._options.sampling)
        dropped = len(wanted) - len(turns)
        if dropped:
            warnings.warn(
                f"the context is full: the oldest {dropped} of {len(self._turns)} questions are "
                "forgotten with their answers, and the rest is run again",
                SmolVLMWarning,
                stacklevel=3,
            )
        self._turns, self._open = turns, stream
        return stream

    def _fit(self, turns: list[Turn], sampling: Sampling) -> tuple[list[Turn], AnswerStream]:
        """The turns that the context has room for, and the stream of the last one's answer.

        All turns after a dropped one are run again. So once one has to go, as many go as make
        room for several turns to come.
        """
        drops, size = self._options.on_full == "drop-oldest", self.context_size
        answer = min(sampling.max_tokens, size // ROOM)
        limit = size - answer
        while True:
            messages, media = self._transcript(turns), _media(turns)
            may_drop = drops and len(turns) > 1
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

    def _transcript(self, turns: Sequence[Turn]) -> list[Message]:
        """The messages of `turns`, after the system message."""
        said = [message for turn in turns for message in turn.messages]
        return [*system_message(self._system), *said]

    def _settle(self) -> None:
        """Write down what was said in the last turn, and keep what it has computed."""
        if self._open is not None:
            self._open.close()
            self._turns[-1] = replace(self._turns[-1], answer=self._open.reply.text)
            self._state = self._open.state
            self._open = None


def _media(turns: Sequence[Turn]) -> list[Medium]:
    """All media of `turns`, in order."""
    return [medium for turn in turns for medium in turn.media]
