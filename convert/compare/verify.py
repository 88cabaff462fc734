"""A converted checkpoint compared with its source, and what was found kept beside it."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_smolvlm.convert.compare.measure import CompareOptions, compare_opened
from mlx_smolvlm.convert.compare.plot import plot_png
from mlx_smolvlm.convert.compare.report import Comparison, card_section
from mlx_smolvlm.convert.open_model import FolderReader, SourceReader
from mlx_smolvlm.convert.run import Progress
from mlx_smolvlm.convert.source import Source, open_source
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import remove_leftovers, write_file
from mlx_smolvlm.records import read_json, read_record

VERIFY_FILE = "verify.json"
VERIFY_PLOT = "verify.png"


def verify_conversion(
    source: str | Path | Source,
    folder: Path,
    options: CompareOptions | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """How far the converted `folder` lies from the weights of `source`, which become no file.

    `VERIFY_FILE` and `VERIFY_PLOT` are written into `folder`.

    Args:
        source: What was converted, as `convert_checkpoint` takes it; packed weights are unpacked.
        folder: The result, in this package's format.
        options: Texts, pictures and questions.
        offline: Take a hub id from the local cache alone.
        progress: Called with the steps done, the steps in all, and the step that begins.

    Raises:
        CheckpointError: One cannot be read, or `folder` was made from something else.
        MediaError: A picture cannot be opened.
    """
    source = open_source(source, offline)
    reference = SourceReader(source)
    name = folder.resolve().name  # what is published should not tell where it was made
    options = options or CompareOptions()
    found = compare_opened(reference, FolderReader(folder, name), options, progress)
    source.check_unchanged()
    remove_leftovers(folder)
    write_file(folder / VERIFY_PLOT, plot_png(found), follow_links=False)
    text = json.dumps(found.to_dict(), indent=2) + "\n"
    write_file(folder / VERIFY_FILE, text, follow_links=False)
    return found


def read_verification(folder: Path) -> Comparison | None:
    """What `verify_conversion` found of `folder`; None if it was never asked.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / VERIFY_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    values.pop("kl_edges_nats", None)  # `Comparison.to_dict` adds them for people who plot
    try:
        return read_record(Comparison, values)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; verify the checkpoint again") from None


def verification_section(folder: Path) -> str | None:
    """The section of a model card about what `folder` lost; None if it was never measured.

    Raises:
        CheckpointError: As `read_verification`.
    """
    found = read_verification(folder)
    if found is None:
        return None
    plot = VERIFY_PLOT if (folder / VERIFY_PLOT).is_file() else None
    try:
        return card_section(found, plot)
    except (ArithmeticError, ValueError):  # such as a perplexity of 0, or a matrix of no model
        path = folder / VERIFY_FILE
        raise CheckpointError(f"{path} is damaged; verify the checkpoint again") from None
