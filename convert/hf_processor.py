"""Read a Hugging Face checkpoint's processor, tokenizer and generation files.

Source: transformers 5.23, Idefics3ImageProcessor, SmolVLMVideoProcessor, ProcessorMixin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_smolvlm.checkpoint.load import LARGEST_TEMPLATE, TEMPLATE_FILE, TOKENIZER_FILE
from mlx_smolvlm.config import MAX_SIZE, ImageConfig, VideoConfig
from mlx_smolvlm.convert.source import Source
from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.prompt.tokenizer import LARGEST_FILE


@dataclass(frozen=True)
class Section:
    """A JSON object, and its name in error messages."""

    values: Mapping[str, Any]
    name: str

    def error(self, key: str, advice: str) -> CheckpointError:
        """Make an error about the value at `key`."""
        return CheckpointError(f"{self.name}: {key} is {shorten(self.values.get(key))}; {advice}")

    def get_section(self, key: str) -> Section | None:
        """Return the object at `key`; None if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "it must be an object")
        return Section(value, f"{self.name}, {key}")

    def get_integer(self, key: str, default: int | None, largest: int = MAX_SIZE) -> int:
        """Return the positive integer at `key`; `default` if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is not int or not 0 < value <= largest:
            raise self.error(key, f"it must be an integer from 1 to {largest}")
        return value

    def get_number(self, key: str, default: float | None, *, zero: bool = False) -> float:
        """Return the number at `key`, positive or, if `zero`, 0; `default` if absent or null."""
        value = self.values.get(key)
        if value is None:
            value = default
        usable = type(value) in (int, float) and 0 <= value < float("inf")  # type: ignore[operator]
        if not usable or not (value or zero):
            raise self.error(key, f"it must be a number {'from' if zero else 'above'} 0")
        return float(value)  # type: ignore[arg-type]

    def get_flag(self, key: str, default: bool) -> bool:
        """Return the boolean at `key`; `default` if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, "it must be true or false")
        return value

    def check_fixed(self, supported: Mapping[str, Any]) -> None:
        """Raise CheckpointError if a value is present and differs from its `supported` value."""
        for key, wanted in supported.items():
            value = self.values.get(key)
            same = value == wanted or (
                isinstance(wanted, float)
                and isinstance(value, (int, float))
                and abs(value - wanted) < 1e-9
            )
            if value is not None and not same:
                raise self.error(key, f"mlx-smolvlm supports {wanted!r}")


LONGEST_EDGE, TILE = 4 * 364, 364  # the image processors' defaults, in pixels
LANCZOS = 1
SKIP_SECS = 1.0  # the default of SmolVLMVideoProcessor.sample_frames
END_OF_UTTERANCE = "<end_of_utterance>"

FIXED_IMAGE = {
    "resample": LANCZOS,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}


def read_processors(source: Source) -> tuple[Section, Section | None]:
    """Read the settings of the image processor and, if separate, of the video processor.

    transformers 5 nests both in processor_config.json, which it prefers to the files of older
    versions.
    """
    images, videos = None, None
    if source.has("processor_config.json"):
        nested = Section(source.read_json("processor_config.json"), "processor_config.json")
        images, videos = (
            nested.get_section("image_processor"),
            nested.get_section("video_processor"),
        )
    if images is None:
        if not source.has("preprocessor_config.json"):
            raise CheckpointError(
                f"{source.folder} has no preprocessor_config.json, so the picture size is unknown; "
                "copy it from the checkpoint that this one was made from"
            )
        images = Section(source.read_json("preprocessor_config.json"), "preprocessor_config.json")
    name = "video_preprocessor_config.json"
    if videos is None and source.has(name):
        videos = Section(source.read_json(name), name)
    return images, videos


def read_image_config(section: Section, tile: int) -> ImageConfig:
    """Read how pictures are resized, normalized and cut into tiles of `tile` pixels a side."""
    section.check_fixed(FIXED_IMAGE)
    largest = _read_longest_edge(section, "max_image_size", TILE)
    if largest != tile:
        raise section.error(
            "max_image_size", f"vision_config's image_size is {tile}, and the two must agree"
        )
    return ImageConfig(
        longest_edge=_read_longest_edge(section, "size", LONGEST_EDGE),
        mean=_read_channels(section, "image_mean"),
        std=_read_channels(section, "image_std"),
        do_image_splitting=section.get_flag("do_image_splitting", True),
    )


def _read_longest_edge(section: Section, key: str, default: int) -> int:
    """Read `longest_edge`, in pixels, of the object at `key`."""
    size = section.get_section(key)
    return default if size is None else size.get_integer("longest_edge", None)


def _read_channels(section: Section, key: str) -> tuple[float, float, float]:
    """Read three numbers at `key`, one per channel; the default is 0.5 for each."""
    value = section.values.get(key)
    if value is None:
        return (0.5, 0.5, 0.5)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or any(type(one) not in (int, float) for one in value)
    ):
        raise section.error(key, "it must be three numbers")
    return (float(value[0]), float(value[1]), float(value[2]))


def read_video_config(images: Section, videos: Section | None) -> VideoConfig | None:
    """Read how frames are sampled; None if the checkpoint has no video settings.

    SmolVLM2 stores `video_sampling` in the image settings; transformers 5 stores the same values as
    fields of the video processor.
    """
    for section in (videos, images):
        sampling = section and section.get_section("video_sampling")
        if sampling is not None:
            return VideoConfig(
                fps=sampling.get_number("fps", None),
                max_frames=sampling.get_integer("max_frames", None),
                longest_edge=_read_longest_edge(sampling, "video_size", LONGEST_EDGE),
                skip_secs=sampling.get_number("skip_secs", SKIP_SECS, zero=True),
            )
    if videos is None or videos.values.get("fps") is None:
        return None
    return VideoConfig(
        fps=videos.get_number("fps", None),
        max_frames=videos.get_integer("num_frames", None),
        longest_edge=_read_longest_edge(videos, "size", LONGEST_EDGE),
        skip_secs=videos.get_number("skip_secs", SKIP_SECS, zero=True),
    )


def read_eos_token_ids(
    source: Source, top: Section, text: Section, tokens: Mapping[str, int], vocab_size: int
) -> tuple[int, ...]:
    """Read the token ids that end an answer, all below `vocab_size`.

    They come from generation_config.json or else from config.json. `<end_of_utterance>` is added if
    the tokenizer has it, since it ends a turn in the chat format.

    Raises:
        CheckpointError: There are none, or a value is not an integer.
    """
    sections = [text, top]
    if source.has("generation_config.json"):
        generation = Section(source.read_json("generation_config.json"), "generation_config.json")
        sections.insert(0, generation)
    ids: list[int] = []
    for section in sections:
        value = section.values.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(type(one) is not int for one in ids):
            raise section.error("eos_token_id", "it must be an integer or a list of them")
        break
    if END_OF_UTTERANCE in tokens:
        ids = [*ids, tokens[END_OF_UTTERANCE]]
    usable = tuple(dict.fromkeys(one for one in ids if 0 <= one < vocab_size))
    if not usable:
        raise CheckpointError(
            f"{source.folder}: no eos_token_id within the vocabulary of {vocab_size}, so no answer "
            "would end; state it in generation_config.json"
        )
    return usable


def read_added_tokens(source: Source) -> dict[str, int]:
    """Read the ids of the added tokens in tokenizer.json, by content.

    Raises:
        CheckpointError: tokenizer.json is missing or damaged.
    """
    if not source.has(TOKENIZER_FILE):
        raise CheckpointError(
            f"{source.folder} has no {TOKENIZER_FILE}; save its tokenizer with transformers' "
            "AutoTokenizer, which writes one"
        )
    added = source.read_json(TOKENIZER_FILE, LARGEST_FILE).get("added_tokens") or []
    try:
        return {token["content"]: token["id"] for token in added}
    except (TypeError, KeyError):
        raise CheckpointError(
            f"{source.folder / TOKENIZER_FILE}: added_tokens is damaged"
        ) from None


def read_template(source: Source) -> str:
    """Read the chat template of `source` from the file that transformers would use.

    Raises:
        CheckpointError: None of the four files has one.
    """
    for name in ("processor_config.json", "chat_template.json", TEMPLATE_FILE):
        if name == TEMPLATE_FILE and source.has(name):
            return source.read_text(name, LARGEST_TEMPLATE)
        template = _read_template_in(source, name)
        if template is not None:
            return template
    template = _read_template_in(source, "tokenizer_config.json")
    if template is None:
        raise CheckpointError(
            f"{source.folder} has no chat template (chat_template.jinja, chat_template.json or in "
            "tokenizer_config.json); copy it from the checkpoint that this one was made from"
        )
    return template


def _read_template_in(source: Source, name: str) -> str | None:
    """Read "chat_template" in the JSON file `name`; of several templates, the default one."""
    if not name.endswith(".json") or not source.has(name):
        return None
    value = source.read_json(name).get("chat_template")
    if isinstance(value, list):
        value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{source.folder / name}: chat_template is not a string: {shorten(value)}"
        )
    return value
