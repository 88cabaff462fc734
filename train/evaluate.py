"""Held-out exact match of a checkpoint on drawn pictures, by family of questions.

python -m mlx_smolvlm.train.evaluate FOLDER [--pictures N] [--detail high|low] [--most N]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import mlx_smolvlm as smolvlm
from mlx_smolvlm.image import Detail
from mlx_smolvlm.train.draw import Scene, render, sample_scene
from mlx_smolvlm.train.questions import MAKERS, Turn, casual, small_talk

HELD_OUT_SEED = 9_000_000_000_000  # training seeds stay below: 10**9 * seed + a stage and a step


@dataclass(frozen=True)
class Case:
    """A question on one picture (None: no picture) and what was answered."""

    picture: Image.Image | None
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


def by_family(cases: list[Case]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each family."""
    asked = Counter(case.turn.family for case in cases)
    right = Counter(case.turn.family for case in cases if case.right)
    return {family: (right[family], asked[family]) for family in sorted(asked)}


def main() -> None:
    """Print a table of families and, if asked, the wrong answers."""
    parser = argparse.ArgumentParser(description="Held-out exact match by family of questions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--detail", choices=("high", "low"), default="high")
    parser.add_argument("--least", type=int, default=1, help="shapes in a picture")
    parser.add_argument("--most", type=int, default=4, help="shapes in a picture")
    parser.add_argument("--dtype", default=None, help="cast the weights, as in float32")
    parser.add_argument("--wrong", type=int, default=0, help="print so many wrong answers")
    options = parser.parse_args()
    vlm = smolvlm.load(options.folder, dtype=options.dtype)
    drawn = held_out(options.pictures, options.least, options.most)
    cases = list(answers(vlm, drawn, options.detail))
    for family, (right, asked) in by_family(cases).items():
        print(f"{family:<12} {right:>4} / {asked:<4} {100 * right / asked:5.1f} %")
    for case in [case for case in cases if not case.right][: options.wrong]:
        print(f"{case.shapes} shapes | {case.turn.question} | {case.turn.answer} | {case.answer}")


if __name__ == "__main__":
    main()
