"""Measure one or several programs, in turns.

Programs run A, B, A, B, ..., so that a slow moment of the machine affects all of them. Each figure
is a median, with the fastest and the slowest repeat beside it.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_smolvlm.bench.programs import OURS, Launch, Program
from mlx_smolvlm.config import Config
from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.media.tiles import MAX_TILES_PER_SIDE, Detail, compute_grid

SAMPLE_TOLERANCE = 0.02  # between the features of two programs, relative to the largest
WARM_PROMPT, WARM_TOKENS = 16, 2

Progress = Callable[[int, int, str], None]  # steps done, all steps, what is measured now


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        tiles: Numbers of tiles of a picture.
        prompt_tokens: Length of the prompt for prefill and decoding.
        max_tokens: Tokens to generate.
        repeat: Repeats of each measurement.
        parts_only: Leave out what is measured of this package alone: starts, turns, memory.

    Raises:
        ValueError: A value is out of range.
    """

    tiles: tuple[int, ...] = (1, 13)
    prompt_tokens: int = 512
    max_tokens: int = 32
    repeat: int = 3
    parts_only: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens", "repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.tiles or min(self.tiles) < 1:
            raise ValueError("tiles must be one or more numbers from 1 on")


@dataclass(frozen=True)
class View:
    """A picture that is cut into a given number of tiles: its size in pixels, and the detail."""

    width: int
    height: int
    detail: Detail


@dataclass
class Measure:
    """All repeats of one measurement.

    Attributes:
        name: What was measured.
        unit: "s", "tokens/s" or "MB".
        tiles: Tiles of the picture; None if there is none.
        values: One per repeat.
    """

    name: str
    unit: str
    tiles: int | None = None
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.values)

    @property
    def label(self) -> str:
        """The name with the number of tiles."""
        if self.tiles is None:
            return self.name
        return f"{self.name}, {self.tiles} tile{'s' if self.tiles > 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return the measure for JSON."""
        return {
            **{"name": self.name, "unit": self.unit, "tiles": self.tiles, "median": self.median},
            **{"min": min(self.values), "max": max(self.values), "values": self.values},
        }


@dataclass
class Result:
    """What was measured of one program.

    Attributes:
        name: The program, with its precision.
        is_ours: Whether it is this package.
        measures: By label, in the order of the report.
        version: Of another program.
        token_ids: The ids that it generated, to compare programs with the same weights.
        sample: A few features of the first tile, likewise.
    """

    name: str
    is_ours: bool
    measures: dict[str, Measure] = field(default_factory=dict)
    version: str | None = None
    token_ids: list[int] = field(default_factory=list)
    sample: list[float] = field(default_factory=list)

    def add(self, name: str, unit: str, value: float, tiles: int | None = None) -> None:
        """Add one repeat of a measurement."""
        measure = Measure(name, unit, tiles)
        self.measures.setdefault(measure.label, measure).values.append(value)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        measures = [measure.to_dict() for measure in self.measures.values()]
        return {"name": self.name, "version": self.version, "measures": measures}


def find_view(config: Config, tiles: int) -> View:
    """Return a picture that this model cuts into `tiles` tiles.

    Raises:
        SmolVLMError: There is none; the message lists the numbers that are possible.
    """
    found: dict[int, View] = {}
    side = config.tile_size
    details: tuple[Detail, ...] = ("low", "high", "auto")
    for detail in details:
        for cols in range(1, MAX_TILES_PER_SIDE + 1):
            for rows in range(1, MAX_TILES_PER_SIDE + 1):
                size = (cols * side, rows * side)
                count = compute_grid(size, config, detail).num_tiles
                found.setdefault(count, View(*size, detail))
    if tiles not in found:
        possible = ", ".join(map(str, sorted(found)))
        raise SmolVLMError(f"no picture has {tiles} tiles with this model; possible: {possible}")
    return found[tiles]


def count_photo_tiles(config: Config) -> int:
    """Return the number of tiles of a photo of 4:3, as in training."""
    return compute_grid((1600, 1200), config, "high").num_tiles


def run_bench(
    launches: Sequence[Launch],
    config: Config,
    options: BenchOptions,
    progress: Progress | None = None,
) -> list[Result]:
    """Measure the programs of `launches`, and return their results in the same order.

    Args:
        launches: How they are started, those of this package first.
        config: The configuration of the model, which all of them have.
        options: What is measured.
        progress: Called before each step.

    Raises:
        SmolVLMError: A program cannot be measured, or no picture has such a number of tiles.
    """
    views = {tiles: find_view(config, tiles) for tiles in options.tiles}
    results = [Result(one.name, one.name.startswith(OURS)) for one in launches]
    ours = [pair for pair in zip(launches, results, strict=True) if pair[1].is_ours]
    if options.parts_only:
        ours = []
    total = options.repeat * (len(ours) + len(launches)) + len(launches)
    done = 0

    def report(text: str) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total, text)
        done += 1

    for number in range(options.repeat):
        for launch, result in ours:
            report(f"{launch.name}: a new process")
            _measure_start(launch, result, views, options, seed=number)
    with contextlib.ExitStack() as stack:
        programs = []
        for launch, result in zip(launches, results, strict=True):
            report(f"{launch.name}: loading")
            program = stack.enter_context(Program(launch))
            result.version = program.ready.get("version")
            _warm_up(program, config, options)
            programs.append(program)
        for number in range(options.repeat):
            for program, result in zip(programs, results, strict=True):
                report(f"{program.name}: repeat {number + 1} of {options.repeat}")
                if result.is_ours and not options.parts_only:
                    _measure_turns(program, result, views, options, seed=1000 + number)
                _measure_parts(program, result, config, options)
    return results


def _measure_start(
    launch: Launch, result: Result, views: dict[int, View], options: BenchOptions, seed: int
) -> None:
    """Measure a process from its start to its first token, and the memory of an answer."""
    tiles = min(views)
    with Program(launch) as program:
        request = {**vars(views[tiles]), "tokens": options.max_tokens, "seed": seed}
        answer = program.ask(do="turns", **request)
        result.add("import", "s", program.ready["import_s"])
        result.add("load", "s", program.ready["load_s"])
        result.add("process start to first token", "s", program.start_s + answer["first_s"], tiles)
        most = max(views)
        if most != tiles:
            request = {**vars(views[most]), "tokens": options.max_tokens, "seed": seed}
            program.ask(do="turns", **request)
        memory = program.ask(do="memory")
        result.add("peak memory of the process", "MB", memory["resident"] / 1e6, most)
        result.add("peak memory of MLX", "MB", memory["mlx"] / 1e6, most)


def _measure_turns(
    program: Program, result: Result, views: dict[int, View], options: BenchOptions, seed: int
) -> None:
    """Measure preprocessing and two turns of a conversation, in a process that has run before."""
    for tiles, view in views.items():
        answer = program.ask(do="preprocess", **vars(view), seed=seed)
        result.add("preprocessing", "s", answer["seconds"], tiles)
        turns = program.ask(do="turns", **vars(view), seed=seed, tokens=2)
        result.add("first token", "s", turns["first_s"], tiles)
        result.add("first token of turn 2", "s", turns["second_s"], tiles)


def _measure_parts(program: Program, result: Result, config: Config, options: BenchOptions) -> None:
    """Measure vision, prefill and decoding, each by itself."""
    if program.reads_pictures:
        for tiles in options.tiles:
            answer = program.ask(do="vision", tiles=tiles, side=config.tile_size)
            result.add("vision per tile", "s", answer["seconds"] / tiles, tiles)
            result.sample = result.sample or answer["sample"]
    answer = program.ask(do="text", prompt=options.prompt_tokens, tokens=options.max_tokens)
    result.add("prefill", "tokens/s", options.prompt_tokens / answer["prefill_s"])
    result.add("decoding", "tokens/s", options.max_tokens / answer["decode_s"])
    result.token_ids = answer["ids"]


def _warm_up(program: Program, config: Config, options: BenchOptions) -> None:
    """Let `program` compile what it compiles at first use."""
    if program.reads_pictures:
        program.ask(do="vision", tiles=min(options.tiles), side=config.tile_size)
    program.ask(do="text", prompt=WARM_PROMPT, tokens=WARM_TOKENS)


def compute_ratio(ours: Measure, other: Measure) -> float:
    """Return how many times better `ours` is: above 1 it is faster, or takes less memory."""
    ratio = other.median / ours.median
    return 1 / ratio if ours.unit.endswith("/s") else ratio


def compare_outputs(ours: Result, other: Result) -> str:
    """Say whether two programs computed the same: ids of all tokens, and features of a tile."""
    same = sum(a == b for a, b in zip(ours.token_ids, other.token_ids, strict=False))
    text = f"{same} of {len(ours.token_ids)} token ids the same"
    if not other.sample:
        return text
    largest = max(map(abs, ours.sample))
    pairs = zip(ours.sample, other.sample, strict=True)
    error = max(abs(a - b) for a, b in pairs) / largest
    verdict = "the same" if error < SAMPLE_TOLERANCE else "different"
    return f"{text}, features {verdict} (to {error:.0e})"
