"""Load a checkpoint once, then ask: the facade of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import mlx.core as mx

from mlx_smolvlm.config import Config
from mlx_smolvlm.conversation import Conversation, ConversationOptions
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.generate.batch import answer_all, check_prompts
from mlx_smolvlm.generate.choose import Choice, Normalize, check_choices, choose_answer
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.generate.long_video import Part, answer_by_part
from mlx_smolvlm.generate.sampling import Sampling, SamplingOptions, choose_sampling
from mlx_smolvlm.generate.stream import AnswerStream, Reply
from mlx_smolvlm.kv.options import CacheOptions
from mlx_smolvlm.prompt.messages import ImageSource, Message, VideoSource, read_request
from mlx_smolvlm.runtime import check_process

if TYPE_CHECKING:
    import PIL.Image

    from mlx_smolvlm.media.tiles import Detail


_PUBLIC = (
    *("adapter", "ask", "ask_many", "cache_options", "chat", "choose", "config"),
    *("encode_images", "model", "path", "stream", "stream_parts"),
)


class SmolVLM:
    """A loaded checkpoint. `load` makes one."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.path, self.adapter = engine.path, engine.adapter
        self.config, self.model = engine.config, engine.model
        self.cache_options = engine.cache_options

    def __dir__(self) -> list[str]:
        """What users need; the rest is what answers are made with."""
        return [*_PUBLIC]

    def __repr__(self) -> str:
        return f"SmolVLM({self.config.source!r}, path={str(self.path)!r})"

    def ask(
        self,
        prompt: str | Sequence[Message],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        videos: Iterable[VideoSource] = (),
        system: str | None = None,
        sampling: Sampling | None = None,
        detail: Detail = "high",
        **options: Unpack[SamplingOptions],
    ) -> Reply:
        """The whole answer to `prompt`.

        Args:
            prompt: A question, or messages with "role" and "content" as in Hugging
                Face's chat templates. An image item may carry its picture under
                "image", a video item its video under "video"; those that do not take
                the next one of `images` or `videos`.
            images: A picture or several: paths, http(s) URLs, data URIs, bytes, PIL
                images, numpy arrays (H, W, 3) or matplotlib figures. With a question as
                text they come before it.
            videos: Paths, URLs, data URIs or bytes, `Video` objects, which say which frames
                to take, or opened clips. With a question as text they come after the images.
            system: A system message.
            sampling: How the answer is generated; greedy by default.
            options: The attributes of `Sampling`, such as `max_tokens=64`, in place of it.
            detail: "high" cuts pictures into tiles as in training, "auto" does so
                without enlarging them, "low" takes one tile, a number caps the
                tiles along the longer side. A video's frame is always one tile.

        Raises:
            ValueError: `sampling` and options are both given, or an option is out of range.
            MediaError: A picture or video cannot be read.
            PromptError: The messages are malformed, or longer than the context.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        return self.stream(
            prompt, images, videos=videos, system=system, sampling=sampling, detail=detail
        ).finish()

    def stream(
        self,
        prompt: str | Sequence[Message],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        videos: Iterable[VideoSource] = (),
        system: str | None = None,
        sampling: Sampling | None = None,
        detail: Detail = "high",
        **options: Unpack[SamplingOptions],
    ) -> AnswerStream:
        """The answer to `prompt` as it is generated; arguments and errors as in `ask`.

        Errors in the arguments are raised here; the work begins with the first chunk.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        request = read_request(prompt, images, videos, system)
        media = self.engine.open_media(request, detail)
        made = self.engine.make_prompt(request.messages, media)
        return AnswerStream(self.engine, made, sampling)

    def ask_many(
        self,
        images: ImageSource | Iterable[ImageSource] | None,
        prompts: Sequence[str],
        *,
        videos: Iterable[VideoSource] = (),
        system: str | None = None,
        sampling: Sampling | None = None,
        detail: Detail = "high",
        **options: Unpack[SamplingOptions],
    ) -> list[Reply]:
        """The answers to `prompts`, questions about the same pictures and videos.

        Each is what `ask` gives. The media are encoded once, and what the prompts begin with
        is prefilled once. The rest and the answers go through the decoder together, as many
        as fill two contexts at most.

        Args:
            images: A picture or several, as in `ask`; None for none.
            prompts: Questions.
            videos: As in `ask`.
            system: A system message.
            sampling: How each answer is generated; with a seed, as by `ask` with that seed.
            options: As in `ask`.
            detail: As in `ask`.

        Raises:
            MediaError: A picture or video cannot be read.
            PromptError: A prompt is no text, or longer than the context.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        texts = check_prompts(prompts)
        request = read_request("", () if images is None else images, videos, system)
        media = self.engine.open_media(request, detail)
        asked = [self.engine.make_prompt(request.replace_question(text), media) for text in texts]
        return answer_all(self.engine, asked, sampling)

    def choose(
        self,
        question: str | Sequence[Message],
        choices: Sequence[str],
        *,
        images: Iterable[ImageSource] = (),
        videos: Iterable[VideoSource] = (),
        system: str | None = None,
        detail: Detail = "high",
        normalize: Normalize = "none",
    ) -> Choice:
        """How likely the model is to give each of `choices` as its whole answer to `question`.

        The question is prefilled once, and all choices behind it together.

        Args:
            question: A question, or messages as in `ask`.
            choices: Two or more answers, as the model would word them.
            images: As in `ask`.
            videos: As in `ask`.
            system: A system message.
            detail: As in `ask`.
            normalize: "none" compares the probabilities of the whole answers, their ends
                included. Long answers are less likely, as they are when the model speaks.
                "tokens" compares the geometric means over each answer's tokens.

        Raises:
            ValueError: Fewer than two choices, an empty one or one twice.
            MediaError: A picture or video cannot be read.
            PromptError: The messages are malformed, or longer than the context.
        """
        texts = check_choices(choices, normalize)
        request = read_request(question, images, videos, system)
        media = self.engine.open_media(request, detail)
        prompt = self.engine.make_prompt(request.messages, media)
        answers = [{"role": "assistant", "content": [{"type": "text", "text": t}]} for t in texts]
        whole = [[*request.messages, answer] for answer in answers]
        told = [self.engine.make_prompt(messages, media, False) for messages in whole]
        return choose_answer(self.engine, prompt, told, texts, normalize)

    def stream_parts(
        self,
        prompt: str,
        video: VideoSource,
        seconds: float,
        *,
        system: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    ) -> Iterator[Part]:
        """Answers to `prompt` for each part of a long video, then one over the parts.

        Each `Part` has its time range and the stream of its answer, which is run to its
        end before the next part begins. A video of one part has no answer over the parts.

        Args:
            prompt: A question.
            video: As one of `videos` in `ask`; its start and end hold for the whole.
            seconds: Length of a part.
            system: A system message.
            sampling: How each answer is generated.

        Raises:
            ValueError: `seconds` is not above 0.
            MediaError: The video cannot be read.
            PromptError: A part has more frames than the context holds.
        """
        clips = self.engine.open_parts(video, seconds)
        return answer_by_part(self.engine, prompt, clips, system, sampling)

    def chat(
        self,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        detail: Detail = "high",
        on_full: Literal["error", "drop-oldest"] = "error",
        **options: Unpack[SamplingOptions],
    ) -> Conversation:
        """An empty conversation.

        Args:
            system: A system message.
            sampling: How each answer is generated.
            options: As in `ask`.
            detail: As in `ask`, for every picture.
            on_full: What to do when the context is full: "error" raises a ContextError,
                "drop-oldest" forgets the oldest questions and answers, warns of it, and
                runs what is left again.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        return Conversation(self.engine, system, ConversationOptions(sampling, detail, on_full))

    def encode_images(
        self, pictures: Sequence[PIL.Image.Image], detail: Detail = "high"
    ) -> mx.array | None:
        """`image_embeds` (N, I, D) of the tiles of `pictures`, in order; None without pictures."""
        request = read_request("", pictures, (), None)
        return self.engine.encode(self.engine.open_media(request, detail))


def load(
    model: str | Path = "demo",
    *,
    bits: int | None = None,
    offline: bool = False,
    dtype: str | None = None,
    cache: CacheOptions = CacheOptions(),  # noqa: B008 (frozen)
    progress: Callable[[int, int, str], None] | None = None,
    adapter: str | Path | None = None,
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
        cache: How keys and values of the tokens are kept, and which of them from one prompt
            to the next.
        progress: Called during a conversion with bytes done, bytes in all, a name.
        adapter: A folder that `mlx-smolvlm train` made on this checkpoint, in whatever
            precision; see docs/training.md.

    Raises:
        ValueError: `bits` is none of 4, 8 and 16.
        CheckpointError: It cannot be found, converted or read, or `cache` or `adapter` does
            not suit it.
    """
    from mlx_smolvlm.checkpoint.load import (
        find_tokenizer,
        load_model,
        read_chat_template,
        read_config,
    )
    from mlx_smolvlm.convert.hub import ResolveOptions, resolve
    from mlx_smolvlm.prompt.builder import PromptBuilder

    check_process()
    path = resolve(model, ResolveOptions(bits=bits, offline=offline, progress=progress))
    config = read_config(path)
    cache.check(config.text)
    dtype = dtype or _choose_dtype(config, mx.default_device().type == mx.DeviceType.cpu)
    builder = PromptBuilder(find_tokenizer(path), read_chat_template(path), config)
    network = load_model(path, dtype)
    if adapter is None:
        return SmolVLM(Engine(path, config, network, builder, cache))
    from mlx_smolvlm.checkpoint.lora import load_adapter

    folder = expand_path(adapter, CheckpointError)
    load_adapter(network, folder, config.source)
    return SmolVLM(Engine(path, config, network, builder, cache, folder))


def _choose_dtype(config: Config, on_cpu: bool) -> str:
    """The type to compute in if the user names none."""
    if on_cpu:
        return "float32"
    return "bfloat16" if config.dtype == "float32" else config.dtype
