"""`mlx-smolvlm compare`: how much two checkpoints differ."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_smolvlm.cli.args import OfflineOption, check_output, decode_text, parse_detail
from mlx_smolvlm.cli.output import ProgressBar, format_table, say, write
from mlx_smolvlm.cli.paths import IMAGE_SUFFIXES
from mlx_smolvlm.files import expand_path, write_output

if TYPE_CHECKING:
    from mlx_smolvlm.convert.compare.measure import CompareOptions
    from mlx_smolvlm.convert.compare.report import Comparison
    from mlx_smolvlm.convert.source import Source
    from mlx_smolvlm.media.tiles import Detail

COMPARE_EPILOG = """\
\b
Examples:
  mlx-smolvlm compare smolvlm-256m ./smolvlm-256m-4bit
  mlx-smolvlm compare ./float ./packed --pictures photos/ --plot lost.png --json lost.json
  mlx-smolvlm compare ./before ./after --data data/test.jsonl --limit 50"""


def compare(
    reference: Annotated[
        str, typer.Argument(metavar="A", help="The reference: a model as in chat.")
    ],
    other: Annotated[
        str, typer.Argument(metavar="B", help="The other model; it must have the same tokenizer.")
    ],
    texts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text to predict; repeats. Default: bundled texts."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pictures to compare on. Default: drawn pictures."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Question about the first pictures, asked in turn; repeats."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="The longest answer, in tokens.")
    ] = 48,
    detail: Annotated[str, typer.Option(metavar="LEVEL", help="As in chat.")] = "low",
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="A dataset to answer, as eval takes one; repeats."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Ask the first N lines of each of its tasks.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the whole comparison to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the comparison as a PNG file.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Compare two checkpoints: predictions, pictures, answers, weights."""
    request = CompareRequest(
        reference=reference,
        other=other,
        inputs=ComparisonInputs(
            tuple(texts) if texts else None, pictures, tuple(data or ()), limit
        ),
        questions=tuple(decode_text("--question", text) for text in question or ()),
        max_tokens=max_tokens,
        detail=parse_detail(detail),
        json=json,
        plot=plot,
        offline=offline,
    )
    print_comparison(request)


@dataclass(frozen=True)
class ComparisonInputs:
    """The texts, pictures and datasets to compare on; None stands for those of the package."""

    texts: tuple[Path, ...] | None = None
    pictures: Path | None = None
    data: tuple[Path, ...] = ()
    limit: int | None = None

    def make_options(
        self, questions: tuple[str, ...] = (), max_tokens: int = 48, detail: Detail = "low"
    ) -> CompareOptions:
        """Read the texts and find the pictures to compare on.

        Raises:
            typer.BadParameter: A file is not text, a folder has no pictures, or a number is
                out of range.
        """
        from mlx_smolvlm.convert.compare.measure import CompareOptions

        try:
            return CompareOptions(
                texts=None if self.texts is None else tuple(map(read_text, self.texts)),
                pictures=None if self.pictures is None else find_pictures(self.pictures),
                questions=questions or CompareOptions().questions,
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
    """The options of `compare`."""

    reference: str
    other: str
    inputs: ComparisonInputs
    questions: tuple[str, ...]
    max_tokens: int
    detail: Detail
    json: Path | None
    plot: Path | None
    offline: bool

    def __post_init__(self) -> None:
        check_output("--json", self.json)
        check_output("--plot", self.plot)


def print_comparison(request: CompareRequest) -> None:
    """Compare two checkpoints, print the result, and write it to files if asked to.

    Raises:
        CheckpointError: A checkpoint cannot be used, or their tokenizers differ.
        MediaError: A picture cannot be opened.
        DatasetError: A dataset cannot be used.
    """
    from mlx_smolvlm.convert.compare.measure import compare as measure

    options = request.inputs.make_options(request.questions, request.max_tokens, request.detail)
    bar = ProgressBar()
    with contextlib.closing(bar):
        comparison = measure(
            request.reference, request.other, options, offline=request.offline, progress=bar.draw
        )
    print_result(comparison)
    if request.json is not None:
        import json

        text = json.dumps(comparison.to_dict(), indent=2) + "\n"
        write_output(request.json, text)
    if request.plot is not None:
        from mlx_smolvlm.convert.compare.plot import draw_plot

        draw_plot(comparison, request.plot)


def verify(source: Source, dest: Path, options: CompareOptions) -> None:
    """Compare a conversion with its source, and print the result.

    Raises:
        CheckpointError: One of the two cannot be used.
        MediaError: A picture cannot be opened.
    """
    from mlx_smolvlm.convert.compare.measure import VERIFY_FILE, VERIFY_PLOT, verify_conversion

    bar = ProgressBar()
    with contextlib.closing(bar):
        comparison = verify_conversion(source, dest, options, progress=bar.draw)
    print_result(comparison)
    say(f"wrote {dest / VERIFY_FILE} and {VERIFY_PLOT}")


def print_result(comparison: Comparison) -> None:
    """Print a table of differences, and the answers that differ."""
    from mlx_smolvlm.convert.compare.report import format_differences, make_summary_rows

    write(format_table(list(make_summary_rows(comparison))))
    if lines := list(format_differences(comparison)):
        write("\n" + "\n".join(lines) + "\n")


def read_text(path: Path) -> str:
    """Return the text in the file at `path`.

    Raises:
        typer.BadParameter: It cannot be read, is not text, or is empty.
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
    """Return the names and paths of the pictures in `folder`, sorted by name.

    Raises:
        typer.BadParameter: It is not a folder, or has no pictures.
    """
    try:
        folder = expand_path(folder)
    except OSError as error:
        raise typer.BadParameter(f"{folder}: {error.strerror}", param_hint="pictures") from None
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder", param_hint="pictures")
    pictures = [one for one in sorted(folder.iterdir()) if one.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        raise typer.BadParameter(
            f"{folder} has no pictures ({', '.join(IMAGE_SUFFIXES)})", param_hint="pictures"
        )
    return tuple((one.name, one) for one in pictures)
