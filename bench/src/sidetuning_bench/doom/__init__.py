"""The world of Doom: its engine, its maps and what is seen there, without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function with Numba; other processes find the machine code where there is a folder for it."""
    from numba import njit

    try:
        machine: Any = njit(cache=True)(function)
    except RuntimeError:
        # Neither this package nor the home can be written to, as in some containers.
        machine = njit(function)
    compiled_function: F = machine
    return compiled_function
