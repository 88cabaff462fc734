"""Held-out exact match of a checkpoint on drawn pictures and clips, by family of questions.

python -m mlx_smolvlm.train.evaluate FOLDER [--pictures N] [--clips N] [--detail high|low]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import mlx_smolvlm as smolvlm
from mlx_smolvlm.image import Detail
from mlx_smolvlm.train.clip_questions import makers_of
from mlx_smolvlm.train.clips import Clip
from mlx_smolvlm.train.draw import Scene, render, sample_scene
from mlx_smolvlm.train.film import write_mp4
from mlx_smolvlm.train.questions import MAKERS, Turn, casual, small_talk
from mlx_smolvlm.train.sample_clips import sample_clip

HELD_OUT_SEED = 9_000_000_000_000  # training seeds stay below: 10**9 * seed + a stage and a step
HELD_OUT_CLIPS_SEED = HELD_OUT_SEED + 10**9


@dataclass(frozen=True)
class Case:
    """A question on one picture or clip (None: neither) and what was answered."""

    shown: Image.Image | Clip | None
    shapes: int
    turn: Turn
    answer: str

    @property
    def right(self) -> bool:
        """Whether the answer is the true one, to the letter."""
        return self.answer == self.turn.answer


def held_out(pictures: int, least: int = 1, most: int = 4) -> Iterator[tuple[Scene | None, Turn]]:
    """One question of each family on each of `pictures` scenes of `least` to `most` shapes."""
    for number in range(pictures):
        rng = np.random.default_rng(HELD_OUT_SEED + number)
        scene = sample_scene(rng, least + number % (most - least + 1))
        for maker, _ in MAKERS:
            yield scene, casual(maker(scene, rng), rng)
        if number % 4 == 0:
            yield None, small_talk(rng)


def answers(
    vlm: smolvlm.SmolVLM, cases: Iterator[tuple[Scene | None, Turn]], detail: Detail = "high"
) -> Iterator[Case]:
    """Greedy answers of `vlm` to `cases`, each question alone in its conversation."""
    sampling = smolvlm.Sampling(max_tokens=96)
    for scene, turn in cases:
        picture = render(scene) if scene else None
        images = [picture] if picture else []
        reply = vlm.ask(turn.question, images=images, sampling=sampling, detail=detail)
        yield Case(picture, len(scene.shapes) if scene else 0, turn, reply.text)


def held_out_clips(clips: int) -> Iterator[tuple[Clip, list[Turn]]]:
    """`clips` clips of two to eight seconds, with one question of each family that fits."""
    for number in range(clips):
        rng = np.random.default_rng(HELD_OUT_CLIPS_SEED + number)
        clip = sample_clip(rng)
        yield clip, [casual(maker(clip, rng), rng) for maker, _ in makers_of(clip)]


def clip_answers(vlm: smolvlm.SmolVLM, cases: Iterable[tuple[Clip, list[Turn]]]) -> Iterator[Case]:
    """Greedy answers of `vlm` to `cases`: each clip is encoded to a file and asked about alone."""
    sampling = smolvlm.Sampling(max_tokens=96)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for clip, turns in cases:
            write_mp4(clip, path)
            for turn in turns:
                reply = vlm.ask(turn.question, videos=[path], sampling=sampling)
                yield Case(clip, len(clip.shapes), turn, reply.text)


def by_family(cases: Sequence[Case]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each family."""
    asked = Counter(case.turn.family for case in cases)
    right = Counter(case.turn.family for case in cases if case.right)
    return {family: (right[family], asked[family]) for family in sorted(asked)}


def main() -> None:
    """Print a table of families for pictures and for clips and, if asked, the wrong answers."""
    parser = argparse.ArgumentParser(description="Held-out exact match by family of questions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--detail", choices=("high", "low"), default="high")
    parser.add_argument("--least", type=int, default=1, help="shapes in a picture")
    parser.add_argument("--most", type=int, default=4, help="shapes in a picture")
    parser.add_argument("--dtype", default=None, help="cast the weights, as in float32")
    parser.add_argument("--wrong", type=int, default=0, help="print so many wrong answers")
    options = parser.parse_args()
    vlm = smolvlm.load(options.folder, dtype=options.dtype)
    drawn = held_out(options.pictures, options.least, options.most)
    _report("pictures", list(answers(vlm, drawn, options.detail)), options.wrong)
    _report("clips", list(clip_answers(vlm, held_out_clips(options.clips))), options.wrong)


def _report(title: str, cases: list[Case], wrong: int) -> None:
    """Print the table of `cases`, and `wrong` wrong answers."""
    if cases:
        print(title)
    for family, (right, asked) in by_family(cases).items():
        print(f"{family:<14} {right:>4} / {asked:<4} {100 * right / asked:5.1f} %")
    for case in [case for case in cases if not case.right][:wrong]:
        print(f"{case.shapes} shapes | {case.turn.question} | {case.turn.answer} | {case.answer}")


if __name__ == "__main__":
    main()
