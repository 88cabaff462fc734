"""A plain conversation on a terminal."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.chat import INTERRUPTED
from mlx_smolvlm.cli.media import (
    OpenedImage,
    OpenedVideo,
    describe_image,
    open_footage,
    open_picture,
    sampled,
)
from mlx_smolvlm.cli.options import ChatOptions, is_url
from mlx_smolvlm.cli.render import fail, say
from mlx_smolvlm.errors import SmolVLMError

if TYPE_CHECKING:
    from mlx_smolvlm import SmolVLM
    from mlx_smolvlm.cli.chat import Printer
    from mlx_smolvlm.cli.media import Opened
    from mlx_smolvlm.video import Clip

HELP = """\
/image PATH   show the model a picture along with the next message (a path or URL)
/video PATH   show it a video, likewise
/reset        forget the conversation
/help         this list
/exit         leave (so does Ctrl-D)
Ctrl-C stops an answer."""


class Session:
    """A conversation on a terminal."""

    def __init__(
        self, vlm: SmolVLM, options: ChatOptions, printer: Printer, media: list[Opened]
    ) -> None:
        self.vlm, self.options, self.printer = vlm, options, printer
        self.images: list[OpenedImage] = []
        self.clips: list[Clip] = []
        self.media = media
        self.conversation = vlm.chat(
            system=options.system,
            sampling=options.sampling,
            detail=options.detail,
            on_full=options.on_full,
        )

    def run(self) -> int:
        """Exit status, once the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() line editing)
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal's stream
        say(f"{self.options.model}: /help lists the commands, Ctrl-D leaves", dim=True)
        self.take(self.media)
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
                self.images, self.clips = [], []
                self.conversation.reset()
            elif word in ("/image", "/video"):
                self.add(word, rest.strip())
            elif word[:1] == "/" and word[1:].isalpha():
                fail(f"there is no command {word}; /help lists them")
            elif line:
                self.answer(line)
        except SmolVLMError as error:
            fail(error)
        except KeyboardInterrupt:  # before the first word of an answer, or while opening
            say("")
        return True

    def add(self, word: str, argument: str) -> None:
        """Keep the media that `argument` names for the next message."""
        sources = split_sources(argument)
        if not sources:
            fail(f"{word} needs a path")
        elif word == "/image":
            self.take([open_picture(source) for source in sources])
        else:
            self.take([open_footage(source, self.options.frames) for source in sources])

    def take(self, media: Sequence[Opened]) -> None:
        """Keep `media` for the next message, and say what they cost."""
        clips = [sampled(self.vlm, one) for one in media if isinstance(one, OpenedVideo)]
        images = [one for one in media if isinstance(one, OpenedImage)]
        for image in images:
            describe_image(self.vlm, image, self.options.detail)
        self.images += images
        self.clips += clips

    def answer(self, text: str) -> None:
        """Ask with the media at hand, and show the answer."""
        stream = self.conversation.stream(
            text, images=[one.image for one in self.images], videos=self.clips
        )
        self.images, self.clips = [], []
        self.printer.show(stream)


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
