"""`mlx-smolvlm chat`: one answer, or a plain conversation on a terminal."""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.options import ChatOptions, is_url
from mlx_smolvlm.cli.render import (
    ConversionProgress,
    fail,
    say,
    stats_line,
    write,
    write_json,
)
from mlx_smolvlm.errors import PromptError, SmolVLMError

if TYPE_CHECKING:
    import PIL.Image

    from mlx_smolvlm import AnswerStream, SmolVLM

INTERRUPTED = 130
HELP = """\
/image PATH   show the model a picture along with the next message (a path or URL)
/reset        forget the conversation
/help         this list
/exit         leave (so does Ctrl-D)
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class Picture:
    """An opened picture and what to call it."""

    name: str
    image: PIL.Image.Image


def chat(options: ChatOptions) -> int:
    """The exit status of a one-shot answer or of a conversation.

    What is cheap to check comes first: the pictures, then the prompt, then the model.
    """
    pictures = [open_picture(source) for source in options.images]
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = read_prompt()
    vlm = load_model(options)
    if prompt is None:
        return Session(vlm, options, pictures).run()
    describe(vlm, options, pictures)
    stream = vlm.stream(
        prompt,
        images=[picture.image for picture in pictures],
        system=options.system,
        sampling=options.sampling,
        detail=options.detail,
    )
    return 0 if show(stream, options) else INTERRUPTED


def open_picture(source: str) -> Picture:
    """The picture at a path, a URL, a data URI or "-" for stdin.

    Raises:
        MediaError: It cannot be opened.
    """
    from mlx_smolvlm.image import open_image

    if source == "-":
        name = "stdin"
    elif source[:5].lower() == "data:":
        name = "data URI"
    else:
        path = source.partition("?")[0] if is_url(source) else source
        name = path.rstrip("/").rpartition("/")[2]
    return Picture(name, open_image(source))


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


def load_model(options: ChatOptions) -> SmolVLM:
    """The model to talk to; a conversion shows on stderr.

    Raises:
        CheckpointError: It cannot be found, converted or read.
    """
    from mlx_smolvlm import load

    progress = ConversionProgress(f"converting {options.model}, once")
    with contextlib.closing(progress):
        return load(options.model, bits=options.bits, offline=options.offline, progress=progress)


def describe(vlm: SmolVLM, options: ChatOptions, pictures: list[Picture]) -> None:
    """Say what each picture costs, if stderr is a terminal."""
    from mlx_smolvlm.image import grid_of

    if not sys.stderr.isatty():
        return
    for picture in pictures:
        grid = grid_of(picture.image.size, vlm.config, options.detail)
        tiles = "1 tile" if grid.num_tiles == 1 else f"{grid.rows} x {grid.cols} tiles + 1"
        say(f"{picture.name}: {tiles}, {vlm.prompt_builder.tokens_of(grid)} tokens", dim=True)


def show(stream: AnswerStream, options: ChatOptions) -> bool:
    """Put the answer on stdout; False if Ctrl-C ended it."""
    finished, shown = False, 0
    try:
        for chunk in stream:
            if not options.json:
                shown += len(chunk.text)
                write(chunk.text)
        finished = True
    except KeyboardInterrupt:
        stream.close()
    reply = stream.reply
    if options.json:
        write_json(reply.to_dict())
    else:
        write(reply.text[shown:] + ("" if reply.text.endswith("\n") else "\n"))
    if options.stats:
        say(stats_line(reply))
    return finished


class Session:
    """A conversation on a terminal."""

    def __init__(self, vlm: SmolVLM, options: ChatOptions, pictures: list[Picture]) -> None:
        self.vlm, self.options, self.pending = vlm, options, pictures
        self.conversation = vlm.chat(
            system=options.system, sampling=options.sampling, detail=options.detail
        )

    def run(self) -> int:
        """Exit status, once the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() line editing)
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal's stream
        say(f"{self.options.model}: /help lists the commands, Ctrl-D leaves", dim=True)
        describe(self.vlm, self.options, self.pending)
        interrupted = False
        while True:
            try:
                line = read_line()
                interrupted = False
            except EOFError:
                say("")
                return 0
            except KeyboardInterrupt:
                say("")
                if interrupted:
                    return INTERRUPTED
                interrupted = True
                say("Ctrl-C again or Ctrl-D leaves", dim=True)
                continue
            if not self.handle(line.strip()):
                return 0

    def handle(self, line: str) -> bool:
        """Carry out one line; False to leave."""
        word, _, rest = line.partition(" ")
        try:
            if word in ("/exit", "/quit"):
                return False
            if word == "/help":
                say(HELP)
            elif word == "/reset":
                self.pending = []
                self.conversation.reset()
            elif word == "/image":
                self.add_images(rest.strip())
            elif word[:1] == "/" and word[1:].isalpha():
                fail(f"there is no command {word}; /help lists them")
            elif line:
                self.answer(line)
        except SmolVLMError as error:
            fail(error)
        except KeyboardInterrupt:  # before the first word of an answer, or while opening
            say("")
        return True

    def add_images(self, argument: str) -> None:
        """Keep the pictures that `argument` names for the next message."""
        pictures = [open_picture(source) for source in split_sources(argument)]
        if not pictures:
            fail("/image needs a path")
        describe(self.vlm, self.options, pictures)
        self.pending += pictures

    def answer(self, text: str) -> None:
        """Ask with the pictures at hand, and show the answer."""
        stream = self.conversation.stream(text, images=[one.image for one in self.pending])
        self.pending = []
        show(stream, self.options)


def read_line() -> str:
    """What the user types next.

    Raises:
        EOFError: Ctrl-D.
    """
    if sys.stdout.isatty():
        return input("> ")
    say("> ", end="")  # stdout is the answers' file
    return input()


def split_sources(argument: str) -> list[str]:
    """Paths and URLs in `argument`: one as it stands, or several quoted as for a shell."""
    if not argument:
        return []
    if is_url(argument) or Path(argument).expanduser().exists():
        return [argument]
    try:
        return shlex.split(argument)
    except ValueError:  # an apostrophe in a name
        return [argument]
