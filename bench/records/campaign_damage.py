"""How the campaign damages a file: its bytes, the JSON within it, or what lies in its place."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sidetuning.files import json_text, signed

# A file beside the damaged folder, which nobody may write to.
VICTIM = "victim"
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 10_000, "../../up", "/dev/zero", "/nowhere/file", "a\x00b", "[/x]", "\x1b]0;owned\x07", "O"),
    *([], {}, [None], [1, 2, 3], {"a": 1}, ["mlp", {}], ["mlp", {"hidden": 10**7}], [["a"]], ["custom", {}]),
)
DEEP = ("[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000)
JUNK = (*DEEP, "1" * 5000, "", "null", "[]", "{}", '"x"', "\ufeff{}")


# ---- mutations of bytes: (content, rng) -> content


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4, 32))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data)), rng.choice((1, 4, 8, 64))
    new = rng.choice((bytes(size), b"\xff" * size, b"\x7f" * size, rng.randbytes(size)))
    return data[:at] + new + data[at + size :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 7, 1000))) + data[at:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at : at + rng.choice((1, 16, 4096))] * 2 + data[at:]


def swap(data: bytes, rng: random.Random) -> bytes:
    half = len(data) // 2
    size = rng.randint(1, max(1, half))
    return data[half : half + size] + data[size:half] + data[:size] + data[half + size :]


def zeros(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes(len(data) - at)


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    f.__name__: f for f in (flip, flip, overwrite, cut, insert, repeat, swap, zeros)
}

# ---- mutations of JSON


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed_json(content: Any, rng: random.Random) -> Any:
    """One value or key of JSON is another, or gone."""
    content = json.loads(json.dumps(content))
    found = list(places(content))
    if not found:
        return rng.choice(VALUES)
    path = rng.choice(found)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    kind = rng.choice(("value", "value", "value", "drop", "rename", "near", "swap"))
    if kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[str(key) + rng.choice(("x", " ", ""))[::-1]] = holder.pop(key)
        holder["unknown"] = 1
    elif kind == "near":
        holder[key] = near(holder[key], rng)
    elif kind == "swap":
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key] = rng.choice(VALUES)
    return content


def near(value: Any, rng: random.Random) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return type(value)(value * rng.choice((-1, 2, 10**6, 10**9)) + rng.choice((0, 1)))
    if isinstance(value, str):
        return rng.choice((value[::-1], value + "x", value[1:], value.upper(), "../" + value))
    if isinstance(value, list):
        return rng.choice((value[::-1], value * 2, value[1:], value * 1000))
    return {**value, "unknown": 1} if isinstance(value, dict) else rng.choice(VALUES)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header of a safetensors file, and what follows it."""
    size = int.from_bytes(data[:8], "little")
    try:
        return json.loads(data[8 : 8 + size]), data[8 + size :]
    except ValueError:
        return None


def with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def resigned(content: Any) -> Any:
    return signed(content) if isinstance(content, dict) and "sha256" in content else content


def mutate_header(data: bytes, rng: random.Random, sign: bool) -> bytes:
    """A safetensors file with another header, or another text of ours within it."""
    header, rest = header_of(data) or ({}, data)
    text = header.get("__metadata__", {}).get("sidetuning")
    if text is None or rng.random() < 0.3:
        return with_header(changed_json(header, rng), rest)
    content = changed_json(json.loads(text), rng)
    header["__metadata__"]["sidetuning"] = json.dumps(resigned(content) if sign else content)
    return with_header(header, rest)


def mutate_file(file: Path, rng: random.Random, sign: bool) -> str:
    """Damage one file; returns how."""
    data = file.read_bytes()
    if rng.random() < 0.08:
        return replace_file(file, rng)
    if file.suffix in (".safetensors", ".pt") and rng.random() < 0.5 and data[:2] != b"PK":
        file.write_bytes(mutate_header(data, rng, sign))
        return "header"
    if file.suffix in (".json", ".jsonl", "") and data[:1] in (b"{", b"[") and rng.random() < 0.75:
        if rng.random() < 0.1:
            file.write_text(rng.choice(JUNK))
            return "junk"
        lines = data.split(b"\n")[:-1] if file.suffix == ".jsonl" else [data]
        k = rng.randrange(len(lines))
        content = changed_json(json.loads(lines[k]), rng)
        lines[k] = (json.dumps(resigned(content) if sign else content)).encode()
        file.write_bytes(b"\n".join(lines) + b"\n")
        return "json"
    if not data:
        file.write_bytes(rng.randbytes(10))
        return "filled"
    name = rng.choice(list(BYTES))
    file.write_bytes(BYTES[name](data, rng))
    return name


def replace_file(file: Path, rng: random.Random) -> str:
    """Something else in place of a file."""
    kind = rng.choice(("gone", "empty", "folder", "link", "device", "loop", "pipe", "pickle", "big"))
    file.unlink()
    if kind in ("pipe", "device") and file.parent.name == "refs":
        # The Hub's client itself would read it for ever.
        kind = "gone"
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind in ("link", "device", "loop"):
        # Beside the folder, and never a file that matters: a reader that writes through it would destroy it.
        victim = next(parent for parent in file.parents if (parent / VICTIM).exists()) / VICTIM
        targets = {"link": str(victim), "device": "/dev/zero", "loop": file.name}
        file.symlink_to(targets[kind])
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "pickle":
        file.write_bytes(b"cos\nsystem\n(S'touch /tmp/sidetuning-campaign-owned'\ntR.")
    elif kind == "big":
        with file.open("wb") as opened:
            # Without a block on the disk.
            opened.truncate(1 << 33)
    return kind


def mutate(folder: Path, rng: random.Random) -> tuple[str, bool]:
    """Damage a folder; returns how, and whether it was signed anew, as its maker can do it."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    file = rng.choice(files)
    sign = rng.random() < 0.25
    how = mutate_file(file, rng, sign)
    if sign and file.name == "side.safetensors" and how == "header":
        # Both texts of a task agree.
        header = header_of(file.read_bytes())
        with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError):
            text = header and header[0]["__metadata__"]["sidetuning"]
            (file.parent / "side.json").write_text(json_text(json.loads(str(text))))
    name = file.relative_to(folder)
    return f"{how} of {name}{', signed anew' if sign and how in ('json', 'header') else ''}", sign
