"""A stand-in for habitat-lab with the interface that the adapter uses: one corridor, walked in quarter metres."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def get_config(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    if not Path(path).exists():
        raise FileNotFoundError(path)
    return {"path": path, "overrides": list(overrides)}
