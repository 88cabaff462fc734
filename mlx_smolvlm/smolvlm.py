"""`load` and `SmolVLM`, the facade of the library."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

import mlx.core as mx

from mlx_smolvlm.config import DEMO_FOLDER, DTYPE_BITS, Config
from mlx_smolvlm.conversation import Conversation, ConversationOptions
from mlx_smolvlm.errors import CheckpointError, SmolVLMWarning
from mlx_smolvlm.files import expand_path
from mlx_smolvlm.generate.batch import MAX_ROWS
from mlx_smolvlm.generate.choose import Choice, Normalize, check_choices, choose_answer
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.generate.long_video import Part, answer_by_part
from mlx_smolvlm.generate.many import answer_all, check_prompts
from mlx_smolvlm.generate.memory_guard import FEW_BITS, NO_NAMES, MemoryGuard, MemoryTerms
from mlx_smolvlm.generate.memory_plan import (
    Backend,
    Machine,
    Setup,
    find_machine,
    limit_mlx,
    measure_machine,
    plan_setup,
)
from mlx_smolvlm.generate.questions import BatchOptions, Question, answer_questions
from mlx_smolvlm.generate.sampling import Sampling, SamplingOptions, choose_sampling
from mlx_smolvlm.generate.stream import AnswerStream, Reply
from mlx_smolvlm.kv.options import CacheOptions
from mlx_smolvlm.prompt.messages import ImageSource, Message, VideoSource, read_request
from mlx_smolvlm.records import read_integer
from mlx_smolvlm.runtime import check_process, numpy_is_off

if TYPE_CHECKING:
    import PIL.Image

    from mlx_smolvlm.checkpoint.headers import TensorInfo
    from mlx_smolvlm.media.tiles import Detail


_PUBLIC = (
    *("adapter", "ask", "ask_batch", "ask_many", "cache_options", "chat", "choose", "config"),
    *("encode_images", "model", "path", "stream", "stream_batch", "stream_parts"),
)


class SmolVLM:
    """A loaded model, made by `load`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.path, self.adapter = engine.path, engine.adapter
        self.config, self.model = engine.config, engine.model
        self.cache_options = engine.cache_options

    def __dir__(self) -> list[str]:
        """The public attributes and methods."""
        return [*_PUBLIC]

    def __repr__(self) -> str:
        if self.path == DEMO_FOLDER:
            return "SmolVLM('demo')"
        return f"SmolVLM({self.config.name!r}, path={str(self.path)!r})"

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
        """Answer `prompt`, and return the whole answer.

        Args:
            prompt: A question, or messages with "role" and "content" as in Hugging Face's
                chat templates. An image item may hold its picture under "image", a video item
                its video under "video"; other items take the next of `images` or `videos`.
            images: A picture or several: paths, http(s) URLs, data URIs, bytes, PIL images,
                numpy arrays (H, W, 3) or matplotlib figures. They precede a question given as
                text.
            videos: Paths, URLs, data URIs, bytes, opened clips, or `Video` objects, which also
                select frames. They come between the images and a question given as text.
            system: A system message.
            sampling: How the answer is generated; greedy by default.
            options: Attributes of `Sampling`, such as `max_tokens=64`, instead of `sampling`.
            detail: "high" cuts pictures into tiles as in training, "auto" does so without
                enlarging them, "low" uses one tile, and a number limits the tiles along the
                longer side. A frame of a video is always one tile.

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
        """Answer `prompt`, and return the answer as a stream of chunks.

        Arguments and errors are as in `ask`. This method only checks the arguments and opens the
        media; the model runs when the first chunk is requested.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        request = read_request(prompt, images, videos, system)
        media = self.engine.open_media(request, detail)
        built = self.engine.make_prompt(request.messages, media)
        return AnswerStream(self.engine, built, sampling)

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
        """Answer several questions about the same pictures and videos.

        The answers equal those of `ask`. The media are encoded once, and the common prefix of the
        prompts is prefilled once. The rest is computed in batches, each of at most two contexts
        in all.

        Args:
            images: A picture or several, as in `ask`; None for none.
            prompts: Questions.
            videos: As in `ask`.
            system: A system message.
            sampling: How each answer is generated. With a seed, each answer equals that of `ask`
                with the same seed.
            options: As in `ask`.
            detail: As in `ask`.

        Raises:
            MediaError: A picture or video cannot be read.
            PromptError: A prompt is not text, or longer than the context.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        texts = check_prompts(prompts)
        request = read_request("", () if images is None else images, videos, system)
        media = self.engine.open_media(request, detail)
        built = [self.engine.make_prompt(request.replace_question(text), media) for text in texts]
        return answer_all(self.engine, built, sampling)

    @overload
    def ask_batch(
        self,
        questions: Iterable[Question],
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        detail: Detail = "high",
        max_rows: int = MAX_ROWS,
        return_errors: Literal[False] = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Reply]: ...
    @overload
    def ask_batch(
        self,
        questions: Iterable[Question],
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        detail: Detail = "high",
        max_rows: int = MAX_ROWS,
        return_errors: Literal[True],
        **options: Unpack[SamplingOptions],
    ) -> list[Reply | Exception]: ...
    def ask_batch(
        self,
        questions: Iterable[Question],
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        detail: Detail = "high",
        max_rows: int = MAX_ROWS,
        return_errors: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Reply | Exception] | list[Reply]:
        """Answer independent questions together, each about its own pictures and videos.

        The answers equal those of `ask`. For several questions about the same pictures, `ask_many`
        takes less memory.

        Args:
            questions: Each is a text, a tuple of a text and its pictures, a list of messages, or a
                dictionary of the arguments of `ask`: "prompt", and "images", "videos", "system",
                "detail", "sampling" or sampling options of its own.
            system: A system message for the questions without one of their own.
            sampling: How each answer is generated, unless its question says otherwise.
            options: As in `ask`, instead of `sampling`.
            detail: As in `ask`.
            max_rows: Most answers that are generated at the same time.
            return_errors: Whether a question that fails has its exception in the list, and the
                others are answered. Otherwise it is raised, with the index of the question as a
                note, and the answers so far are lost.

        Returns:
            The replies, in the order of the questions.

        Raises:
            Exception: As `ask` raises it, without `return_errors`.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        shared = BatchOptions(sampling, system, detail, max_rows)
        results = dict(answer_questions(self.engine, questions, shared, return_errors))
        return [results[number] for number in sorted(results)]

    def stream_batch(
        self,
        questions: Iterable[Question],
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        detail: Detail = "high",
        max_rows: int = MAX_ROWS,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[tuple[int, Reply | Exception]]:
        """Answer independent questions together, and yield each index and reply as it ends.

        Arguments are as in `ask_batch`. A question that fails yields its exception. Questions are
        taken, and their media opened, only when there is room: `questions` may be a generator that
        goes through a large folder. If you stop early, close the iterator or delete it.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        shared = BatchOptions(sampling, system, detail, max_rows)
        return answer_questions(self.engine, questions, shared, return_errors=True)

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
        """Rate each of `choices` by the probability that the model answers `question` with it.

        The question is prefilled once; the choices are computed together.

        Args:
            question: A question, or messages as in `ask`.
            choices: Two or more answers, worded as the model would.
            images: As in `ask`.
            videos: As in `ask`.
            system: A system message.
            detail: As in `ask`.
            normalize: "none" compares the probabilities of whole answers, including their ends;
                longer answers are less likely. "tokens" compares the geometric means over the
                tokens of each answer.

        Raises:
            ValueError: There are fewer than two choices, an empty one or a duplicate.
            MediaError: A picture or video cannot be read.
            PromptError: The messages are malformed, or longer than the context.
        """
        texts = check_choices(choices, normalize)
        request = read_request(question, images, videos, system)
        media = self.engine.open_media(request, detail)
        prompt = self.engine.make_prompt(request.messages, media)
        answers = [{"role": "assistant", "content": [{"type": "text", "text": t}]} for t in texts]
        whole = [[*request.messages, answer] for answer in answers]
        transcripts = [self.engine.make_prompt(messages, media, False) for messages in whole]
        return choose_answer(self.engine, prompt, transcripts, texts, normalize)

    def stream_parts(
        self,
        prompt: str,
        video: VideoSource,
        seconds: float,
        *,
        system: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    ) -> Iterator[Part]:
        """Answer `prompt` for each part of a long video, then for the whole.

        Yields a `Part` per part, with its time range and the stream of its answer, then one for
        the whole video, made from these answers. Each stream is run to its end before the next
        part begins. A video of a single part has no answer for the whole, nor does the demo give
        one, which cannot sum up answers; a warning says so.

        Args:
            prompt: A question.
            video: As one of `videos` in `ask`; its start and end limit the whole video.
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
            detail: As in `ask`, for all pictures.
            on_full: What to do when the context is full: "error" raises a ContextError;
                "drop-oldest" drops the oldest questions with their answers, warns, and runs the
                rest again.
        """
        sampling = choose_sampling(sampling, options, Sampling())
        return Conversation(self.engine, system, ConversationOptions(sampling, detail, on_full))

    def encode_images(
        self, pictures: Sequence[PIL.Image.Image], detail: Detail = "high"
    ) -> mx.array | None:
        """`image_embeds` (N, I, D) of the tiles of `pictures`, in order; None if there are none."""
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
    memory_limit: int | None = None,
) -> SmolVLM:
    """Load a model.

    Args:
        model: A folder, a hub id, an alias such as "smolvlm-256m", or "demo", which knows drawn
            shapes, print, charts and pages only; a warning says so once.
            Hugging Face checkpoints are converted once, into a cache folder.
        bits: Precision to convert to: 4, 8 or 16. None keeps the checkpoint's, or takes 8 or 4,
            with a warning, if an answer would take more than half of the machine's memory. Has no
            effect on folders that are converted already.
        offline: Never use the network.
        dtype: Type to compute in. None means float32 on a CPU, where MLX is slower in half
            precision. On a GPU it means the checkpoint's type, or bfloat16 if that is float32,
            in which SmolVLM2 is published.
        cache: How keys and values are stored and reused.
        progress: Called during a conversion with the bytes done, the total bytes and a name.
        adapter: The folder of a LoRA adapter that `mlx-smolvlm train` made for this checkpoint,
            in any precision; see docs/fine-tuning.md.
        memory_limit: Most bytes of memory that the process may take. Batches are made smaller to
            fit, and an answer that cannot fit is refused before any work. This also sets MLX's
            limits, for all models of the process. A conversion is not limited. None only refuses
            work that exceeds the memory of the machine.

    Raises:
        ValueError: `bits` is none of 4, 8 and 16, or `memory_limit` is not an integer above 0.
        MemoryLimitError: The model does not fit into `memory_limit`.
        CheckpointError: The model cannot be found, converted or read, or `cache` or `adapter`
            does not suit it.
    """
    if memory_limit is not None:
        memory_limit = read_integer(
            "memory_limit",
            memory_limit,
            lambda size: 0 < size < 2**63,
            "an integer above 0, of 64 bits",
        )
    path = _find_checkpoint(model, bits, offline, progress, find_machine())
    if model == "demo":
        _warn_of_demo()
    on_linux = sys.platform == "linux"
    may_pack = bits != FEW_BITS and _is_conversion_of(model, path)
    terms = MemoryTerms(memory_limit, NO_NAMES if may_pack else frozenset({"bits"}))
    return SmolVLM(_open_engine(path, dtype, cache, adapter, terms, on_linux))


@functools.cache  # once a process
def _warn_of_demo() -> None:
    from mlx_smolvlm.convert.hub import describe_demo

    warnings.warn(describe_demo('load("{}")'), SmolVLMWarning, stacklevel=3)


def load_in_mlx(
    model: str | Path = "demo", *, offline: bool = False, dtype: str | None = None
) -> SmolVLM:
    """Load a model that computes in MLX also on Linux, as training needs.

    Arguments and errors are as in `load`.
    """
    path = _find_checkpoint(model, None, offline, None)
    return SmolVLM(_open_engine(path, dtype, CacheOptions(), None, MemoryTerms(), False))


def _find_checkpoint(
    model: str | Path,
    bits: int | None,
    offline: bool,
    progress: Callable[[int, int, str], None] | None,
    machine: Machine | None = None,
) -> Path:
    """Return the folder of `model`, converted if need be.

    Arguments and errors are as in `load`. Without `machine`, a conversion keeps the checkpoint's
    precision however much memory it takes.
    """
    from mlx_smolvlm.convert.hub import ResolveOptions, resolve

    check_process()
    options = ResolveOptions(bits=bits, offline=offline, progress=progress, machine=machine)
    return resolve(model, options)


def _is_conversion_of(model: str | Path, path: Path) -> bool:
    """Whether `path` is a conversion that `load` made of `model`, so that `bits` decides on it."""
    from mlx_smolvlm.convert.hub import find_cache_folder, find_folder

    return path.is_relative_to(find_cache_folder()) and find_folder(model) != path


def _open_engine(
    path: Path,
    dtype: str | None,
    cache: CacheOptions,
    adapter: str | Path | None,
    terms: MemoryTerms,
    may_use_numpy: bool,
) -> Engine:
    """Load the checkpoint in the folder `path`; arguments and errors as in `load`."""
    from mlx_smolvlm.checkpoint.headers import read_headers
    from mlx_smolvlm.checkpoint.load import (
        find_tokenizer,
        load_model,
        read_chat_template,
        read_config,
    )
    from mlx_smolvlm.prompt.builder import PromptBuilder

    config = read_config(path)
    cache.check(config.text)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    dtype = dtype or _choose_dtype(config, on_cpu)
    builder = PromptBuilder(find_tokenizer(path), read_chat_template(path), config)
    in_numpy = may_use_numpy and on_cpu and dtype == "float32" and not numpy_is_off()
    backend: Backend = "numpy" if in_numpy else "mlx-cpu" if on_cpu else "mlx-gpu"
    item_bytes = DTYPE_BITS.get(dtype, 32) // 8
    tensors = read_headers(path)
    guard = _plan_memory(tensors, Setup(config, 0, backend, item_bytes, cache=cache), terms)
    network = load_model(path, dtype, tensors)
    folder = None
    if adapter is not None:
        from mlx_smolvlm.checkpoint.lora import load_adapter

        folder = expand_path(adapter, CheckpointError)
        load_adapter(network, folder, config.source)
    if in_numpy:
        from mlx_smolvlm.model.cpu import compute_in_numpy
        from mlx_smolvlm.model.products import unpack_weights

        if not guard.setup.is_packed:
            unpack_weights(network)
        compute_in_numpy(network)
    return Engine(path, config, network, builder, cache, folder, guard)


def _plan_memory(
    tensors: Mapping[str, TensorInfo], setup: Setup, terms: MemoryTerms
) -> MemoryGuard:
    """Check that a model of `tensors` fits into memory, and set MLX's limits if there is one.

    Raises:
        MemoryLimitError: It does not fit.
    """
    sizes = {name: (one.dtype, one.num_items) for name, one in tensors.items()}
    limit, machine = terms.limit, measure_machine()
    planned = plan_setup(setup, sizes, limit, machine)
    guard = MemoryGuard(planned, limit, machine, terms.fixed)
    guard.check_weights()
    if limit is not None:
        limit_mlx(mx, setup.backend, limit)
    return guard


def _choose_dtype(config: Config, on_cpu: bool) -> str:
    """The type to compute in by default."""
    if on_cpu:
        return "float32"
    return "bfloat16" if config.dtype == "float32" else config.dtype
