"""`mlx-smolvlm compare`: how far one checkpoint lies from another."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_smolvlm.cli.options import Detail
from mlx_smolvlm.cli.render import Bar, say, table, write
from mlx_smolvlm.files import expand_path, write_output

if TYPE_CHECKING:
    from mlx_smolvlm.convert.compare_options import CompareOptions
    from mlx_smolvlm.convert.comparison import Comparison
    from mlx_smolvlm.convert.source import Source

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Samples:
    """Texts and pictures that a user gave; None stands for those of the package."""

    texts: tuple[Path, ...] | None = None
    pictures: Path | None = None
    data: tuple[Path, ...] = ()
    limit: int | None = None

    def options(
        self, questions: tuple[str, ...] = (), max_tokens: int = 48, detail: Detail = "low"
    ) -> CompareOptions:
        """What two checkpoints are tried on.

        Raises:
            typer.BadParameter: A file is no text, a folder has no pictures, or a number is
                out of range.
        """
        from mlx_smolvlm.convert.compare_options import CompareOptions

        given = CompareOptions()
        try:
            return CompareOptions(
                texts=None if self.texts is None else tuple(map(read_text, self.texts)),
                pictures=None if self.pictures is None else find_pictures(self.pictures),
                questions=questions or given.questions,
                max_tokens=max_tokens,
                detail=detail,
                data=self.data,
                data_limit=self.limit,
            )
        except ValueError as error:
            hint = "--limit" if str(error).startswith("data_limit") else "--max-tokens"
            raise typer.BadParameter(str(error), param_hint=hint) from None


@dataclass(frozen=True)
class CompareRequest:
    """What `compare` was asked for."""

    reference: str
    other: str
    samples: Samples
    questions: tuple[str, ...]
    max_tokens: int
    detail: Detail
    json: Path | None
    plot: Path | None
    offline: bool

    def __post_init__(self) -> None:
        for name, path in (("--json", self.json), ("--plot", self.plot)):
            if path is None:
                continue
            try:
                folder = expand_path(path).parent
            except OSError as error:
                raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=name) from None
            if not folder.is_dir():
                raise typer.BadParameter(f"there is no folder {folder}", param_hint=name)


def compare(request: CompareRequest) -> None:
    """Put what was found on stdout, and into files where they were asked for.

    Raises:
        CheckpointError: A checkpoint is not usable, or their tokenizers differ.
        MediaError: A picture cannot be opened.
        DatasetError: A dataset cannot be used.
    """
    from mlx_smolvlm.convert.measure import compare as measure

    options = request.samples.options(request.questions, request.max_tokens, request.detail)
    bar = Bar()
    with contextlib.closing(bar):
        found = measure(
            request.reference, request.other, options, offline=request.offline, progress=bar.draw
        )
    show(found)
    if request.json is not None:
        import json

        text = json.dumps(found.to_dict(), indent=2) + "\n"
        write_output(request.json, text)
    if request.plot is not None:
        from mlx_smolvlm.convert.plot import draw_plot

        draw_plot(found, request.plot)


def verify(source: Source, dest: Path, samples: Samples) -> None:
    """Compare what was converted with its source, and put what was found on stdout.

    Raises:
        CheckpointError: One of the two is not usable.
        MediaError: A picture cannot be opened.
    """
    from mlx_smolvlm.convert.verify import VERIFY_FILE, VERIFY_PLOT, verify_conversion

    bar = Bar()
    with contextlib.closing(bar):
        found = verify_conversion(source, dest, samples.options(), progress=bar.draw)
    show(found)
    say(f"wrote {dest / VERIFY_FILE} and {VERIFY_PLOT}")


def show(found: Comparison) -> None:
    """Put the table and the answers that differ on stdout."""
    from mlx_smolvlm.convert.report import differing_answers, summary_rows

    write(table(list(summary_rows(found))))
    if lines := list(differing_answers(found)):
        write("\n" + "\n".join(lines) + "\n")


def read_text(path: Path) -> str:
    """The text in the file at `path`.

    Raises:
        typer.BadParameter: It cannot be read, is no text, or is empty.
    """
    try:
        text = expand_path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="texts") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} is not UTF-8 text", param_hint="texts") from None
    if not text.strip():
        raise typer.BadParameter(f"{path} is empty", param_hint="texts")
    return text


def find_pictures(folder: Path) -> tuple[tuple[str, Path], ...]:
    """Names and paths of the pictures in `folder`, in the order of their names.

    Raises:
        typer.BadParameter: It is no folder, or has none.
    """
    try:
        folder = expand_path(folder)
    except OSError as error:
        raise typer.BadParameter(f"{folder}: {error.strerror}", param_hint="pictures") from None
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no folder", param_hint="pictures")
    found = [one for one in sorted(folder.iterdir()) if one.suffix.lower() in PICTURE_SUFFIXES]
    if not found:
        raise typer.BadParameter(
            f"{folder} has no pictures ({', '.join(PICTURE_SUFFIXES)})", param_hint="pictures"
        )
    return tuple((one.name, one) for one in found)
