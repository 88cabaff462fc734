"""A conversation: messages that build on each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mlx_smolvlm.answer import AnswerStream, Reply
from mlx_smolvlm.messages import ImageSource, Message, VideoSource, read_request, system_message
from mlx_smolvlm.sampling import Sampling

if TYPE_CHECKING:
    from mlx_smolvlm.image import Detail
    from mlx_smolvlm.media import Footage, Picture
    from mlx_smolvlm.smolvlm import SmolVLM


class Conversation:
    """Messages that build on each other.

    Pictures and videos are encoded once. Every turn runs the tokens of the whole
    transcript again.
    """

    def __init__(
        self, vlm: SmolVLM, system: str | None, sampling: Sampling, detail: Detail
    ) -> None:
        self._vlm, self._system, self._sampling, self._detail = vlm, system, sampling, detail
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._open: AnswerStream | None = None
        self.messages: list[Message] = system_message(self._system)
        self._pictures: list[Picture] = []
        self._footage: list[Footage] = []

    def ask(
        self,
        prompt: str,
        *,
        images: Iterable[ImageSource] = (),
        videos: Iterable[VideoSource] = (),
    ) -> Reply:
        """The whole answer to the next `prompt`; errors as in `SmolVLM.ask`."""
        return self.stream(prompt, images=images, videos=videos).finished()

    def stream(
        self,
        prompt: str,
        *,
        images: Iterable[ImageSource] = (),
        videos: Iterable[VideoSource] = (),
    ) -> AnswerStream:
        """The answer to the next `prompt` as it is generated.

        A turn joins the transcript once it is asked, with what was said of its
        answer when the next one is. A turn that raises leaves no trace.
        """
        self._settle()
        request = read_request(prompt, images, videos, None)
        pictures, footage = self._vlm.opened(request, self._detail)
        messages = self.messages + request.messages
        pictures, footage = self._pictures + pictures, self._footage + footage
        stream = self._vlm.answer(messages, pictures, footage, self._sampling)
        self.messages, self._pictures, self._footage = messages, pictures, footage
        self._open = stream
        return stream

    def _settle(self) -> None:
        """Write down what was said in the last turn."""
        if self._open is not None:
            self._open.close()
            said = {"type": "text", "text": self._open.reply.text}
            self.messages = [*self.messages, {"role": "assistant", "content": [said]}]
            self._open = None
