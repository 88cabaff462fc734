"""Values of a JSON object, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_smolvlm.config import LARGEST
from mlx_smolvlm.errors import CheckpointError, shorten


@dataclass(frozen=True)
class Section:
    """A JSON object and the name by which errors call it."""

    values: Mapping[str, Any]
    name: str

    def error(self, key: str, advice: str) -> CheckpointError:
        """An error about the value at `key`."""
        return CheckpointError(f"{self.name}: {key} is {shorten(self.values.get(key))}; {advice}")

    def child(self, key: str) -> Section | None:
        """The object at `key`; None if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "it must be an object")
        return Section(value, f"{self.name}, {key}")

    def integer(self, key: str, default: int | None, largest: int = LARGEST) -> int:
        """The positive integer at `key`; `default` if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is not int or not 0 < value <= largest:
            raise self.error(key, f"it must be an integer from 1 to {largest}")
        return value

    def number(self, key: str, default: float | None, *, zero: bool = False) -> float:
        """The positive number at `key`, or 0 if `zero`; `default` if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            value = default
        usable = type(value) in (int, float) and 0 <= value < float("inf")  # type: ignore[operator]
        if not usable or not (value or zero):
            raise self.error(key, f"it must be a number {'from' if zero else 'above'} 0")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str, default: bool) -> bool:
        """The boolean at `key`; `default` if it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, "it must be true or false")
        return value

    def fixed(self, supported: Mapping[str, Any]) -> None:
        """Refuse a value other than the `supported` one of its key."""
        for key, wanted in supported.items():
            value = self.values.get(key)
            same = value == wanted or (
                isinstance(wanted, float)
                and isinstance(value, (int, float))
                and abs(value - wanted) < 1e-9
            )
            if value is not None and not same:
                raise self.error(key, f"mlx-smolvlm supports {wanted!r}")
