"""A name -> object table with decorator registration, lazy entries and errors that suggest near names."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from sidetuning.errors import ShapeError, SideTuningError, UnknownNameError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Named parts of one kind.

    Args:
        kind: what the entries are called in errors ("side", "merge", …).
        lazy: entries given as "package.module:attribute", imported when first asked for.
        group: an entry-point group by which other packages add entries.
    """

    def __init__(self, kind: str, lazy: Mapping[str, str] | None = None, group: str | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._lazy = dict(lazy or {})
        if group is not None:
            self._lazy.update({entry.name: entry.value for entry in entry_points(group=group)})

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that adds an entry; a name is never overwritten."""

        def add(entry: F) -> F:
            if name in self:
                raise ValueError(f"{self.kind} '{name}' is already registered; choose another name")
            self._entries[name] = entry  # type: ignore[assignment]
            return entry

        return add

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._lazy

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise UnknownNameError(unknown(self.kind, name, self.names(), verb="registered"))
        if name not in self._entries:
            module, attribute = self._lazy[name].split(":")
            self._entries[name] = getattr(importlib.import_module(module), attribute)
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._entries, *self._lazy})

    def build(self, name: str, *given: Any, options: Mapping[str, Any]) -> Any:
        """Call entry `name` with `given` and the user's `options`; an option it does not have is a clear error."""
        entry = self[name]
        assert callable(entry)
        accepted = _parameters(entry)[len(given) :]
        for option in options:
            if option not in accepted:
                raise UnknownNameError(unknown(f"option of {self.kind} '{name}':", option, accepted, verb="known"))
        try:
            return entry(*given, **options)
        except (SideTuningError, ImportError):
            raise
        except Exception as error:
            # Each part meets values of the wrong type, sign or size in its own way.
            told = ", ".join(f"{key}={value!r:.50}" for key, value in options.items()) or "these parts"
            raise ShapeError(
                f"{self.kind} '{name}' cannot be built with {told} ({type(error).__name__}: {error}); give other values"
            ) from error


@functools.lru_cache(maxsize=256)
def _parameters(entry: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(entry).parameters)


def unknown(kind: str, name: str, names: Iterable[str], verb: str) -> str:
    """The message for a name that is not in `names`, with the nearest ones or the whole list."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3)
    if near:
        hint = "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    else:
        hint = "there is " + (", ".join(names) if names else "none")
    return f"{kind} '{name}' is not {verb}; {hint}"
