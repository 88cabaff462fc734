"""Count right answers of the demo with and without the leading space that it was trained with.

    python -m benchmarks.schema_space [--items N]

Held-out questions about colors, numbers and places are answered freely, and then constrained to
the answers of each family, with the leading space that each row names.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import mlx_smolvlm
from demo_recipe.evaluate import make_cases
from mlx_smolvlm import Sampling
from mlx_smolvlm.generate.grammar import Constraint
from mlx_smolvlm.generate.json_schema import make_grammar

FAMILIES = ("color", "count", "where")
LEADS = {"free": None, "space demanded": " ", "space left to the model": " ?", "no space": ""}


def make_constraint(vlm: mlx_smolvlm.SmolVLM, answers: list[str], lead: str) -> Constraint:
    """Return a constraint to one of `answers` after the regular expression `lead`."""
    regex = f"{lead}({'|'.join(map(re.escape, answers))})"
    constrainer: Any = vlm.engine.constrainer
    return Constraint(constrainer._tokenizer, make_grammar(None, regex), "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the space before an answer matter?")
    parser.add_argument("--items", type=int, default=60, help="questions of a family")
    options = parser.parse_args()
    vlm = mlx_smolvlm.load("demo", dtype="float32")
    asked = list(make_cases("shapes", options.items, families=FAMILIES))
    answers = {
        family: sorted({case.answer for case in asked if case.family == family})
        for family in FAMILIES
    }
    for name, lead in LEADS.items():
        right = 0
        for case in asked:
            sampling = Sampling(max_tokens=60, regex=None if lead is None else ".*")
            stream = vlm.stream(case.messages, images=case.pictures, sampling=sampling)
            if lead is not None:
                stream._constraint = make_constraint(vlm, answers[case.family], lead)
            right += stream.finish().text.strip() == case.answer
        print(f"{name:24} {right} of {len(asked)}")


if __name__ == "__main__":
    main()
