"""The pictures of `examples/`, drawn from seeds that no training run uses.

python -m mlx_smolvlm.train.examples examples
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mlx_smolvlm.train.draw import Scene, render, sample_scene
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

SEED = 8_000_000_000_000
# Number of the seed and of the shapes, by the picture's name.
PICTURES = {
    "one.png": (1000, 1),
    "two.png": (2000, 2),
    "three.png": (3000, 3),
    "four.png": (4008, 4),
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


def main() -> None:
    """Write the pictures and their README."""
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    lines = [
        "# Examples",
        "",
        "Pictures for the bundled demo checkpoint, drawn in code from seeds that it was not",
        "trained on (`python -m mlx_smolvlm.train.examples examples` draws them again), with",
        "questions and their true answers. The demo gives each of these answers; the pictures",
        "were picked for that, so they say nothing of how often it is right (see",
        "[train/README.md](../train/README.md)).",
        "",
        "```",
        'mlx-smolvlm chat "What is in this picture?" -i examples/three.png -m demo',
        "```",
    ]
    for picture in PICTURES:
        scene = example(picture)
        render(scene).save(folder / picture, optimize=True)
        lines += ["", f"## {picture}", "", f"![{contents(scene)}]({picture})", ""]
        lines += ["| Question | Answer |", "|---|---|"]
        lines += [f"| {turn.question} | {turn.answer} |" for turn in asked(scene)]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
