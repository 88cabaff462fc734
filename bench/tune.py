"""Find the settings of MLX or OpenBLAS that are fastest on this machine.

Each setting is tried in processes of its own, since the libraries read it when they start. The
settings take turns. One is saved only if it beats the default by more than the spread of both, so
a lucky repeat does not decide.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_smolvlm.bench.programs import Program, launch_ours
from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.files import write_file
from mlx_smolvlm.runtime import count_cores
from mlx_smolvlm.tuning import THREADS, VARIABLES, applied, find_settings_file, format_settings

Setting = Mapping[str, str]  # environment variables; none for the default
Measure = Callable[[Setting], float]  # seconds of an answer with a setting; less is better

# Operations and megabytes after which MLX hands a command buffer to the GPU. Its own defaults are
# 20 to 50 of each, by chip.
BUFFER_LIMITS = ((10, 10), (20, 40), (50, 50), (100, 50), (100, 100), (200, 200), (500, 500))
PROMPT, TOKENS = 256, 32


@dataclass(frozen=True)
class Outcome:
    """What `compare_settings` found.

    Attributes:
        best: The setting with the least median; the default if no other is clearly better.
        seconds: All repeats of each setting, in the order in which they were given.
    """

    best: Setting
    seconds: list[tuple[Setting, list[float]]]


def list_settings(on_gpu: bool) -> list[Setting]:
    """Return the settings to try on this machine, the default first."""
    if on_gpu:
        names = VARIABLES[:2]
        return [{}, *(dict(zip(names, map(str, pair), strict=True)) for pair in BUFFER_LIMITS)]
    cores = count_cores()
    counts = sorted({1, *(2**n for n in range(1, 6) if 2**n < cores), cores})
    return [{}, *({THREADS: str(count)} for count in counts)]


def compare_settings(
    settings: Sequence[Setting],
    measure: Measure,
    repeat: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Outcome:
    """Measure each of `settings` `repeat` times, in turns, and choose one.

    Args:
        settings: The default first.
        measure: Returns the seconds that an answer takes.
        repeat: At least 2, since a single measurement has no spread.
        progress: Called before each measurement.

    Raises:
        ValueError: `repeat` is below 2.
    """
    check_repeat(repeat)
    seconds: list[list[float]] = [[] for _ in settings]
    for turn in range(repeat):
        for number, setting in enumerate(settings):
            if progress is not None:
                done = turn * len(settings) + number
                progress(done, repeat * len(settings), format_setting(setting))
            seconds[number].append(measure(setting))
    medians = [statistics.median(values) for values in seconds]
    best = medians.index(min(medians))
    spread = max(max(values) - min(values) for values in (seconds[0], seconds[best]))
    if medians[0] - medians[best] <= spread:
        best = 0
    return Outcome(settings[best], list(zip(settings, seconds, strict=True)))


def check_repeat(repeat: int) -> None:
    """Raise ValueError if `repeat` is below 2."""
    if repeat < 2:
        raise ValueError(f"repeat is {repeat}; tuning needs 2 or more to know the spread")


def make_measure(folder: Path) -> Measure:
    """Return a function that measures an answer about one tile with the checkpoint in `folder`."""
    from mlx_smolvlm.checkpoint.load import read_config

    side = read_config(folder).tile_size

    def measure(setting: Setting) -> float:
        env: dict[str, str | None] = {**dict.fromkeys(applied), **setting}
        with Program(launch_ours(folder, env)) as program:
            program.ask(do="text", prompt=PROMPT, tokens=2)  # warms up
            program.ask(do="vision", tiles=1, side=side)
            vision = program.ask(do="vision", tiles=1, side=side)
            text = program.ask(do="text", prompt=PROMPT, tokens=TOKENS)
        return float(vision["seconds"] + text["prefill_s"] + text["decode_s"])

    return measure


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse to tune what the user has set.

    Raises:
        SmolVLMError: One of the variables is set, and not by the saved settings.
    """
    for name in VARIABLES:
        if name in environment and name not in applied:
            raise SmolVLMError(f"{name} is set, which would decide; unset it to tune")


def save_outcome(outcome: Outcome) -> Path | None:
    """Save the best setting for later runs.

    Returns:
        The file; None if the default is best. Then an earlier file is removed.

    Raises:
        OSError: The file cannot be written or removed.
    """
    path = find_settings_file()
    if not outcome.best:
        path.unlink(missing_ok=True)
        return None
    seconds = {format_setting(one): statistics.median(values) for one, values in outcome.seconds}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(path, format_settings(outcome.best, seconds))
    return path


def format_setting(setting: Setting) -> str:
    """Return `setting` as text, such as "OPENBLAS_NUM_THREADS=2"."""
    return " ".join(f"{name}={value}" for name, value in setting.items()) or "default"


def format_outcome(outcome: Outcome) -> str:
    """Return the table of all settings, with a mark at the one that was chosen."""
    lines = []
    for setting, values in outcome.seconds:
        mark = "*" if setting == outcome.best else " "
        times = f"{statistics.median(values):8.3f} s ({min(values):.3f}-{max(values):.3f})"
        lines.append(f"{mark} {format_setting(setting):60} {times}")
    return "\n".join(lines) + "\n"
