"""Metrics, against tables made by hand, and RapidFuzz."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from mlx_smolvlm.train.evaluate.metrics import (
    METRICS,
    Metric,
    check_metric,
    compute_anls,
    count_edits,
    find_option_letter,
    match_relaxed,
    normalize,
    parse_number,
    score,
)

WORDS = st.text(st.sampled_from("abcAB .é"), max_size=12)


def test_exact_is_to_the_letter() -> None:
    assert score("exact", "Red.", ["Red."]) == 1
    for answer in ("red.", "Red", " Red.", "Red. "):
        assert score("exact", answer, ["Red."]) == 0


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Red.", "red", True),
        ("  a  RED\nsquare! ", "A red square", True),
        ("“Straße”", "STRASSE", True),
        ("T-shirt", "tshirt", True),
        ("cafe", "café", False),
        ("the cat", "cat", False),  # articles stay
        ("3.5", "35", False),
        ("1,000", "1000", False),
        ("3.5.", "3.5", True),
        ("-5", "5", False),
        ("5-", "5", True),
        ("It is -5", "it is 5", False),
        ("C++", "C", False),  # a symbol is no punctuation
        ("!", "?", False),  # nothing is left of either
        ("?", "?", True),
        ("", "?", False),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}", "a", True),
    ],
)
def test_normalized(answer: str, expected: str, same: bool) -> None:
    assert score("normalized", answer, [expected]) == same


@given(st.text(string.printable, max_size=20))
def test_case_and_spaces_and_marks_at_the_end_do_not_count(text: str) -> None:
    assert normalize(f'  {text.upper()}!" ') == normalize(text)


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("Hello World", "hello  world", 1.0),
        ("hello wrld", "Hello World", 1 - 1 / 11),
        ("abcd", "abxy", 0.5),  # exactly half counts
        ("abc", "axyz", 0.0),
        ("abcde", "abxyz", 0.0),  # 0.4
        ("", "abc", 0.0),
        ("a long answer about 42", "42", 0.0),
    ],
)
def test_anls(answer: str, expected: str, value: float) -> None:
    assert compute_anls(answer, expected) == pytest.approx(value)


@given(WORDS, WORDS)
def test_anls_is_rapidfuzz_s_similarity_from_a_half_on(first: str, second: str) -> None:
    a, b = (" ".join(text.lower().split()) for text in (first, second))
    similarity = Levenshtein.normalized_similarity(a, b, score_cutoff=0.5)
    assert compute_anls(first, second) == pytest.approx(similarity)


@given(WORDS, WORDS)
def test_edit_distance_is_rapidfuzz_s(first: str, second: str) -> None:
    assert count_edits(first, second) == Levenshtein.distance(first, second)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("94.9", "100", False),
        ("-100", "100", False),
        ("-105", "-100", True),
        ("2.1", "2", True),  # the bound itself, where floats are a little off
        ("1,234", "1234", True),
        ("1,234,567.0", "1234567", True),
        ("1,23", "123", False),  # no thousands
        ("50%", "0.5", True),
        ("52 %", "50%", True),
        ("50%", "50", False),
        ("0.0", "0", True),
        ("0.001", "0", False),
        ("42.", "42", True),
        ("1e3", "1000", True),
        ("\N{MINUS SIGN}5", "-5", True),
        ("Yes.", "yes", True),
        ("yes it is", "yes", False),
        ("No", "0", False),
        ("nan", "nan", True),  # a text like others
        ("inf", "1", False),
        ("1_0", "10", False),
        ("", "10", False),
    ],
)
def test_relaxed(answer: str, expected: str, right: bool) -> None:
    assert match_relaxed(answer, expected) is right


ARABIC_ONE = "\N{ARABIC-INDIC DIGIT ONE}"


@pytest.mark.parametrize(
    "text",
    ["", ".", "-", "%", "e5", "1.2.3", "12 34", "$5", "five", ARABIC_ONE, f"1{ARABIC_ONE}"],
)
def test_what_is_no_number(text: str) -> None:
    assert parse_number(text) is None


@given(st.floats(-1e15, 1e15).filter(lambda value: abs(value) > 1e-3))
def test_numbers_are_read_as_python_writes_them(value: float) -> None:
    text = f"{value:,.6f}"
    read = parse_number(text)
    assert read == pytest.approx(value, abs=1e-6)
    assert parse_number(text + "%") == pytest.approx(value / 100, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b. ", "B"),
        ("(C) a cat", "C"),
        ("**D**: a dog", "D"),
        ("Answer: A", "A"),
        ("The answer is B.", "B"),
        ("the answer is (c)", "C"),
        ("B2", None),
        ("Blue", None),
        ("cat", None),
        ("42", None),
        ("", None),
        ("Answer", None),
        ("I think B", "I"),  # known: only the beginning is read
    ],
)
def test_option_letter(text: str, letter: str | None) -> None:
    assert find_option_letter(text) == letter


def test_letters_of_options() -> None:
    assert score("letter", "b) a dog", ["B"]) == 1
    assert score("letter", "A", ["B. a dog"]) == 0
    assert score("letter", "dog", ["dog"]) == 0  # neither begins with one


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_of_the_accepted_answers_counts(metric: Metric) -> None:
    assert score(metric, "B", ["zzzz", "B", "yyyy"]) == 1
    assert score(metric, "B", ["zzzz", "yyyy"]) == 0
    assert check_metric(metric) == metric


def test_a_metric_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"metric is 'bleu'; it must be one of exact, .*letter"):
        check_metric("bleu")
