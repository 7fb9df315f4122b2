"""Files beside a task's own: what was kept of its data, which its answers do not need. They are read when asked for.

`statistics.safetensors` has the sums that a task was solved from, `route.safetensors` those that tell its inputs from
other tasks'. They are never published with a task, and gone when its folder is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import Tensor

from sidetuning.errors import ArtifactError
from sidetuning.files import (
    atomic_write,
    check_signed,
    json_text,
    parse_json,
    read_safetensors,
    safetensors_header,
    signed,
)
from sidetuning.identity import Identity

KINDS = ("statistics", "route")
MEND = "learn it again, or fetch the folder again"


# Equal to itself alone: what a task keeps is replaced, never written over.
@dataclass(frozen=True, eq=False)
class Beside:
    """What is kept beside a task.

    Attributes:
        text: values of JSON.
        tensors: by name.
    """

    text: dict[str, Any]
    tensors: dict[str, Tensor]


# In memory, or the file that it is read from when it is asked for.
Kept = Beside | Path


def write_beside(folder: Path, kept: dict[str, Kept]) -> None:
    """Write what is kept of a task to its folder, and delete what is kept no more."""
    for kind in KINDS:
        file, found = folder / f"{kind}.safetensors", kept.get(kind)
        if found is None:
            file.unlink(missing_ok=True)
        elif not (isinstance(found, Path) and found.resolve() == file.resolve()):
            data = _bytes(read_beside(found))
            if not (file.exists() and file.read_bytes() == data):
                with atomic_write(file) as temporary:
                    temporary.write_bytes(data)


def is_beside(folder: Path, kept: dict[str, Kept]) -> bool:
    """Whether the folder holds what is kept of a task, and nothing else beside it."""
    for kind in KINDS:
        file, found = folder / f"{kind}.safetensors", kept.get(kind)
        if file.exists() != (found is not None):
            return False
        same = found is None or (isinstance(found, Path) and found.resolve() == file.resolve())
        if not same and found is not None and file.read_bytes() != _bytes(read_beside(found)):
            return False
    return True


def found_beside(folder: Path) -> dict[str, Kept]:
    """The files beside the task in a folder."""
    return {kind: file for kind in KINDS if (file := folder / f"{kind}.safetensors").exists()}


def read_beside(kept: Kept) -> Beside:
    """What is kept, from its file where it is not in memory.

    Raises:
        ArtifactError: the file is gone, damaged or was changed.
    """
    if isinstance(kept, Beside):
        return kept
    try:
        data = read_safetensors(kept)
        tensors = parse(data)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{kept} is truncated or not a safetensors file ({error}); {MEND}") from error
    text = parse_json(safetensors_header(data).get("sidetuning", ""), str(kept), {"tensors_sha256": str}, MEND)
    text = check_signed(text, str(kept), MEND)
    if text.pop("tensors_sha256") != hash_of(tensors):
        raise ArtifactError(f"{kept} was changed: its sha256 is not the one recorded; {MEND}")
    return Beside(text, tensors)


def stamp(kept: Kept) -> object:
    """Equal as long as what is kept is the same, in memory or in its file."""
    if isinstance(kept, Beside) or not kept.exists():
        return kept
    told = kept.stat()
    return kept, told.st_mtime_ns, told.st_size, told.st_ino


def base_text(identity: Identity) -> dict[str, Any]:
    """What a file tells of the base that its features come from."""
    return {"base": identity.sha256, "identity": identity.record()}


def is_of_base(text: dict[str, Any], identity: Identity) -> bool:
    """Whether a text by `base_text` is of this base; older ones tell its weights alone."""
    known = text.get("identity")
    return text.get("base") == identity.sha256 and (known is None or identity.difference(known) is None)


def _bytes(beside: Beside) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in beside.tensors.items()}
    text = json_text(signed({**beside.text, "tensors_sha256": hash_of(tensors)}))
    return save(tensors, metadata={"sidetuning": text})


def hash_of(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values."""
    return hashlib.sha256(save(tensors, metadata={"format": "pt"})).hexdigest()


def hash_of_file(data: bytes) -> str:
    """What `hash_of` gives of the tensors in a safetensors file, without writing them again."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8 : 8 + size]), "__metadata__": {"format": "pt"}}, separators=(",", ":"))
    text = header.encode() + b" " * (-len(header.encode()) % 8)
    return hashlib.sha256(len(text).to_bytes(8, "little") + text + data[8 + size :]).hexdigest()
