"""Load a checkpoint once, then ask.

`SmolVLM._answer` is the only place that orders the steps from messages to text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.generate import StopText, tokens
from mlx_smolvlm.model import Model
from mlx_smolvlm.sampling import Sampling, make_sampler

if TYPE_CHECKING:
    import PIL.Image

    from mlx_smolvlm.image import Detail, Grid
    from mlx_smolvlm.prompt import PromptBuilder

Message = dict[str, Any]
ImageSource = Any  # path, URL, data URI, bytes, PIL image or numpy array: see image.open_image

TILE_BATCH = 8  # tiles that go through the encoder at once; bounds its memory


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer as it appears.

    `token_id` is the token that completed `text`; None for text that was held
    back in case a stop text followed.
    """

    text: str
    token_id: int | None


@dataclass
class Reply:
    """An answer with what it cost.

    `finish_reason` is "stop" (the model ended it, or a stop text was met),
    "length" (`max_tokens` or the context is used up) or "interrupted".
    `time_to_first_token_s` counts from the call, so it includes the pictures;
    `prompt_tps` counts the decoder's part alone. `peak_memory_gb` is the most
    that MLX held, in 10**9 bytes.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "interrupted"] = "interrupted"
    prompt_tokens: int = 0
    image_tiles: int = 0
    generation_tokens: int = 0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    time_to_first_token_s: float = 0.0
    peak_memory_gb: float = 0.0

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Prompt:
    """What an answer needs: `input_ids` (L,) and the pictures that its placeholders stand for."""

    input_ids: np.ndarray
    pictures: list[PIL.Image.Image]
    image_tiles: int
    detail: Detail


class AnswerStream(Iterator[Chunk]):
    """Yields an answer's chunks; `reply` is the answer so far.

    The pictures are encoded when the first chunk is asked for. After Ctrl-C, or
    when the caller stops early, `reply` holds what was said until then.
    """

    def __init__(self, vlm: SmolVLM, prompt: _Prompt, sampling: Sampling) -> None:
        self.reply = Reply(prompt_tokens=prompt.input_ids.size, image_tiles=prompt.image_tiles)
        self._vlm, self._prompt, self._sampling = vlm, prompt, sampling
        self._started = time.perf_counter()
        self._chunks = self._generate()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Stop the answer here."""
        self._chunks.close()

    def _generate(self) -> Generator[Chunk, None, None]:
        """The chunks, with `reply` kept up to date before each."""
        text = StopText(self._sampling.stop)
        for token_id, piece in self._decode():
            shown = text.feed(piece)
            if not self.reply.text:
                shown = shown.lstrip()  # the space after "Assistant:"
            self.reply.text += shown
            if text.stopped:
                self.reply.finish_reason = "stop"
            if shown:
                yield Chunk(shown, token_id)
            if text.stopped:
                return
        rest = text.flush()
        if rest:
            self.reply.text += rest
            yield Chunk(rest, None)

    def _decode(self) -> Iterator[tuple[int, str]]:
        """Token ids with the text that each completes, up to the end of the answer."""
        from tokenizers.decoders import DecodeStream

        vlm, reply = self._vlm, self.reply
        decoder, tokenizer = DecodeStream(skip_special_tokens=False), vlm.prompt_builder.tokenizer
        for token_id in self._token_ids():
            reply.token_ids.append(token_id)
            reply.generation_tokens += 1
            if token_id in vlm.config.eos_token_ids:
                reply.finish_reason = "stop"
                return
            if token_id not in vlm.hidden_token_ids:
                yield token_id, decoder.step(tokenizer, token_id) or ""
        reply.finish_reason = "length"

    def _token_ids(self) -> Iterator[int]:
        """Token ids of the answer, with the clocks of `reply`."""
        vlm, prompt, reply = self._vlm, self._prompt, self.reply
        mx.reset_peak_memory()
        image_embeds = vlm.encode_images(prompt.pictures, prompt.detail)
        encoded = time.perf_counter()
        inputs_embeds = vlm.model.embed(prompt.input_ids, image_embeds)
        room = vlm.config.text.max_position_embeddings - prompt.input_ids.size
        limit = min(self._sampling.max_tokens, room)
        cache, sampler = vlm.model.make_cache(), make_sampler(self._sampling)
        first = 0.0
        for count, token_id in enumerate(tokens(vlm.model, inputs_embeds, cache, sampler, limit)):
            now = time.perf_counter()
            if count == 0:
                first = now
                reply.time_to_first_token_s = first - self._started
                reply.prompt_tps = reply.prompt_tokens / (first - encoded)
            else:
                reply.generation_tps = count / (now - first)
            reply.peak_memory_gb = mx.get_peak_memory() / 1e9
            yield token_id


class SmolVLM:
    """A loaded checkpoint. `load` makes one."""

    def __init__(self, path: Path, config: Config, model: Model, builder: PromptBuilder) -> None:
        self.path, self.config, self.model, self.prompt_builder = path, config, model, builder
        self.hidden_token_ids = builder.framing_token_ids
        # Compiled, a quantized layer's biases join the kernels that follow them.
        self._encode = mx.compile(model.encode)

    def __repr__(self) -> str:
        return f"SmolVLM({self.config.source!r}, path={str(self.path)!r})"

    def ask(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Iterable[ImageSource] = (),
        system: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        detail: Detail = "high",
    ) -> Reply:
        """The whole answer to `prompt`.

        Args:
            prompt: A question, or messages with "role" and "content" as in Hugging
                Face's chat templates. An image item may carry its picture under
                "image"; those that do not take the next one of `images`.
            images: Paths, http(s) URLs, data URIs, bytes, PIL images or numpy
                arrays (H, W, 3). With a question as text they come before it.
            system: A system message.
            sampling: How the answer is generated; greedy by default.
            detail: "high" cuts pictures into tiles as in training, "auto" does so
                without enlarging them, "low" takes one tile, a number caps the
                tiles along the longer side.

        Raises:
            MediaError: A picture cannot be read.
            PromptError: The messages are malformed, or longer than the context.
        """
        stream = self.stream(prompt, images=images, system=system, sampling=sampling, detail=detail)
        for _ in stream:
            pass
        return stream.reply

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Iterable[ImageSource] = (),
        system: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        detail: Detail = "high",
    ) -> AnswerStream:
        """The answer to `prompt` as it is generated; arguments and errors as in `ask`.

        Errors in the arguments are raised here; the work begins with the first chunk.
        """
        messages, sources = _messages(prompt, _as_list(images), system)
        return self._answer(messages, sources, sampling, detail)

    def chat(
        self,
        *,
        system: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        detail: Detail = "high",
    ) -> Conversation:
        """An empty conversation; `sampling` and `detail` hold for its every turn."""
        return Conversation(self, system, sampling, detail)

    def encode_images(
        self, pictures: Sequence[PIL.Image.Image], detail: Detail = "high"
    ) -> mx.array | None:
        """`image_embeds` (N, I, D) of the tiles of `pictures`, in order; None without pictures.

        `TILE_BATCH` tiles at most are in the encoder at once.
        """
        from mlx_smolvlm.image import tiles

        done: list[mx.array] = []
        for picture in pictures:
            pixel_values = tiles(picture, self.config, detail).pixel_values
            for start in range(0, len(pixel_values), TILE_BATCH):
                batch = mx.array(pixel_values[start : start + TILE_BATCH])
                done.append(self._encode(batch))
                mx.eval(done[-1])
        return mx.concatenate(done) if done else None

    def _answer(
        self,
        messages: list[Message],
        sources: Sequence[ImageSource],
        sampling: Sampling,
        detail: Detail,
    ) -> AnswerStream:
        """Pictures, grids, prompt ids, the context guard; then the stream that does the work."""
        from mlx_smolvlm.image import grid_of, open_image

        pictures = [open_image(source) for source in sources]
        grids = [grid_of(picture.size, self.config, detail) for picture in pictures]
        input_ids = self.prompt_builder.build(messages, grids)
        self._check_context(input_ids.size, grids)
        prompt = _Prompt(input_ids, pictures, sum(grid.num_tiles for grid in grids), detail)
        return AnswerStream(self, prompt, sampling)

    def _check_context(self, length: int, grids: Sequence[Grid]) -> None:
        """Refuse a prompt that leaves no room for an answer, before any work is done."""
        context = self.config.text.max_position_embeddings
        if length < context:
            return
        taken = sum(self.prompt_builder.tokens_of(grid) for grid in grids)
        advice = "use detail 'low' or fewer pictures" if grids else "shorten the text"
        raise PromptError(
            f"the prompt takes {length:,} tokens ({len(grids)} pictures: {taken:,}) and the "
            f"model's context is {context:,}; {advice}"
        )


class Conversation:
    """Messages that build on each other.

    Every turn runs the whole transcript again.
    """

    def __init__(
        self, vlm: SmolVLM, system: str | None, sampling: Sampling, detail: Detail
    ) -> None:
        self._vlm, self._system, self._sampling, self._detail = vlm, system, sampling, detail
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._open: AnswerStream | None = None
        self.messages: list[Message] = _system_message(self._system)
        self._pictures: list[PIL.Image.Image] = []

    def ask(self, prompt: str, *, images: Iterable[ImageSource] = ()) -> Reply:
        """The whole answer to the next `prompt`; errors as in `SmolVLM.ask`."""
        stream = self.stream(prompt, images=images)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, prompt: str, *, images: Iterable[ImageSource] = ()) -> AnswerStream:
        """The answer to the next `prompt` as it is generated.

        A turn joins the transcript once it is asked, with what was said of its
        answer when the next one is. A turn that raises leaves no trace.
        """
        from mlx_smolvlm.image import open_image

        self._settle()
        messages, sources = _messages(prompt, _as_list(images), None)
        pictures = [*self._pictures, *(open_image(source) for source in sources)]
        messages = self.messages + messages
        stream = self._vlm._answer(messages, pictures, self._sampling, self._detail)
        self.messages, self._pictures = messages, pictures
        self._open = stream
        return stream

    def _settle(self) -> None:
        """Write down what was said in the last turn."""
        if self._open is not None:
            self._open.close()
            said = {"type": "text", "text": self._open.reply.text}
            self.messages = [*self.messages, {"role": "assistant", "content": [said]}]
            self._open = None


def load(
    model: str | Path = "demo",
    *,
    bits: int | None = None,
    offline: bool = False,
    dtype: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> SmolVLM:
    """A model ready to answer.

    Args:
        model: A folder, a hub id, an alias such as "smolvlm-256m", or "demo".
            Hugging Face checkpoints are converted once, into a cache folder.
        bits: Precision to convert to: 4, 8 or 16; None keeps the checkpoint's.
            Folders that are converted already stay as they are.
        offline: Never use the network.
        dtype: Type to compute in. None is float32 on a CPU, where MLX is slower in
            half precision; on a GPU it is the checkpoint's, or bfloat16 if that is
            float32, as SmolVLM2 is published.
        progress: Called during a conversion with bytes done, bytes in all, a name.

    Raises:
        CheckpointError: It cannot be found, converted or read.
    """
    from mlx_smolvlm.checkpoint import chat_template, load_model, read_config, tokenizer_path
    from mlx_smolvlm.hub import ResolveOptions, resolve
    from mlx_smolvlm.prompt import PromptBuilder

    path = resolve(model, ResolveOptions(bits=bits, offline=offline, progress=progress))
    config = read_config(path)
    dtype = dtype or _usual_dtype(config, mx.default_device().type == mx.DeviceType.cpu)
    builder = PromptBuilder(tokenizer_path(path), chat_template(path), config)
    return SmolVLM(path, config, load_model(path, dtype), builder)


def _usual_dtype(config: Config, on_cpu: bool) -> str:
    """The type to compute in if the user names none."""
    if on_cpu:
        return "float32"
    return "bfloat16" if config.dtype == "float32" else config.dtype


def _as_list(images: Iterable[ImageSource]) -> list[ImageSource]:
    """`images` as a list; a single picture is met with a list of one."""
    if isinstance(images, (list, tuple)):
        return list(images)
    return list(images) if isinstance(images, Iterator) else [images]


def _system_message(system: str | None) -> list[Message]:
    content = [{"type": "text", "text": system}]
    return [] if system is None else [{"role": "system", "content": content}]


def _messages(
    prompt: str | Sequence[Message], images: list[ImageSource], system: str | None
) -> tuple[list[Message], list[ImageSource]]:
    """Messages for the prompt builder, and the pictures in the order of their items."""
    if isinstance(prompt, str):
        items: list[Message] = [{"type": "image"} for _ in images]
        user = {"role": "user", "content": [*items, {"type": "text", "text": prompt}]}
        return [*_system_message(system), user], images
    messages, sources, rest = _system_message(system), [], list(images)
    for message in prompt:
        content = message.get("content", "")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part.get("type") == "image":
                if "image" not in part and not rest:
                    raise PromptError("the messages have more image items than there are pictures")
                sources.append(part["image"] if "image" in part else rest.pop(0))
        plain = [{k: v for k, v in part.items() if k != "image"} for part in parts]
        messages.append({"role": message.get("role"), "content": plain})
    if rest:
        raise PromptError(f"{len(rest)} pictures have no image item in the messages")
    return messages, sources
