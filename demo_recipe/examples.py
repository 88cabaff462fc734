"""The pictures and clips of `examples/`, drawn from seeds that no training run uses.

    python -m demo_recipe.examples examples [--pick FOLDER]

`--pick` looks for those about which the checkpoint in FOLDER answers right, and keeps their
numbers in `examples.json`. It also writes the answers in the README.md beside `examples` anew.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import mlx_smolvlm as smolvlm
from demo_recipe import words
from demo_recipe.clips import Clip, Event
from demo_recipe.draw import render, sample_scene
from demo_recipe.example_questions import asked, asked_of_clip, asked_of_drawn
from demo_recipe.film import write_mp4
from demo_recipe.items import Turn, join_parts
from demo_recipe.sample_clips import sample_clip
from demo_recipe.topics import TOPICS

SEED = 8_000_000_000_000
# How many shapes, by the picture's name.
SHAPES = {"one.png": 1, "two.png": 2, "three.png": 3, "four.png": 4}
# Topic, width and height, by the picture's name.
DRAWN = {
    "word.png": ("words", (240, 160)),
    "chart.png": ("charts", (240, 200)),
    "objects.png": ("objects", (240, 240)),
    "page.png": ("pages", (300, 400)),
}
PICTURES = (*SHAPES, *DRAWN)
# Event and how many frames are sampled, by the clip's name.
CLIPS: dict[str, tuple[Event, int]] = {
    "left.mp4": ("moves", 4),
    "up.mp4": ("moves", 5),
    "colors.mp4": ("shape turns", 6),
    "still.mp4": ("stays", 3),
}
PICKED = Path(__file__).with_name("examples.json")
_HEAD = """\
# Examples

Pictures and clips for the bundled demo checkpoint, drawn in code from seeds that it was
not trained on (`python -m demo_recipe.examples examples` draws them again), with
questions and their true answers. The demo gives each of these answers; the pictures and
clips were picked for that, so they say nothing of how often it is right (see
[its card](../mlx_smolvlm/demo/README.md)).

```
mlx-smolvlm chat "What is in this picture?" -i examples/three.png -m demo
mlx-smolvlm chat "What does it say?" -i examples/word.png -m demo
mlx-smolvlm chat "What happens in this video?" -v examples/left.mp4 -m demo
```
"""


@dataclass(frozen=True)
class DemoExample:
    """A picture or a clip, with questions about it and the correct answers."""

    shown: Image.Image | Clip
    turns: list[Turn]

    def answer(self, question: str) -> str:
        """Return the correct answer to one of its questions."""
        return next(join_parts(t.answer) for t in self.turns if join_parts(t.question) == question)


@dataclass(frozen=True)
class Picked:
    """The number in an example's seed, and the questions that are left out of it."""

    number: int
    left_out: tuple[str, ...] = ()


def read_picked(path: Path = PICKED) -> dict[str, Picked]:
    """Read the picked examples, by name."""
    lines = json.loads(path.read_text())
    return {name: Picked(one["number"], tuple(one["left_out"])) for name, one in lines.items()}


def write_picked(picked: dict[str, Picked], path: Path = PICKED) -> None:
    """Write the picked examples."""
    path.write_text(json.dumps({name: vars(one) for name, one in picked.items()}, indent=1) + "\n")


def make_candidate(name: str, number: int) -> DemoExample:
    """Draw candidate `number` for one of `PICTURES` or `CLIPS`, with all questions that fit it."""
    rng = np.random.default_rng([SEED, *name.encode(), number])
    if name in CLIPS:
        event, sampled = CLIPS[name]
        clip = sample_clip(rng, sampled, event)
        return DemoExample(clip, asked_of_clip(clip))
    if name in SHAPES:
        scene = sample_scene(rng, SHAPES[name])
        return DemoExample(render(scene), asked(scene))
    topic, size = DRAWN[name]
    if topic == "words":
        drawn = words.sample(rng, size, heldout=True)
    else:
        drawn = TOPICS[topic].sample(rng, size)
    return DemoExample(drawn.picture, asked_of_drawn(drawn, topic))


def make_example(name: str) -> DemoExample:
    """Return the picked example of one of `PICTURES` or `CLIPS`."""
    picked = read_picked()[name]
    made = make_candidate(name, picked.number)
    kept = [turn for turn in made.turns if join_parts(turn.question) not in picked.left_out]
    return DemoExample(made.shown, kept)


def format_turn(turn: Turn) -> str:
    """Format a question and its answer for examples/README.md, as a table row or a block."""
    question, answer = join_parts(turn.question), join_parts(turn.answer)
    if "\n" in answer:
        return f"{question}\n```\n{answer}\n```"
    return f"| {question} | {answer} |"


def write_examples(folder: Path) -> None:
    """Write the pictures, the clips and their README to `folder`."""
    folder.mkdir(exist_ok=True)
    sections = [_HEAD]
    for name in (*PICTURES, *CLIPS):
        made = make_example(name)
        if isinstance(made.shown, Clip):
            clip = made.shown
            write_mp4(clip, folder / name)
            size = f"{clip.width} x {clip.height} pixels, {clip.fps:g} frames a second"
            shown = f"[{name}]({name}): {clip.duration_s:.1f} s, {size}."
        else:
            made.shown.save(folder / name, optimize=True)
            answers = (join_parts(turn.answer) for turn in made.turns)
            alt = next(answer for answer in answers if "\n" not in answer)
            shown = f"![{alt}]({name})"
        lines = [format_turn(turn) for turn in made.turns]
        rows = ["| Question | Answer |", "|---|---|", *(row for row in lines if row[0] == "|")]
        blocks = [f"\n{block}" for block in lines if block[0] != "|"]
        sections.append("\n".join([f"## {name}\n", f"{shown}\n", *rows, *blocks]) + "\n")
    (folder / "README.md").write_text("\n".join(sections))


def main() -> None:
    """Draw the examples; pick them before, if asked."""
    from demo_recipe.example_pick import pick
    from demo_recipe.transcripts import retell

    parser = argparse.ArgumentParser(description="Draw the examples.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pick", type=Path, help="a checkpoint to pick them for")
    options = parser.parse_args()
    vlm = None if options.pick is None else smolvlm.load(options.pick, dtype="float32")
    if vlm is not None:
        picked = {}
        for name in (*PICTURES, *CLIPS):
            picked[name] = pick(vlm, name)
            print(name, picked[name].number, *picked[name].left_out, sep=" | ", flush=True)
        write_picked(picked)
    write_examples(options.folder)
    readme = options.folder.resolve().parent / "README.md"
    if vlm is not None and readme.exists():
        readme.write_text(retell(readme.read_text(), vlm, readme.parent))


if __name__ == "__main__":
    main()
