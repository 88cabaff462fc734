"""Refuses work that does not fit into memory, and says which change would make it fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mlx_smolvlm.errors import MemoryLimitError, SmolVLMWarning
from mlx_smolvlm.generate.memory_plan import (
    MB,
    Setup,
    Work,
    count_converted_bytes,
    estimate,
    fit_batches,
)
from mlx_smolvlm.media.encode import Footage, Medium, Picture

if TYPE_CHECKING:
    from mlx_smolvlm.media.tiles import Detail
    from mlx_smolvlm.prompt.builder import PromptBuilder

SURE = 0.8  # without a limit, only work is refused of whose estimate so much exceeds the memory
SHORT = 64  # tokens of a short question or answer
FEW_BITS = 4

Change = tuple[str, Setup, Work]
"""What to change, in words, and the setup and work that result."""

NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MemoryTerms:
    """What the caller says about memory when a model is loaded.

    Attributes:
        limit: Most bytes of the process, or None.
        fixed: Of bits, kv_bits, max_tokens, detail and max_frames, those that the caller cannot
            change, or with no effect. Advice names none of them.
    """

    limit: int | None = None
    fixed: frozenset[str] = NO_NAMES


@dataclass
class MemoryGuard:
    """Compares estimates with a limit, or without one with the memory of the machine.

    Attributes:
        setup: How the checkpoint is computed. Batches become smaller when an answer needs it,
            and stay so.
        limit: Most bytes of the process, or None.
        machine: Memory of the machine in bytes; None if it is not known.
        fixed: As in `MemoryTerms`.
    """

    setup: Setup
    limit: int | None = None
    machine: int | None = None
    fixed: frozenset[str] = NO_NAMES
    _has_warned: bool = field(default=False, repr=False)

    def count_spare(self, work: Work) -> int | None:
        """Bytes that `work` leaves of the limit, with batches as they are; None without a limit.

        Negative if it does not fit.
        """
        if self.limit is None:
            return None
        return self.limit - estimate(self.setup, work, self.limit).total

    def check_weights(self) -> None:
        """Check that a short answer to a short question fits, before weights are loaded.

        Raises:
            MemoryLimitError: It does not.
        """
        work = Work(tokens=SHORT, max_tokens=SHORT)
        picture = replace(work, tiles=1, tokens=self.setup.config.image_seq_len + SHORT)
        self._check(
            "the model",
            work,
            lambda: f"{_format(self.find_least(picture))} for a picture of one tile",
            lambda: list_weight_changes(self.setup, work, self.fixed),
        )

    def check_answer(
        self,
        builder: PromptBuilder,
        media: Sequence[Medium],
        work: Work,
        fixed: frozenset[str] = NO_NAMES,
    ) -> None:
        """Check that `work`, an answer about `media`, fits, if need be with smaller batches.

        Args:
            builder: Counts the tokens of pictures.
            media: The pictures and videos of the prompt.
            work: The answer.
            fixed: As in `MemoryTerms`, for this answer, beside `self.fixed`.

        Raises:
            MemoryLimitError: It does not.
        """
        self._check(
            "this answer",
            work,
            lambda: _format(self.find_least(work)),
            lambda: list_changes(self.setup, builder, media, work, self.fixed | fixed),
        )
        self.setup = fit_batches(self.setup, work, self.limit)

    def find_least(self, work: Work) -> int:
        """Return a limit that `work` fits into, if it does not fit now; the reserve grows with it.

        Without a limit, return the need.
        """
        guard = replace(self)
        while (needed := guard._count(self.setup, work)) > (guard.limit or needed):
            guard.limit = needed
        return needed

    def _count(self, setup: Setup, work: Work) -> int:
        return estimate(fit_batches(setup, work, self.limit), work, self.limit).total

    def _check(
        self,
        name: str,
        work: Work,
        find_least: Callable[[], str],
        list_all: Callable[[], Iterable[Change]],
    ) -> None:
        """Refuse `work`, or warn, if it does not fit.

        Args:
            name: What it is, in the message.
            work: The work.
            find_least: Finds the limit to recommend.
            list_all: Lists changes, the smallest first.
        """
        most = self.machine if self.limit is None else self.limit
        needed = self._count(self.setup, work)
        if most is None or needed <= most:
            return
        fits = (text for text, setup, less in list_all() if self._count(setup, less) <= most)
        change = next(fits, None)
        message = f"{name} needs about {_format(needed)} of memory, and "
        if self.limit is not None:
            advice = f"a memory_limit (--memory-limit) of {find_least()}"
            message += f"memory_limit is {_format(most, up=False)}; "
            message += f"give {advice}" if change is None else f"use {change}, or {advice}"
            raise MemoryLimitError(message)
        message += f"this machine has {_format(most, up=False)}; "
        message += "use a smaller model" if change is None else f"use {change}"
        if SURE * needed > most:
            raise MemoryLimitError(message)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, SmolVLMWarning, stacklevel=4)


def list_weight_changes(
    setup: Setup, work: Work, fixed: frozenset[str] = NO_NAMES
) -> Iterator[Change]:
    """Yield the changes that make the model smaller, if `fixed` leaves them."""
    if "bits" in fixed:
        return
    smaller = count_converted_bytes(setup.config, FEW_BITS, setup.item_bytes)
    if smaller < setup.weights:
        packed = replace(setup, weights=smaller, is_packed=True)
        yield f"a conversion with {FEW_BITS} bits (--bits {FEW_BITS})", packed, work


def list_changes(
    setup: Setup,
    builder: PromptBuilder,
    media: Sequence[Medium],
    work: Work,
    fixed: frozenset[str] = NO_NAMES,
) -> Iterator[Change]:
    """Yield changes that make an answer smaller, those that change least first.

    Args:
        setup: How the checkpoint is computed.
        builder: Counts the tokens of pictures.
        media: The pictures and videos of the prompt.
        work: The answer.
        fixed: As in `MemoryTerms`.
    """
    is_fast = setup.backend == "mlx-gpu"  # on a CPU, packed keys and values are slow
    packed = [] if "kv_bits" in fixed else [*_list_kv_changes(setup, work)]
    if is_fast:
        yield from packed
    if "max_tokens" not in fixed:
        for count in range(work.max_tokens // SHORT * SHORT, SHORT, -SHORT):
            shorter = replace(work, max_tokens=count)
            yield f"max_tokens {count} (--max-tokens {count})", setup, shorter
    if "detail" not in fixed:
        yield from _list_picture_changes(setup, builder, media, work)
    if "max_frames" not in fixed:
        yield from _list_video_changes(setup, builder, media, work)
    if not is_fast:
        yield from packed
    yield from list_weight_changes(setup, work, fixed)
    if fixed.isdisjoint(("detail", "max_tokens")):
        short = replace(work, max_tokens=min(work.max_tokens, 2 * SHORT))
        for text, same, smaller in _list_picture_changes(setup, builder, media, short):
            yield f"{text} and max_tokens {2 * SHORT} (--max-tokens {2 * SHORT})", same, smaller


def _list_kv_changes(setup: Setup, work: Work) -> Iterator[Change]:
    """Yield keys and values of 8 bits, if they can be had."""
    cache, width = setup.cache, setup.config.text.head_dim
    if cache.kv_bits is None and cache.folder is None and width % cache.kv_group_size == 0:
        packed = replace(setup, cache=replace(cache, kv_bits=8))
        yield "kv_bits 8 (--kv-bits 8)", packed, work


def _list_picture_changes(
    setup: Setup, builder: PromptBuilder, media: Sequence[Medium], work: Work
) -> Iterator[Change]:
    """Yield lower levels of detail of the pictures that are not encoded yet."""
    from mlx_smolvlm.media.tiles import compute_grid

    new = [one for one in media if isinstance(one, Picture) and one.image_embeds is None]
    sides = [max(one.grid.rows, one.grid.cols) for one in new]
    levels: list[Detail] = [*range(max(sides, default=0) - 1, 0, -1), "low"]
    for level in levels if new else []:
        tiles, tokens = work.tiles, work.tokens
        for one in new:
            assert one.image is not None
            grid = compute_grid(one.image.size, setup.config, level)
            tiles += grid.num_tiles - one.num_tiles
            tokens += builder.count_image_tokens(grid) - builder.count_image_tokens(one.grid)
        if tiles < work.tiles:
            text = f"detail {level!r} (--detail {level})"
            yield text, setup, replace(work, tiles=tiles, tokens=tokens)


def _list_video_changes(
    setup: Setup, builder: PromptBuilder, media: Sequence[Medium], work: Work
) -> Iterator[Change]:
    """Yield smaller numbers of frames of the videos that are not encoded yet."""
    new = [one for one in media if isinstance(one, Footage) and one.image_embeds is None]
    frames = sum(one.num_tiles for one in new)
    if not frames:
        return
    per_frame = sum(builder.count_clip_tokens(one.times) for one in new) // frames
    for count in range(frames // len(new) - 1, 0, -1):
        fewer = max(0, frames - count * len(new))
        less = replace(work, tiles=work.tiles - fewer, tokens=work.tokens - fewer * per_frame)
        yield f"max_frames {count} (--max-frames {count})", setup, less


def _format(size: int, up: bool = True) -> str:
    """Return `size` in MB, rounded up or down so that it stays on the safe side."""
    return f"{-(-size // MB) if up else size // MB} MB"
