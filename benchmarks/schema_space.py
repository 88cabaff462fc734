"""Right answers of the demo with and without the space that it learned to begin with.

    python benchmarks/schema_space.py [--pictures N]

Held-out questions about colors, numbers and places, answered freely, and then held to the
answers that occur in each family, after what each row says.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import mlx_smolvlm
from mlx_smolvlm import Sampling
from mlx_smolvlm.constrain import Constraint
from mlx_smolvlm.schema import grammar
from mlx_smolvlm.train.draw import render
from mlx_smolvlm.train.evaluate import held_out

FAMILIES = ("color", "count", "where")
LEADS = {"free": None, "space demanded": " ", "space left to the model": " ?", "no space": ""}


def constraint(vlm: mlx_smolvlm.SmolVLM, answers: list[str], lead: str) -> Constraint:
    """Holds an answer to `answers`, after `lead`, a regular expression."""
    regex = f"{lead}({'|'.join(map(re.escape, answers))})"
    constrainer: Any = vlm.constrainer
    return Constraint(constrainer._tokenizer, grammar(None, regex), "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the space before an answer matter?")
    parser.add_argument("--pictures", type=int, default=60)
    options = parser.parse_args()
    vlm = mlx_smolvlm.load("demo", dtype="float32")
    drawn = [
        (render(scene), turn)
        for scene, turn in held_out(options.pictures)
        if scene is not None and turn.family in FAMILIES
    ]
    answers = {
        family: sorted({turn.answer for _, turn in drawn if turn.family == family})
        for family in FAMILIES
    }
    for name, lead in LEADS.items():
        right = 0
        for picture, turn in drawn:
            sampling = Sampling(max_tokens=60, regex=None if lead is None else ".*")
            stream = vlm.stream(turn.question, images=[picture], sampling=sampling)
            if lead is not None:
                stream._constraint = constraint(vlm, answers[turn.family], lead)
            right += stream.finished().text.strip() == turn.answer
        print(f"{name:24} {right} of {len(drawn)}")


if __name__ == "__main__":
    main()
