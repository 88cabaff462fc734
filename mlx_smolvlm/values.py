"""Checks of option values that a user passes."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any


def read_integer(name: str, value: Any, accepts: Callable[[int], bool], limits: str) -> int:
    """`value` as an int that `accepts` is true for; `limits` says in words which those are.

    NumPy's integers are integers; booleans and floats are not, whatever their value.

    Raises:
        ValueError: It is none of them. The message begins with `name`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not accepts(number):
        raise ValueError(f"{name} is {value!r:.100}; it must be {limits}")
    return number


def read_number(name: str, value: Any, accepts: Callable[[float], bool], limits: str) -> float:
    """`value` as a float that `accepts` is true for; `limits` says in words which those are.

    NumPy's numbers are numbers; booleans and texts are not.

    Raises:
        ValueError: It is none of them. The message begins with `name`.
    """
    number = float("nan")
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
    if not accepts(number):
        raise ValueError(f"{name} is {value!r:.100}; it must be {limits}")
    return number
