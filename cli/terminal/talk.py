"""A conversation and the media of its next message; each slash command is a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.conversations import Keeper, KeptConversation, resume_conversation
from mlx_smolvlm.cli.load import name_model
from mlx_smolvlm.cli.many_pictures import expand_sources, open_closed, open_pictures
from mlx_smolvlm.cli.media import (
    OpenedImage,
    OpenedMedium,
    OpenedVideo,
    open_video_source,
    print_cost,
    sample_video,
)
from mlx_smolvlm.cli.output import OutputClosedError, format_stats, say, say_wrapped
from mlx_smolvlm.cli.paths import is_video
from mlx_smolvlm.cli.question import announce_media, read_typed_question
from mlx_smolvlm.cli.terminal.paths import split_sources
from mlx_smolvlm.cli.terminal.pictures import Thumbnails
from mlx_smolvlm.errors import PromptError, escape_controls
from mlx_smolvlm.files import expand_path

if TYPE_CHECKING:
    from mlx_smolvlm import AnswerStream, Reply, SmolVLM
    from mlx_smolvlm.cli.args import ChatOptions
    from mlx_smolvlm.cli.printer import Printer
    from mlx_smolvlm.media.video import Clip

RETRY_TEMPERATURE, RETRY_TOP_P = 0.7, 0.95  # for /retry where answers are greedy


class Talk:
    """A conversation on a terminal.

    A method that raises an error leaves the conversation as it was.
    """

    def __init__(
        self,
        vlm: SmolVLM,
        options: ChatOptions,
        printer: Printer,
        kept: KeptConversation | None = None,
    ) -> None:
        self._vlm, self._options, self._printer = vlm, options, printer
        self._thumbnails = Thumbnails(options.pictures)
        self._images: list[OpenedImage] = []
        self._clips: list[Clip] = []
        self._reply: Reply | None = None
        self._retries = 0
        self._conversation = resume_conversation(vlm, options, kept)
        self._keeper = Keeper(vlm, kept, None if kept is None else self._conversation.messages)
        if kept is not None:
            self._print_transcript()

    def keep(self) -> None:
        """Keep what was said for `chat --continue`, if it has changed."""
        self._keeper.keep(self._conversation)

    def say_goodbye(self) -> None:
        """Say how to go on later."""
        if self._keeper.has_file:
            say("mlx-smolvlm chat --continue goes on with this conversation", dim=True)

    def format_status(self) -> str:
        """Return the model, the context, the media to send and the last speed in one line."""
        conversation, reply = self._conversation, self._reply
        parts = [name_model(self._options, self._vlm)]
        parts.append(f"{conversation.context_used:,} of {conversation.context_size:,} tokens")
        if media := self._count_media():
            parts.append(f"{media} for the next message")
        if reply is not None and reply.generation_tps:
            parts.append(f"{reply.generation_tps:.1f} tokens/s")
        return escape_controls(" | ".join(parts))

    def _count_media(self) -> str:
        """Return how many pictures and videos the next message has."""
        counts = ((len(self._images), "picture"), (len(self._clips), "video"))
        return ", ".join(f"{n} {noun}{'s' * (n > 1)}" for n, noun in counts if n)

    def add_sources(self, sources: Sequence[str], are_videos: bool | None = None) -> None:
        """Open pictures and videos for the next message; None tells them apart by suffix."""
        videos = [
            source for source in sources if (is_video(source) if are_videos is None else are_videos)
        ]
        pictures = expand_sources([source for source in sources if source not in videos])
        opened = open_closed(self._vlm, open_pictures(pictures), self._options.detail)
        clips = [open_video_source(source, self._options.frames) for source in videos]
        self.add_media([*opened, *clips])

    def add_media(self, media: Sequence[OpenedMedium]) -> None:
        """Add `media` to the next message; show them, and print how many tokens they take."""
        images = [one for one in media if isinstance(one, OpenedImage)]
        clips = []
        for image in images:
            self._thumbnails.show(image.image)
            print_cost(self._vlm, image, self._options.detail)
        for one in media:
            if isinstance(one, OpenedVideo):
                clips.append(sample_video(self._vlm, one))
                self._thumbnails.show_clip(clips[-1])
        self._images = [*self._images, *images]
        self._clips = [*self._clips, *clips]

    def ask_typed(self, text: str) -> None:
        """Ask a question as it was typed, about the media of this message and those it names.

        If it is not answered, only the media remain that were there before.

        Raises:
            MediaError: It names a picture or video that does not exist.
        """
        images, clips = self._images, self._clips
        messages = self._conversation.messages
        has_media = any(item["type"] != "text" for one in messages for item in one["content"])
        typed = read_typed_question([text], len(images), len(clips), has_media)
        try:
            self.add_sources(typed.named)
            announce_media(typed)
            self.ask(typed.text)
        finally:
            if self._images or self._clips:  # it was not answered
                self._images, self._clips = images, clips

    def ask(self, text: str) -> None:
        """Ask about the media of this message, and print the answer.

        If the question fails, or is stopped before its answer begins, it is removed.
        """
        images, clips = self._images, self._clips
        stream = self._conversation.stream(text, images=[one.image for one in images], videos=clips)
        self._images, self._clips, self._retries = [], [], 0
        if not self._print_answer(stream):
            self._conversation.undo()
            self._images, self._clips = images, clips

    def _print_answer(self, stream: AnswerStream) -> bool:
        """Print an answer; return False if it was stopped before its first word."""
        try:
            finished = self._printer.print_answer(stream)
        except Exception as error:
            # Where the terminal or the reader of a pipe is gone, there still is an answer to keep.
            if not (isinstance(error, OSError | OutputClosedError) and stream.reply.text):
                self._conversation.undo()
            raise
        if finished or stream.reply.text:
            self._reply = stream.reply
            return True
        say("stopped; the question was removed", dim=True)
        return False

    def retry(self) -> None:
        """Ask the last question again, with sampling.

        If it is stopped before the first word, the old answer stays.

        Raises:
            PromptError: There is no question.
        """
        before, sampling = self._conversation.fork(), self._options.sampling
        self._retries += 1
        if sampling.temperature == 0:
            sampling = replace(sampling, temperature=RETRY_TEMPERATURE, top_p=RETRY_TOP_P)
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + self._retries) % 2**64)
        try:
            has_answer = self._print_answer(self._conversation.retry(sampling))
        except Exception:
            self._conversation = before
            raise
        if not has_answer:
            self._conversation = before

    def undo(self) -> None:
        """Remove the media of the next message, else the last question and its answer.

        Raises:
            PromptError: There is neither.
        """
        if media := self._count_media():
            self._images, self._clips = [], []
            say(f"removed {media}", dim=True)
            return
        question = self._conversation.undo()
        if question is None:
            raise PromptError("there is nothing to undo")
        say(f"removed: {' '.join(question.split())[:200]}", dim=True)

    def reset(self) -> None:
        """Start over with the same system message."""
        self._images, self._clips = [], []
        self._conversation.reset()
        self._keeper.start_new()
        say("started over", dim=True)

    def set_system(self, text: str) -> None:
        """Go on with the system message `text`; if it is empty, print the current one.

        Raises:
            PromptError: The model's chat template takes no system message.
        """
        if not text:
            say(self._conversation.system or "there is no system message", dim=True)
            return
        self._conversation.system = text
        count = self._count_questions()
        kept = f"; {count} stay" if count else ""
        say(f"the system message is set{kept}", dim=True)

    def _count_questions(self) -> str:
        """Return how many questions were asked and answered; empty if none was."""
        count = sum(message["role"] == "user" for message in self._conversation.messages)
        if count == 1:
            return "1 question and its answer"
        return f"{count} questions and their answers" if count else ""

    def save(self, argument: str, confirm: Callable[[str], bool]) -> None:
        """Write the conversation to the file that `argument` names.

        Args:
            argument: A path.
            confirm: Asks the user whether an existing file may be replaced.
        """
        path = _parse_path("/save", argument)
        if expand_path(path).is_file() and not confirm(f"{path} exists; replace it?"):
            say("nothing was saved", dim=True)
            return
        try:
            self._conversation.save(path)
        except OSError as error:  # it names the temporary file
            raise OSError(error.errno, error.strerror or str(error), path) from None
        say(f"saved as {path}", dim=True)

    def load(self, argument: str) -> None:
        """Show the conversation in the file that `argument` names, and go on with it."""
        self._conversation.load(_parse_path("/load", argument))
        self._keeper.start_new()
        self._print_transcript()

    def _print_transcript(self) -> None:
        """Print what was said, as it looked when it was said, and how much it was."""
        for message in self._conversation.messages:
            items = message["content"]
            text = "".join(item.get("text", "") for item in items)
            if message["role"] == "assistant":
                self._printer.print_earlier(text)
                continue
            media = "".join(f"[{item['type']}] " for item in items if item["type"] != "text")
            head = "> " if message["role"] == "user" else f"{message['role']}: "
            say(head + (media + text).replace("\n", "\n  "))
        say(self._count_questions() or "no question was asked yet", dim=True)

    def print_stats(self) -> None:
        """Print the counts and speed of the last answer, and the context used."""
        conversation = self._conversation
        say_wrapped(format_stats(self._reply) if self._reply else "there is no answer yet")
        say(f"context: {conversation.context_used:,} of {conversation.context_size:,} tokens")


def _parse_path(command: str, argument: str) -> str:
    """Return the one path in `argument`."""
    sources = split_sources(argument)
    if len(sources) != 1:
        fault = "needs a path" if not sources else "takes one path; quote its spaces"
        raise PromptError(f"{command} {fault}")
    return sources[0]
