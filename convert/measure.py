"""Two checkpoints of one tokenizer compared: predictions, pictures, answers, matrices.

They are loaded one after the other. Beside the one at hand, the reference's output head and
vision encoder are in memory, and the last hidden states of the texts.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path

import mlx.core as mx

from mlx_smolvlm.convert.compare_options import CompareOptions
from mlx_smolvlm.convert.comparison import Comparison, Side, token_loss
from mlx_smolvlm.convert.differences import (
    all_predictions,
    answer_pairs,
    decoder_losses,
    matrix_losses,
    matrix_paths,
    picture_losses,
    surprises,
)
from mlx_smolvlm.convert.observe import observe
from mlx_smolvlm.convert.opened import Opened, OpenedFolder
from mlx_smolvlm.convert.run import Progress
from mlx_smolvlm.convert.scoring import judge, read_data, task_scores
from mlx_smolvlm.convert.weights import entries
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.hub import ResolveOptions, resolve
from mlx_smolvlm.media import Medium
from mlx_smolvlm.messages import read_request
from mlx_smolvlm.smolvlm import SmolVLM


def compare(
    reference: str | Path,
    other: str | Path,
    options: CompareOptions | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """How far the checkpoint `other` lies from `reference`.

    Args:
        reference: As `load` takes it: a folder, a hub id, an alias, or "demo".
        other: Likewise, with the same tokenizer.
        options: Texts, pictures and questions.
        offline: Never use the network.
        progress: Called with the steps done, the steps in all, and the step that begins.

    Raises:
        CheckpointError: One cannot be found, converted or read, or their tokenizers differ.
        MediaError: A picture cannot be opened.
    """
    how = ResolveOptions(offline=offline)
    sides = [OpenedFolder(resolve(one, how), str(one)) for one in (reference, other)]
    return compare_opened(sides[0], sides[1], options or CompareOptions(), progress)


def compare_opened(
    reference: Opened, other: Opened, options: CompareOptions, progress: Progress | None = None
) -> Comparison:
    """How far `other` lies from `reference`; arguments and errors as in `compare`."""
    check_tokenizers(reference, other)
    data = read_data(options.data, options.data_limit)
    work, lines = options.work(), 0 if data is None else len(data.chosen)
    steps = 2 * (work.steps + lines) + 1 + len(matrix_paths(reference, other))
    tally = _Tally(progress, steps)
    vlm = reference.load()
    a, scores = observe(vlm, work, tally), judge(vlm, data, tally)
    del vlm
    _free()
    vlm = other.load()
    b = observe(vlm, work, tally, a.answers)
    tasks = task_scores(scores, judge(vlm, data, tally))
    found, texts = all_predictions(a, b), a.num_texts
    strange = surprises(a, found, vlm.engine.prompt_builder.tokenizer.decode)
    answers = answer_pairs(work.asked, a, b)
    tally("pictures")
    features, layers = picture_losses(a, b, _opened(vlm, options))
    layers = (*decoder_losses(a, b), *layers)
    del vlm, a, b
    _free()
    return Comparison(
        reference=_side(reference),
        other=_side(other),
        texts=token_loss(found[:texts]),
        answers_forced=token_loss(found[texts:]),
        features=features,
        layers=layers,
        matrices=matrix_losses(reference, other, tally),
        answers=answers,
        surprises=strange,
        tasks=tasks,
        peak_memory_gb=tally.peak_memory_gb,
    )


def _opened(vlm: SmolVLM, options: CompareOptions) -> tuple[Medium, ...]:
    """The pictures of `options`, ready to be cut into tiles."""
    pictures = [picture for _, picture in options.named_pictures]
    return vlm.engine.open_media(read_request("", pictures, (), None), options.detail)


def check_tokenizers(reference: Opened, other: Opened) -> None:
    """Refuse checkpoints whose tokens are not the same.

    Raises:
        CheckpointError: It names both.
    """
    sizes = [one.config.text.vocab_size for one in (reference, other)]
    if sizes[0] != sizes[1] or reference.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise CheckpointError(
            f"{reference.name} and {other.name} have different tokenizers, so their predictions "
            "cannot be compared"
        )


class _Tally:
    """Counts steps, and tells `progress` of each as it begins.

    Every answer starts MLX's count of the most memory anew, so it is looked at before each step.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._peak = 0
        mx.reset_peak_memory()

    @property
    def peak_memory_gb(self) -> float:
        """The most that MLX held until now, in 10**9 bytes."""
        self._peak = max(self._peak, mx.get_peak_memory())
        return self._peak / 1e9

    def __call__(self, name: str) -> None:
        self._peak = max(self._peak, mx.get_peak_memory())
        if self._progress is not None:
            self._progress(self._done, self._total, name)
        self._done += 1


def _free() -> None:
    """Let go of a model that nothing needs any more."""
    gc.collect()
    mx.clear_cache()


def _side(opened: Opened) -> Side:
    """Name and size."""
    count = sum(
        math.prod(shape) + (shape[0] if entry.bias else 0)
        for entry in entries(opened.config)
        for shape in entry.shapes
    )
    return Side(opened.name, opened.nbytes, 8 * opened.nbytes / count)
