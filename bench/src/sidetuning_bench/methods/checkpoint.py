"""Files of a method: `method.json`, and tensors in a file that is named by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sidetuning.errors import ArtifactError
from sidetuning.files import atomic_write, check_signed, read_json, read_safetensors

# Version 1 had no checksum.
FORMAT_VERSION = 2
MEND = "learn the tasks again"
CONFIG = "method.json"
TASK = {"name": str, "labels?": [str], "head_options?": dict}
BASE = {"base": str, "probe?": [float], "preparation?": dict, "output_shape?": [int]}
SCHEMA = {"format_version": int, "method": str, "options": dict, "tasks": [TASK], "tensors": str, **BASE}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors, and return the name of their file, which holds its sha256."""
    # Clones: safetensors refuses tied weights, which share their memory.
    content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    file = f"method-{hashlib.sha256(content).hexdigest()}.safetensors"
    with atomic_write(folder / file) as temporary:
        temporary.write_bytes(content)
    return file


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The content of a file of `write_tensors`, checked by its name."""
    try:
        content = read_safetensors(file)
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); learn the tasks again") from error
    if f"method-{hashlib.sha256(content).hexdigest()}.safetensors" != file.name:
        raise ArtifactError(f"{file} was changed: its sha256 is not the one in its name; learn the tasks again")
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `method.json`, checked."""
    file = folder / CONFIG
    try:
        config: dict[str, Any] = read_json(file, SCHEMA, MEND)
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} does not exist; give the folder that save() wrote") from error
    version = config["format_version"]
    if not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(f"{file} has the format_version {version}; this library reads 1 to {FORMAT_VERSION}")
    config = check_signed(config, str(file), MEND, needed=version > 1)
    if not all(isinstance(task.get("head"), (int, str)) for task in config["tasks"]):
        raise ArtifactError(f"{file} has no valid field 'tasks.head'; {MEND}")
    if Path(config["tensors"]).name != config["tensors"]:
        raise ArtifactError(f"{file} names a file of another folder, {config['tensors']}; {MEND}")
    return config


def saved_tasks(folder: Path) -> list[str]:
    """Names of the tasks that were saved to a folder; none where nothing was saved yet."""
    return [task["name"] for task in read_config(folder)["tasks"]] if (folder / CONFIG).exists() else []
