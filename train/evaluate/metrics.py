"""How right an answer is, from 0 to 1, by the metrics of published benchmarks.

docs/evaluation.md says in words what each one accepts, and where it differs from its source.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Metric = Literal["exact", "normalized", "anls", "relaxed", "choices", "letter"]
METRICS: tuple[Metric, ...] = get_args(Metric)

ANLS_THRESHOLD = 0.5
TOLERANCE = 0.05

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:e[-+]?\d{1,2})?", re.I | re.A)
_LETTER = re.compile(r"\s*(?:(?:the )?answer(?: is)?\s*:?\s*)?[\W_]*([a-z])(?![^\W_])", re.I)


def check_metric(name: str) -> Metric:
    """The metric called `name`.

    Raises:
        ValueError: There is none.
    """
    for metric in METRICS:
        if name == metric:
            return metric
    raise ValueError(f"metric is {name!r}; it must be one of {', '.join(METRICS)}")


def score(metric: Metric, answer: str, accepted: Sequence[str]) -> float:
    """How right `answer` is by `metric`, 0 to 1: the best over the `accepted` answers."""
    judge = _JUDGES[metric]
    return max(float(judge(answer, one)) for one in accepted)


def match_exact(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one to the letter."""
    return answer == expected


def match_normalized(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one but for case, punctuation and spaces.

    Source: SQuAD, https://arxiv.org/abs/1606.05250, section 6.1; articles stay here.
    """
    want = normalize(expected)
    return normalize(answer) == want if want else match_exact(answer, expected)


def normalize(text: str) -> str:
    """`text` in lower case, without punctuation outside of numbers, with single spaces.

    A mark between two digits and a minus before a number stay: 3.5 is not 35.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = (one for i, one in enumerate(text) if not _is_mark(text, i))
    return " ".join("".join(kept).split())


def _is_mark(text: str, at: int) -> bool:
    """Whether a punctuation mark that is no part of a number stands at `at`."""
    if not unicodedata.category(text[at]).startswith("P"):
        return False
    before, after = text[at - 1 : at] or " ", text[at + 1 : at + 2]
    begins = text[at] == "-" and before.isspace()
    return not (after.isdigit() and (before.isdigit() or begins))


def compute_anls(answer: str, expected: str) -> float:
    """1 less the edit distance over the longer length, or 0 if that is below 0.5.

    Case and runs of spaces do not count.

    Source: https://arxiv.org/abs/1907.00490, equation 1, and DocVQA,
    https://arxiv.org/abs/2007.00398; exactly half counts, as in the benchmark's own script
    (https://rrc.cvc.uab.es/?ch=17).
    """
    first, second = (" ".join(text.lower().split()) for text in (answer, expected))
    longest = max(len(first), len(second))
    similarity = 1 - count_edits(first, second) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def count_edits(first: str, second: str) -> int:
    """The fewest insertions, deletions and replacements of characters between the two.

    Source: the table of Wagner and Fischer, https://doi.org/10.1145/321796.321811, a row at
    a time.
    """
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def match_relaxed(answer: str, expected: str) -> bool:
    """Whether the answer is within 5 % of the expected number, or is the expected text.

    A full stop at the end, commas between thousands and the case of texts do not count.

    Source: ChartQA, https://arxiv.org/abs/2203.10244, section 5.1. As in its usual script a
    percentage is a hundredth, so 50% is 0.5; of 0, nothing but 0 is within 5 %.
    """
    first, second = parse_number(answer), parse_number(expected)
    if first is not None and second is not None:
        # Of decimal fractions, the bound itself may be missed by a rounding error.
        return abs(first - second) <= TOLERANCE * abs(second) * (1 + 1e-9)
    return _strip_text(answer).lower() == _strip_text(expected).lower()


def parse_number(text: str) -> float | None:
    """The number that `text` is, a percentage as a fraction; None if it is none."""
    text = _strip_text(text).replace("\N{MINUS SIGN}", "-")
    digits = text.removesuffix("%").rstrip()
    if not re.search(r"\d", digits, re.ASCII) or not _NUMBER.fullmatch(digits):
        return None
    try:
        value = float(digits.replace(",", ""))
    except ValueError:  # an exponent alone
        return None
    return value / 100 if text.endswith("%") else value


def _strip_text(text: str) -> str:
    """`text` without spaces around it and a full stop at its end."""
    return text.strip().removesuffix(".").rstrip()


def match_letter(answer: str, expected: str) -> bool:
    """Whether both begin with the letter of the same option.

    Source: the accuracy of multiple choice by option letter, as in MMMU,
    https://arxiv.org/abs/2311.16502, section 4.1, but from the beginning of the answer alone.
    """
    letter = find_option_letter(answer)
    return letter is not None and letter == find_option_letter(expected)


def find_option_letter(text: str) -> str | None:
    """The letter, as a capital, that `text` begins with: "B", "(b) a cat", "Answer: B.".

    It has to stand alone; None if the text begins with a word.
    """
    match = _LETTER.match(text)
    return match[1].upper() if match else None


_JUDGES: dict[Metric, Callable[[str, str], float]] = {
    "exact": match_exact,
    "normalized": match_normalized,
    "anls": compute_anls,
    "relaxed": match_relaxed,
    "choices": match_exact,
    "letter": match_letter,
}
