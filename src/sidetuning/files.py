"""Files: writes that a reader never meets half of, and JSON that is checked before it is believed."""

from __future__ import annotations

import codecs
import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sidetuning.errors import ArtifactError

# The largest JSON, in bytes: a file that says more is none of ours.
LONGEST_TEXT = 1 << 28
# The environment variable that moves the user's cache.
CACHE = "SIDETUNING_CACHE"


def user_cache(kind: str) -> Path:
    """The folder of the user's cache for things of one kind."""
    return Path(os.environ.get(CACHE) or "~/.cache/sidetuning").expanduser() / kind


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path, and put what is written there in place of `path`, synced, when the block ends well.

    A link stays one, and its target is replaced. What is no file, such as a device, is written to.
    """
    try:
        path = Path(path).resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, "it is a link to itself", str(path)) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder) / path.name)
            path.write_bytes(temporary.read_bytes())
        return
    prefix = f".{path.name}.{platform.node()}."
    temporary = path.with_name(f"{prefix}{os.getpid()}.{threading.get_ident()}.tmp")
    _remove_leftovers(path.parent, prefix)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove the temporary files of this machine's writers that were killed."""
    for left in folder.glob(f"{glob.escape(prefix)}*.tmp"):
        try:
            os.kill(int(left.name.removeprefix(prefix).split(".")[0]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (OSError, ValueError):
            continue


def _sync_folder(folder: Path) -> None:
    """Let a rename outlive a loss of power, where the system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def held_folder(folder: str | Path) -> Iterator[None]:
    """Hold a folder: no other process may work in it meanwhile, but for those that were launched together.

    The system lets it go when the process ends, however it ends. Windows has no such lock.

    Raises:
        ArtifactError: another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if os.name == "nt" or os.environ.get("RANK", "0") != "0":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(f"another process works in {folder}; wait until it ends, or give another") from error
        except OSError:
            # Some file systems of networks have no locks.
            pass
        yield
    finally:
        os.close(handle)


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


def decode_text(data: bytes) -> str:
    """A text in UTF-8 or, by its byte-order mark, in UTF-16; UnicodeDecodeError where it is neither."""
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


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
        text = decode_text(read_bytes(path, LONGEST_TEXT))
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}); {mend}") from error
    return parse_json(text, str(path), schema, mend)


def parse_json(text: str, name: str, schema: Any, mend: str) -> Any:
    """As `read_json`, of a text that is called `name` in errors."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not JSON ({error}); {mend}") from error
    return check_json(content, name, schema, mend)


def check_json(content: Any, name: str, schema: Any, mend: str) -> Any:
    """As `parse_json`, of what was parsed already."""
    wrong = _misfit(content, schema, "")
    if wrong is not None:
        raise ArtifactError(f"{name} has no valid field '{wrong}'; {mend}")
    return content


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are read from JSON, keys as texts, with their checksum under "sha256"."""
    values = json.loads(json.dumps(content))
    return {**values, "sha256": _checksum(values)}


def check_signed(content: Mapping[str, Any], name: str, mend: str, needed: bool = True) -> dict[str, Any]:
    """What `signed` was given.

    Args:
        content: JSON values as they were read.
        name, mend: as of `read_json`.
        needed: False for files of older versions, which have no checksum.

    Raises:
        ArtifactError: there is no checksum where one is needed, or it is another.
    """
    if (needed or "sha256" in content) and content.get("sha256") != _checksum(content):
        raise ArtifactError(f"{name} was changed: its checksum is not that of its text; {mend}")
    return {key: value for key, value in content.items() if key != "sha256"}


def _checksum(content: Mapping[str, Any]) -> str:
    """sha256 over JSON values, but for the checksum itself."""
    values = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_bytes(path: str | Path, longest: int | None = None) -> bytes:
    """The content of a file of at most `longest` bytes; an OSError of a device or a pipe, which may have no end."""
    size = _size(path)
    if longest is not None and size > longest:
        raise OSError(f"it has {size:,} bytes, and at most {longest:,} are read")
    return Path(path).read_bytes()


def _size(path: str | Path) -> int:
    """Bytes of a file; OSError for what is none, such as a device."""
    about = Path(path).stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError("it is no file")
    return about.st_size


def read_safetensors(path: str | Path) -> bytes:
    """The content of a safetensors file; OSError where it cannot be read, or is none."""
    check_safetensors(path)
    return Path(path).read_bytes()


def check_safetensors(path: str | Path) -> None:
    """Raise OSError unless a file has the size that its header tells: before so much memory is taken."""
    size = _size(path)
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError, LookupError):
            header = json.loads(file.read(length) if length <= LONGEST_TEXT else b"")
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            if size == 8 + length + max(ends, default=0):
                return
    raise OSError("it is no whole safetensors file")


def safetensors_header(data: bytes) -> dict[str, str]:
    """The texts in the header of a safetensors file: its length in 8 bytes, then JSON."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__") or {}


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
