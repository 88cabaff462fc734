"""Metrics of published benchmarks, which score an answer from 0 to 1.

docs/evaluation.md describes what each accepts and where it differs from its source.
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
    """Return `name` as a `Metric`.

    Raises:
        ValueError: There is no such metric.
    """
    for metric in METRICS:
        if name == metric:
            return metric
    raise ValueError(f"metric is {name!r}; it must be one of {', '.join(METRICS)}")


def score(metric: Metric, answer: str, accepted: Sequence[str]) -> float:
    """Return the score of `answer`, 0 to 1: the highest over the `accepted` answers."""
    compare = _COMPARISONS[metric]
    return max(float(compare(answer, one)) for one in accepted)


def match_exact(answer: str, expected: str) -> bool:
    """Whether both texts are equal."""
    return answer == expected


def match_normalized(answer: str, expected: str) -> bool:
    """Whether both texts are equal apart from case, punctuation and spaces.

    An expected text that is all punctuation is compared exactly.

    Source: SQuAD, https://arxiv.org/abs/1606.05250, section 6.1; unlike there, articles count.
    """
    normal = normalize(expected)
    return normalize(answer) == normal if normal else match_exact(answer, expected)


def normalize(text: str) -> str:
    """Return `text` in lower case, without punctuation, with single spaces.

    A mark between two digits and a minus before a number stay, so that 3.5 is not 35.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    without_marks = (one for i, one in enumerate(text) if not _is_mark(text, i))
    return " ".join("".join(without_marks).split())


def _is_mark(text: str, at: int) -> bool:
    """Whether `text[at]` is a punctuation mark outside of a number."""
    if not unicodedata.category(text[at]).startswith("P"):
        return False
    before, after = text[at - 1 : at] or " ", text[at + 1 : at + 2]
    is_minus = text[at] == "-" and before.isspace()
    return not (after.isdigit() and (before.isdigit() or is_minus))


def compute_anls(answer: str, expected: str) -> float:
    """Return 1 - edit distance / longer length, or 0 if that is below 0.5.

    Case and the number of spaces in a row do not count.

    Source: https://arxiv.org/abs/1907.00490, equation 1, and DocVQA,
    https://arxiv.org/abs/2007.00398. A similarity of exactly 0.5 counts, as in the benchmark's
    script (https://rrc.cvc.uab.es/?ch=17).
    """
    first, second = (" ".join(text.lower().split()) for text in (answer, expected))
    longest = max(len(first), len(second))
    similarity = 1 - count_edits(first, second) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def count_edits(first: str, second: str) -> int:
    """Return the edit distance: the fewest insertions, deletions and replacements of characters.

    Source: Wagner and Fischer, https://doi.org/10.1145/321796.321811; here with one row of the
    table in memory.
    """
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def match_relaxed(answer: str, expected: str) -> bool:
    """Whether the answer is within 5 % of the expected number, or equals the expected text.

    A full stop at the end, commas between thousands and case do not count. 50% is 0.5, as in the
    benchmark's usual script; if 0 is expected, only 0 matches.

    Source: ChartQA, https://arxiv.org/abs/2203.10244, section 5.1.
    """
    first, second = parse_number(answer), parse_number(expected)
    if first is not None and second is not None:
        # 1e-9 allows for rounding errors of decimal fractions at the bound.
        return abs(first - second) <= TOLERANCE * abs(second) * (1 + 1e-9)
    return _strip_text(answer).lower() == _strip_text(expected).lower()


def parse_number(text: str) -> float | None:
    """Return the number that `text` states, a percentage as a fraction, or None."""
    text = _strip_text(text).replace("\N{MINUS SIGN}", "-")
    digits = text.removesuffix("%").rstrip()
    if not re.search(r"\d", digits, re.ASCII) or not _NUMBER.fullmatch(digits):
        return None
    try:
        value = float(digits.replace(",", ""))
    except ValueError:  # an exponent without a number
        return None
    return value / 100 if text.endswith("%") else value


def _strip_text(text: str) -> str:
    """Return `text` without spaces around it and without a full stop at its end."""
    return text.strip().removesuffix(".").rstrip()


def match_letter(answer: str, expected: str) -> bool:
    """Whether both texts begin with the same option letter.

    Source: multiple choice in MMMU, https://arxiv.org/abs/2311.16502, section 4.1; unlike there,
    only the beginning of the answer is searched for a letter.
    """
    letter = find_option_letter(answer)
    return letter is not None and letter == find_option_letter(expected)


def find_option_letter(text: str) -> str | None:
    """Return the option letter that `text` begins with, as a capital.

    "B", "(b) a cat" and "Answer: B." give "B"; None if the text begins with a word.
    """
    match = _LETTER.match(text)
    return match[1].upper() if match else None


_COMPARISONS: dict[Metric, Callable[[str, str], float]] = {
    "exact": match_exact,
    "normalized": match_normalized,
    "anls": compute_anls,
    "relaxed": match_relaxed,
    "choices": match_exact,
    "letter": match_letter,
}
