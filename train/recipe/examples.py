"""The pictures and clips of `examples/`, drawn from seeds that no training run uses.

    python -m mlx_smolvlm.train.recipe.examples examples [--pick FOLDER]

`--pick` writes nothing: it prints, for each of them, the first number from the one below on
with which the checkpoint in FOLDER gives every answer.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import mlx_smolvlm as smolvlm
from mlx_smolvlm.train.recipe import words
from mlx_smolvlm.train.recipe.clips import Clip, Event
from mlx_smolvlm.train.recipe.draw import render, sample_scene
from mlx_smolvlm.train.recipe.example_questions import PLAIN, asked, asked_of_clip, asked_of_drawn
from mlx_smolvlm.train.recipe.film import write_mp4
from mlx_smolvlm.train.recipe.items import Turn, text_of
from mlx_smolvlm.train.recipe.lexicon import HELD_OUT
from mlx_smolvlm.train.recipe.sample_clips import sample_clip
from mlx_smolvlm.train.recipe.topics import TOPICS

SEED = 8_000_000_000_000
# Number of the seed and of the shapes, by the picture's name.
SHAPES = {
    "one.png": (1000, 1),
    "two.png": (2001, 2),
    "three.png": (3000, 3),
    "four.png": (4021, 4),
}
# Number of the seed, topic, width and height, and what the answer to the first question should
# match, by the picture's name.
DRAWN = {
    "word.png": (11004, "words", (240, 160), "|".join(HELD_OUT)),
    "chart.png": (12000, "charts", (240, 200), ".* [45] bars."),
    "objects.png": (13003, "objects", (240, 240), r"An? \w+, an? \w+ and an? \w+\."),
    "page.png": (14004, "pages", (300, 400), "(?s).*<title>.*<unordered_list>.*"),
}
PICTURES = (*SHAPES, *DRAWN)
# Number of the seed, event and how many frames are sampled, by the clip's name.
CLIPS: dict[str, tuple[int, Event, int]] = {
    "left.mp4": (5028, "moves", 4),
    "up.mp4": (6742, "moves", 5),
    "colors.mp4": (7015, "shape turns", 6),
    "still.mp4": (8010, "stays", 3),
}
NUMBERS = {
    **{name: number for name, (number, _) in SHAPES.items()},
    **{name: number for name, (number, *_) in DRAWN.items()},
    **{name: number for name, (number, _, _) in CLIPS.items()},
}
_TRIED = 1000  # numbers of a seed to pick from
_HEAD = """\
# Examples

Pictures and clips for the bundled demo checkpoint, drawn in code from seeds that it was
not trained on (`python -m mlx_smolvlm.train.recipe.examples examples` draws them again), with
questions and their true answers. The demo gives each of these answers; the pictures and
clips were picked for that, so they say nothing of how often it is right (see
[train/README.md](../train/README.md)).

```
mlx-smolvlm chat "What is in this picture?" -i examples/three.png -m demo
mlx-smolvlm chat "What does it say?" -i examples/word.png -m demo
mlx-smolvlm chat "What happens in this video?" -v examples/left.mp4 -m demo
```
"""


@dataclass(frozen=True)
class Example:
    """A picture or a clip, with good questions about it and the true answers."""

    shown: Image.Image | Clip
    turns: list[Turn]


def example(name: str, further: int = 0) -> Example:
    """One of `PICTURES` or `CLIPS`, or what it is with a number of the seed that much further."""
    rng = np.random.default_rng(SEED + NUMBERS[name] + further)
    if name in CLIPS:
        _, event, sampled = CLIPS[name]
        clip = sample_clip(rng, sampled, event)
        return Example(clip, asked_of_clip(clip))
    if name in SHAPES:
        scene = sample_scene(rng, SHAPES[name][1])
        return Example(render(scene), asked(scene))
    _, topic, size, _ = DRAWN[name]
    if topic == "words":
        drawn = words.sample(rng, size, heldout=True)
    else:
        drawn = TOPICS[topic].sample(rng, size)
    return Example(drawn.picture, asked_of_drawn(drawn, topic))


def told(turn: Turn) -> str:
    """A question with its answer as examples/README.md shows them, a row of a table or a block."""
    question, answer = text_of(turn.question), text_of(turn.answer)
    if "\n" in answer:
        return f"{question}\n```\n{answer}\n```"
    return f"| {question} | {answer} |"


def write(folder: Path) -> None:
    """Write the pictures, the clips and their README to `folder`."""
    folder.mkdir(exist_ok=True)
    sections = [_HEAD]
    for name in (*PICTURES, *CLIPS):
        made = example(name)
        if isinstance(made.shown, Clip):
            clip = made.shown
            write_mp4(clip, folder / name)
            size = f"{clip.width} x {clip.height} pixels, {clip.fps:g} frames a second"
            shown = f"[{name}]({name}): {clip.duration_s:.1f} s, {size}."
        else:
            made.shown.save(folder / name, optimize=True)
            answers = (text_of(turn.answer) for turn in made.turns)
            alt = next(answer for answer in answers if "\n" not in answer)
            shown = f"![{alt}]({name})"
        lines = [told(turn) for turn in made.turns]
        rows = ["| Question | Answer |", "|---|---|", *(row for row in lines if row[0] == "|")]
        blocks = [f"\n{block}" for block in lines if block[0] != "|"]
        sections.append("\n".join([f"## {name}\n", f"{shown}\n", *rows, *blocks]) + "\n")
    (folder / "README.md").write_text("\n".join(sections))


def is_answered(vlm: smolvlm.SmolVLM, made: Example) -> bool:
    """Whether `vlm` gives every answer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        if isinstance(made.shown, Clip):
            write_mp4(made.shown, path)
        pictures = [] if isinstance(made.shown, Clip) else [made.shown]
        clips = [path] if isinstance(made.shown, Clip) else []
        return all(
            vlm.ask(text_of(turn.question), images=pictures, videos=clips).text
            == text_of(turn.answer)
            for turn in made.turns
        )


def is_telling(name: str, made: Example) -> bool:
    """Whether a picture that is to be picked for `name` shows what the example is for."""
    if name not in DRAWN:
        return True
    _, topic, _, wanted = DRAWN[name]
    first = text_of(made.turns[0].answer)
    return len(made.turns) == len(PLAIN[topic]) and re.fullmatch(wanted, first) is not None


def pick(vlm: smolvlm.SmolVLM, name: str) -> int | None:
    """The first number of the seed with which `vlm` gives every answer about `name`."""
    for further in range(_TRIED):
        made = example(name, further)
        if is_telling(name, made) and is_answered(vlm, made):
            return NUMBERS[name] + further
    return None


def main() -> None:
    """Write the examples, or pick them."""
    parser = argparse.ArgumentParser(description="Draw the examples.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pick", type=Path, help="a checkpoint to pick the numbers for")
    options = parser.parse_args()
    if options.pick is None:
        write(options.folder)
        return
    vlm = smolvlm.load(options.pick)
    for name in (*PICTURES, *CLIPS):
        print(name, pick(vlm, name), flush=True)


if __name__ == "__main__":
    main()
