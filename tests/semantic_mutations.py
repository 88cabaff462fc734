"""Mistakes that tests/test_demo_semantics.py must notice, each made on purpose.

    python tests/semantic_mutations.py [NAME...]

It prints, for each, which of the tests that are about it fail: the table of
docs/decisions/semantic-tests.md.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

TESTS = Path(__file__).parent
CHOSEN = "SEMANTIC_MUTATION"


def changed(owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Put `change` of what `owner` calls `name` in its place."""
    setattr(owner, name, change(getattr(owner, name)))


def retiled(move: Callable[[np.ndarray], None]) -> None:
    """Let `move` change the tiles (N, H, W, 3) of every picture, the global one last, in place."""
    from mlx_smolvlm import image

    def change(real: Any) -> Any:
        def tiles(*arguments: Any) -> Any:
            made = real(*arguments)
            move(made.pixel_values)
            return made

        return tiles

    changed(image, "tiles", change)


def no_crops() -> None:
    """All tiles of a picture are the global one."""

    def move(pixel_values: np.ndarray) -> None:
        pixel_values[:] = pixel_values[-1]

    retiled(move)


def swapped_crops() -> None:
    """The first two crops stand in each other's places."""

    def move(pixel_values: np.ndarray) -> None:
        if len(pixel_values) > 2:
            pixel_values[[0, 1]] = pixel_values[[1, 0]]

    retiled(move)


def global_first() -> None:
    """The global tile comes before the crops."""

    def move(pixel_values: np.ndarray) -> None:
        pixel_values[:] = np.roll(pixel_values, 1, axis=0)

    retiled(move)


def swapped_channels() -> None:
    """Red and blue are taken for each other."""
    from mlx_smolvlm import image

    changed(image, "_normalized", lambda real: lambda *a: np.ascontiguousarray(real(*a)[..., ::-1]))


def picture_as_it_lies() -> None:
    """Pictures are not turned upright."""
    from mlx_smolvlm import picture

    picture._TURNS.clear()


def flipped_patches() -> None:
    """Patches of a tile are read from right to left."""
    from mlx_smolvlm import connector

    def change(real: Any) -> Any:
        def pixel_shuffle(x: mx.array, scale: int) -> mx.array:
            n, p, v = x.shape
            side = int(p**0.5)
            return real(x.reshape(n, side, side, v)[:, :, ::-1].reshape(n, p, v), scale)

        return pixel_shuffle

    changed(connector, "pixel_shuffle", change)


def stale_pictures() -> None:
    """Pictures of one size are taken for each other."""
    from mlx_smolvlm.media import Picture

    Picture.digest = property(lambda self: f"{self.grid}")  # type: ignore[assignment,method-assign]


def stale_ids() -> None:
    """What is known of a prompt is found by its token ids alone."""
    from mlx_smolvlm import reuse

    def common(self: Any, other: Any, most: int) -> int:
        return reuse.common(self.ids[:most], other.ids[:most])

    reuse.Content.common = common  # type: ignore[method-assign]


def positions_from_zero() -> None:
    """Tokens behind those that are held stand where the first ones do."""
    from mlx_smolvlm.cache import KVCache
    from mlx_smolvlm.text import TextModel

    def change(real: Any) -> Any:
        def call(self: Any, embeds: mx.array, cache: Any = None, places: Any = None) -> mx.array:
            if cache is None or places is not None or type(cache) is not KVCache:
                return real(self, embeds, cache, places)
            return real(self, embeds, Shifted(cache), places)

        return call

    class Shifted:
        """A cache that says it is empty."""

        offset = 0

        def __init__(self, cache: Any) -> None:
            self._cache = cache

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cache, name)

    changed(TextModel, "__call__", change)


def nothing_forgotten() -> None:
    """What is taken back stays in the cache."""
    from mlx_smolvlm.cache import KVCache

    KVCache.trim = lambda self, offset: None  # type: ignore[method-assign]


def no_pins() -> None:
    """A bounded cache drops pictures as it drops text."""
    from mlx_smolvlm.bounded import BoundedKVCache

    BoundedKVCache.pin = lambda self, pins: None  # type: ignore[method-assign]


def coarse_scales() -> None:
    """Scales of packed weights are a quarter too large."""
    real = mx.quantize

    def quantize(*arguments: Any, **options: Any) -> Any:
        packed, scales, *rest = real(*arguments, **options)
        return (packed, scales * 1.25, *rest)

    mx.quantize = quantize


def no_biases() -> None:
    """Biases of packed weights are left out."""
    real = mx.quantize

    def quantize(*arguments: Any, **options: Any) -> Any:
        packed, scales, biases = real(*arguments, **options)
        return packed, scales, mx.zeros_like(biases)

    mx.quantize = quantize


def rows_see_each_other() -> None:
    """Answers side by side see one another's tokens."""
    from mlx_smolvlm import packing
    from mlx_smolvlm.text import Places

    def change(real: Any) -> Any:
        def places(self: Any, rows: np.ndarray) -> Places:
            made = real(self, rows)
            length, total = made.mask.shape
            mask = np.tril(np.ones((length, total), bool), total - length)
            return Places(made.positions, mx.array(mask))

        return places

    changed(packing.Rows, "_places", change)


def rows_in_a_row() -> None:
    """Answers side by side stand one behind the other."""
    from mlx_smolvlm import packing
    from mlx_smolvlm.text import Places

    def change(real: Any) -> Any:
        def places(self: Any, rows: np.ndarray) -> Places:
            first = self.columns
            made = real(self, rows)
            return Places(np.arange(first, first + rows.size), made.mask)

        return places

    changed(packing.Rows, "_places", change)


def pictures_reversed() -> None:
    """Pictures of a prompt are joined from the last to the first."""
    from mlx_smolvlm import answer

    changed(answer, "joined", lambda real: lambda media: real(list(media)[::-1]))


def frames_reversed() -> None:
    """Frames of a video come from the last to the first."""
    from mlx_smolvlm.media import Footage

    changed(Footage, "tiles", lambda real: lambda self, config: reversed(list(real(self, config))))


def one_frame() -> None:
    """Every frame of a video is its first one."""
    from mlx_smolvlm.media import Footage

    def change(real: Any) -> Any:
        def tiles(self: Any, config: Any) -> Any:
            made = list(real(self, config))
            return iter([made[0]] * len(made))

        return tiles

    changed(Footage, "tiles", change)


def whole_videos() -> None:
    """Start and end of a video are not looked at."""
    from mlx_smolvlm import video

    changed(video, "_range", lambda real: lambda _v, opened: (0, opened.reader.num_frames - 1))


def forced_tokens_unseen() -> None:
    """Tokens that a grammar forces are said, and not put into the cache."""
    from mlx_smolvlm import generate

    def change(real: Any) -> Any:
        def prefill(model: Any, embeds: mx.array, cache: Any) -> mx.array:
            return real(model, embeds[:, :1] if cache.offset else embeds, cache)

        return prefill

    changed(generate, "prefill", change)


# What each mistake should fail, as pytest's -k has it.
MUTATIONS: dict[Callable[[], None], str] = {
    no_crops: "small_print",
    swapped_crops: "small_print",
    global_first: "small_print",
    swapped_channels: "right_color",
    picture_as_it_lies: "however_it_comes",
    flipped_patches: "lines",
    stale_pictures: "place_of_another or on_disk",
    stale_ids: "place_of_another or on_disk",
    positions_from_zero: "second_question",
    nothing_forgotten: "second_question or place_of_another",
    no_pins: "old_turns_go",
    coarse_scales: "eight_bits",
    no_biases: "eight_bits",
    rows_see_each_other: "side_by_side or right_color",
    rows_in_a_row: "side_by_side or right_color",
    pictures_reversed: "two_pictures",
    frames_reversed: "backwards",
    one_frame: "backwards",
    whole_videos: "outside_of_a_range",
    forced_tokens_unseen: "expression or forced",
}
BY_NAME = {mutation.__name__: mutation for mutation in MUTATIONS}


def pytest_configure() -> None:
    """As a plugin: make the mistake that the environment names."""
    BY_NAME[os.environ[CHOSEN]]()


def failing(name: str, chosen: str) -> list[str]:
    """Those of the `chosen` tests that fail with the mistake `name`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "semantic_mutations", "-k", chosen]
    path = os.environ.get("PYTHONPATH", str(TESTS.parent))
    done = subprocess.run(
        [*command, str(TESTS / "test_demo_semantics.py")],
        env=os.environ | {CHOSEN: name, "PYTHONPATH": f"{TESTS}{os.pathsep}{path}"},
        capture_output=True, text=True, cwd=TESTS.parent,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"{name}: {done.stdout[-500:]}{done.stderr[-500:]}")
    found = re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE)
    return list(dict.fromkeys(found))


def main() -> None:
    """Print the table; exit with 1 if a mistake is not noticed."""
    unseen = 0
    print("| mistake | tests that fail |\n|---|---|")
    for name in sys.argv[1:] or BY_NAME:
        tests = failing(name, MUTATIONS[BY_NAME[name]])
        told = (BY_NAME[name].__doc__ or "").rstrip(".")
        unseen += not tests
        print(f"| {told} | {', '.join(f'`{t}`' for t in tests) or '**none**'} |", flush=True)
    raise SystemExit(unseen > 0)


if __name__ == "__main__":
    main()
