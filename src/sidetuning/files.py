"""Files: writes that a reader never meets half of, and JSON that is checked before it is believed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sidetuning.errors import ArtifactError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and put it in its place, synced, when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """JSON as our files have it: indented, UTF-8, with a newline at the end."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_json(path: str | Path, schema: Any, mend: str) -> Any:
    """A JSON file whose values have the types that `schema` asks for.

    Args:
        path: the file.
        schema: a type; a set of allowed values; `[schema]` for a list; a tuple of schemas for a list of just these; a
            dictionary of schemas, where a key that ends in "?" may be missing or null. Other keys are not looked at.
        mend: what the user can do about a damaged file; the end of the error's sentence.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: not JSON, or a value of another type.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}); {mend}") from error
    wrong = _misfit(content, schema, "")
    if wrong is not None:
        raise ArtifactError(f"{path} has no valid field '{wrong}'; {mend}")
    return content


def _misfit(value: Any, schema: Any, where: str) -> str | None:
    """The place of the first value that is not as the schema has it."""
    inner: list[tuple[Any, Any, str]] = []
    if isinstance(schema, dict):
        fits = isinstance(value, dict)
        for key, kind in schema.items() if fits else ():
            name = key.rstrip("?")
            if not key.endswith("?") or value.get(name) is not None:
                inner.append((value.get(name), kind, f"{where}.{name}".lstrip(".")))
    elif isinstance(schema, (list, tuple)):
        kinds = schema if isinstance(schema, tuple) else schema * len(value if isinstance(value, list) else ())
        fits = isinstance(value, list) and len(value) == len(kinds)
        inner = [(item, kind, where) for item, kind in zip(value, kinds, strict=True)] if fits else []
    elif isinstance(schema, set):
        fits = isinstance(value, (str, int)) and value in schema
    else:
        fits = type(value) is schema or (schema is float and type(value) is int)
    if not fits:
        return where
    return next((wrong for item in inner if (wrong := _misfit(*item)) is not None), None)
