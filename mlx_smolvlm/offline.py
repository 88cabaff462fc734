"""Whether the network may be used."""

from __future__ import annotations

import os

VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the hub's client heeds the same


def is_offline(asked: bool = False) -> bool:
    """Whether no connection may be opened: `asked` for, or by the environment."""
    values = (os.environ.get(name, "") for name in VARIABLES)
    return asked or any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)
