"""The pictures and clips of `examples/`, drawn from seeds that no training run uses.

python -m mlx_smolvlm.train.examples examples
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mlx_smolvlm.train import clip_questions as asking
from mlx_smolvlm.train.clips import Clip, Event
from mlx_smolvlm.train.draw import Scene, render, sample_scene
from mlx_smolvlm.train.film import write_mp4
from mlx_smolvlm.train.questions import (
    AT,
    BACKGROUND,
    COLOR,
    COUNT,
    DESCRIBE,
    EXISTS,
    WHAT,
    WHERE,
    Turn,
    article,
    contents,
    description,
    name,
    unique,
)
from mlx_smolvlm.train.sample_clips import sample_clip

SEED = 8_000_000_000_000
# Number of the seed and of the shapes, by the picture's name.
PICTURES = {
    "one.png": (1000, 1),
    "two.png": (2001, 2),
    "three.png": (3000, 3),
    "four.png": (4021, 4),
}
# Number of the seed, event and how many frames are sampled, by the clip's name.
CLIPS: dict[str, tuple[int, Event, int]] = {
    "left.mp4": (5028, "moves", 4),
    "up.mp4": (6742, "moves", 5),
    "colors.mp4": (7015, "shape turns", 6),
    "still.mp4": (8010, "stays", 3),
}


def example(picture: str) -> Scene:
    """The scene of one of `PICTURES`."""
    number, shapes = PICTURES[picture]
    return sample_scene(np.random.default_rng(SEED + number), shapes)


def asked(scene: Scene) -> list[Turn]:
    """Good questions about `scene`, in their plainest wording, with the true answers."""
    first, last = scene.shapes[0], scene.shapes[-1]
    turns = [
        Turn("what", WHAT[0], contents(scene)),
        Turn("describe", DESCRIBE[0], description(scene)),
        Turn("count", COUNT[0].format("shapes"), f"{len(scene.shapes)}."),
        Turn("exists", EXISTS[0].format(article(name(first))), "Yes."),
        Turn("at", AT[0].format(last.place), f"{article(name(last)).capitalize()}."),
        Turn("background", BACKGROUND[0], f"{scene.background.capitalize()}."),
    ]
    for shape in unique(scene, "kind")[:1]:
        place = f"{shape.place[0].upper()}{shape.place[1:]}."
        turns.append(Turn("color", COLOR[0].format(shape.kind), f"{shape.color.capitalize()}."))
        turns.append(Turn("where", WHERE[0].format(shape.kind), place))
    return turns


def example_clip(name: str) -> Clip:
    """One of `CLIPS`."""
    number, event, sampled = CLIPS[name]
    return sample_clip(np.random.default_rng(SEED + number), sampled, event)


def asked_of_clip(clip: Clip) -> list[Turn]:
    """Good questions about `clip`, in their plainest wording, with the true answers."""
    turns = [
        Turn("happens", asking.HAPPENS[0], f"{asking.event(clip)}."),
        Turn("happens", asking.HAPPENS[1], f"{asking.event(clip)}."),
        Turn("story", asking.STORY[0], asking.story(clip)),
    ]
    first = clip.shapes[0]
    if clip.paints:
        start, end = clip.colors[0].capitalize(), clip.colors[-1].capitalize()
        order = asking.colors_in_order(clip).capitalize()
        turns += [
            Turn("order", asking.ORDER[0], f"{order}."),
            Turn("ends", asking.FIRST[0], f"{start}."),
            Turn("ends", asking.LAST[0], f"{end}."),
            Turn("ends", asking.AT_LAST[0].format(first.kind), f"{end}."),
        ]
    else:
        moves = clip.motion != "none"
        mover = f"{article(name(first)).capitalize()}." if moves else "Nothing."
        turns += [
            Turn("mover", asking.MOVER[0], mover),
            Turn("moves", asking.MOVES[0].format(f"the {first.kind}"), "Yes." if moves else "No."),
        ]
    for shape in unique(clip.scene(0), "kind"):
        way = asking.way(clip, shape)
        turns.append(Turn("direction", asking.DIRECTION[0].format(f"the {shape.kind}"), way))
    return turns


def main() -> None:
    """Write the pictures, the clips and their README."""
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    lines = [
        "# Examples",
        "",
        "Pictures and clips for the bundled demo checkpoint, drawn in code from seeds that it was",
        "not trained on (`python -m mlx_smolvlm.train.examples examples` draws them again), with",
        "questions and their true answers. The demo gives each of these answers; the pictures and",
        "clips were picked for that, so they say nothing of how often it is right (see",
        "[train/README.md](../train/README.md)).",
        "",
        "```",
        'mlx-smolvlm chat "What is in this picture?" -i examples/three.png -m demo',
        'mlx-smolvlm chat "What happens in this video?" -v examples/left.mp4 -m demo',
        "```",
    ]
    for picture in PICTURES:
        scene = example(picture)
        render(scene).save(folder / picture, optimize=True)
        lines += ["", f"## {picture}", "", f"![{contents(scene)}]({picture})", ""]
        lines += _table(asked(scene))
    for file in CLIPS:
        clip = example_clip(file)
        write_mp4(clip, folder / file)
        size = f"{clip.width} x {clip.height} pixels, {clip.fps:g} frames a second"
        lines += ["", f"## {file}", "", f"[{file}]({file}): {clip.duration_s:.1f} s, {size}.", ""]
        lines += _table(asked_of_clip(clip))
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _table(turns: list[Turn]) -> list[str]:
    """Lines of a table of questions and answers."""
    rows = [f"| {turn.question} | {turn.answer} |" for turn in turns]
    return ["| Question | Answer |", "|---|---|", *rows]


if __name__ == "__main__":
    main()
