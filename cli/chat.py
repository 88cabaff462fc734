"""`mlx-smolvlm chat`: one answer, or the answers about a long video's parts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.media import (
    FrameWriter,
    describe_image,
    open_footage,
    open_picture,
    sampled,
)
from mlx_smolvlm.cli.options import ChatOptions, ModelOptions
from mlx_smolvlm.cli.render import Bar, ConversionProgress, say, stats_line, write_json
from mlx_smolvlm.cli.screen import NoScreen, PlainScreen, Screen
from mlx_smolvlm.errors import PromptError

if TYPE_CHECKING:
    from mlx_smolvlm import AnswerStream, Reply, SmolVLM
    from mlx_smolvlm.cli.media import OpenedVideo

INTERRUPTED = 130


def chat(options: ChatOptions) -> int:
    """The exit status of a one-shot answer or of a conversation.

    What is cheap to check comes first: pictures and videos, then the prompt, then the model.
    """
    images = [open_picture(source) for source in options.images]
    videos = [open_footage(source, options.frames) for source in options.videos]
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = read_prompt()
    vlm = load_model(options)
    printer = Printer(vlm, options)
    if prompt is None:
        from mlx_smolvlm.cli.session import converse

        return converse(vlm, options, printer, [*images, *videos])
    if options.frames.chunk_s is not None:
        return show_parts(vlm, options, printer, prompt, videos[0])
    for image in images:
        describe_image(vlm, image, options.detail)
    stream = vlm.stream(
        prompt,
        images=[one.image for one in images],
        videos=[sampled(vlm, one) for one in videos],
        system=options.system,
        sampling=options.sampling,
        detail=options.detail,
    )
    return 0 if printer.show(stream) else INTERRUPTED


def read_prompt() -> str:
    """The prompt that stdin holds, without the line break at its end.

    Raises:
        PromptError: It is empty, or no text.
    """
    data = sys.stdin.buffer.read()
    try:
        text = data.decode(sys.stdin.encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"stdin is the prompt, and is no {error.encoding} text (byte {error.start}); "
            "to read a picture from it use: -i - PROMPT"
        ) from None
    text = text.removeprefix("\ufeff").rstrip("\r\n")
    if not text.strip():
        raise PromptError("there is no prompt: stdin is empty; pass PROMPT or pipe one in")
    return text


def load_model(options: ModelOptions) -> SmolVLM:
    """The model to talk to; a conversion shows on stderr.

    Raises:
        CheckpointError: It cannot be found, converted or read.
    """
    from mlx_smolvlm import load

    progress = ConversionProgress(f"converting {options.model}, once")
    with contextlib.closing(progress):
        return load(
            options.model,
            bits=options.bits,
            offline=options.offline,
            cache=options.cache,
            progress=progress,
            adapter=options.adapter,
        )


def show_parts(
    vlm: SmolVLM, options: ChatOptions, printer: Printer, prompt: str, video: OpenedVideo
) -> int:
    """Put the answers about a long video's parts on stdout, each after its time range."""
    seconds = options.frames.chunk_s
    assert seconds is not None
    parts = vlm.stream_parts(
        prompt, video.video, seconds, system=options.system, sampling=options.sampling
    )
    for part in parts:
        label = "whole video" if part.is_whole else part.label
        extra = {"start_s": part.start_s, "end_s": part.end_s, "is_whole": part.is_whole}
        if not printer.show(part.stream, label, extra):
            return INTERRUPTED
    return 0


class Printer:
    """Puts answers on stdout, and on stderr how far pictures and videos are."""

    def __init__(self, vlm: SmolVLM, options: ChatOptions) -> None:
        self._options = options
        folder, image = options.frames.frames_folder, vlm.config.image
        self._writer = None if folder is None else FrameWriter(folder, image.mean, image.std)

    def show(
        self, stream: AnswerStream, label: str = "", extra: Mapping[str, object] | None = None
    ) -> bool:
        """Put the answer on stdout; False if Ctrl-C ended it.

        Args:
            stream: The answer.
            label: What to write before it.
            extra: More fields for `--json`.
        """
        finished, reply = False, stream.reply
        with contextlib.closing(self._screen(reply)) as screen:
            try:
                self._prepare(stream)
                screen.begin(label)
                for _ in stream:
                    screen.update()
                finished = True
            except KeyboardInterrupt:
                stream.close()
            screen.finish()
        if self._options.json:
            write_json({**reply.to_dict(), **(extra or {})})
        if self._options.stats:
            say(stats_line(reply))
        return finished

    def _screen(self, reply: Reply) -> Screen:
        """What shows `reply`."""
        return NoScreen() if self._options.json else PlainScreen(reply)

    def _prepare(self, stream: AnswerStream) -> None:
        """Decode and encode pictures and videos, with a bar; write frames if asked to."""
        with contextlib.closing(Bar(delay_s=0.3)) as bar:
            for step in stream.prepare():
                text = f"{step.decoded} of {step.total} tiles read, {step.encoded} encoded"
                bar.draw(step.decoded + step.encoded, 2 * step.total, text)
                if self._writer is not None:
                    self._writer.write(step)
