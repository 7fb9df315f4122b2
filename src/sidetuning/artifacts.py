"""A task on disk: `side.json` says what it is and which base it belongs to, `side.safetensors` holds its tensors.

Writes are atomic, reads are strict, and no pickle is ever read or written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import nn

from sidetuning.base import Base
from sidetuning.branch import CUSTOM, Branch, BranchConfig, build_branch
from sidetuning.errors import ArtifactError, SideTuningError, TaskError
from sidetuning.files import atomic_write, json_text, read_json
from sidetuning.sides.initialise import mismatch

FORMAT_VERSION = 1
CONFIG, TENSORS = "side.json", "side.safetensors"
# A downloaded file may hold anything. A part is its name and its options.
PART = (str, dict)
SCHEMA = {
    "task": str,
    "tensors_sha256": str,
    "labels?": [str],
    "laterals_sha256?": dict,
    "parts": {
        "side?": PART,
        "merge": PART,
        "head": PART,
        "laterals": [str],
        "prenorm": bool,
        "init?": {"zero", "low-energy"},
    },
    "base": {
        "sha256": str,
        "taps?": [str],
        "output_shape?": [int],
        "preparation?": dict,
        "spec?": {"name": str, "options": dict, "revision?": str},
    },
}


def write_task(
    path: str | Path,
    name: str,
    branch: Branch,
    base: Base,
    laterals: Mapping[str, str],
    metrics: Mapping[str, float],
) -> None:
    """Write a task to the folder `path`, with the identity of the base it belongs to.

    Both files are whole before either takes its place, and `side.json`, which names the sha256 of the tensors, takes it
    last: a folder is a task only when whole.

    Args:
        path: the folder.
        name: name of the task.
        branch: side, merge and head of the task.
        base: the base that it was trained on.
        laterals: the sha256 of the sides of earlier tasks that it reads, by task.
        metrics: numbers to record with the task.

    Raises:
        TaskError: an option of a part, or another value, that JSON does not have.
    """
    path, data = Path(path), _tensor_bytes(branch)
    spec = None if base.spec is None else asdict(base.spec)
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": version("sidetuning"),
        "task": name,
        "parts": asdict(branch.config),
        "labels": branch.labels,
        "alpha": branch.alpha,
        "metrics": {key: float(value) for key, value in metrics.items()},
        "laterals_sha256": dict(laterals),
        "base": {"spec": spec, **base.identity().record(), "taps": list(branch.taps)},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        text = json_text(config)
    except TypeError as error:
        raise TaskError(
            f"task '{name}' cannot be saved: {error}; give its options as plain numbers and texts"
        ) from error
    with atomic_write(path / CONFIG) as config_file, atomic_write(path / TENSORS) as tensors_file:
        config_file.write_text(text, encoding="utf-8")
        tensors_file.write_bytes(data)


def is_saved(path: str | Path, name: str, branch: Branch) -> bool:
    """Whether the folder `path` holds this task with the weights that it has now."""
    try:
        config = read_config(path)
        content = (Path(path) / TENSORS).read_bytes()
    except (ArtifactError, OSError):
        return False
    sha256 = tensors_sha256(branch)
    return config["task"] == name and config["tensors_sha256"] == sha256 == hashlib.sha256(content).hexdigest()


def tensors_sha256(module: nn.Module | None) -> str:
    """sha256 over a module's tensors, as they are saved."""
    return hashlib.sha256(_tensor_bytes(module) if module is not None else b"").hexdigest()


def _tensor_bytes(module: nn.Module) -> bytes:
    # A clone each: safetensors refuses tensors that share memory.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
    return save(tensors, metadata={"format": "pt"})


def read_config(path: str | Path) -> dict[str, Any]:
    """`side.json` of the task at `path`, checked for its format.

    Raises:
        ArtifactError: no task there, not JSON, an unknown format version, or a field missing.
    """
    file, mend = Path(path) / CONFIG, "fetch or save the task again"
    try:
        found = read_json(file, {}, mend).get("format_version")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} holds no task: {CONFIG} is missing") from error
    if found != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format_version {found!r} and this library reads {FORMAT_VERSION}; "
            "install the version of sidetuning that wrote it, or a newer one"
        )
    config: dict[str, Any] = read_json(file, SCHEMA, mend)
    return config


def read_branch(
    path: str | Path, config: dict[str, Any], base: Base, own: Mapping[str, nn.Module | None], *, any_base: bool = False
) -> Branch:
    """Build the branch of the task saved at `path`, with its weights.

    Args:
        path: the folder.
        config: what `read_config` gave of it.
        base: what it is built on.
        own: instances of the parts "side", "merge" and "head" that were the user's own modules, None for the others.
        any_base: take another base than the one that it was trained on.

    Raises:
        ArtifactError: another base, parts that cannot be built, or tensors that are damaged or do not fit.
        TaskError: a part of the user's own is not given, or is given where a registered one was used.
    """
    path = Path(path)
    recorded = config["base"]
    difference = base.identity().difference(recorded)
    if difference and not any_base:
        raise ArtifactError(
            f"{path} was trained on another base: {difference}; load its own base, {_spec_text(config)}, or pass "
            "any_base=True"
        )
    try:
        parts = BranchConfig(**config["parts"])
    except TypeError as error:
        raise ArtifactError(
            f"{path / CONFIG} has a field in 'parts' that this library does not know ({error})"
        ) from error
    chosen: dict[str, Any] = {}
    for kind, module in own.items():
        chosen[kind], options = _part(path, kind, getattr(parts, kind), module)
        chosen[f"{kind}_options"] = options
    shared: dict[str, Any] = {"laterals": parts.laterals, "prenorm": parts.prenorm, "init": parts.init}
    try:
        tapped = base.with_taps(recorded["taps"]) if recorded.get("taps") else base
        branch = build_branch(tapped, **chosen, **shared)
    except SideTuningError:
        raise
    except Exception as error:
        # Options of the wrong type or value, which each part meets in its own way.
        raise ArtifactError(f"{path / CONFIG} describes parts that cannot be built ({error})") from error
    branch.labels = config.get("labels")
    tensors = _read_tensors(path / TENSORS, config["tensors_sha256"])
    problem = mismatch(branch.state_dict(), tensors)
    if problem:
        raise ArtifactError(f"{path / TENSORS} does not fit {path / CONFIG}: {problem}")
    branch.load_state_dict(tensors)
    return branch


def _part(path: Path, kind: str, recorded: Any, module: nn.Module | None) -> tuple[Any, dict[str, Any] | None]:
    """The name and options of a registered part, or the instance that stands for a part of the user's own."""
    own = recorded is not None and recorded[0] == CUSTOM
    if own and module is None:
        raise TaskError(f"the {kind} of {path} is a module of your own: pass an instance, load_task(…, {kind}=module)")
    if module is None:
        return (None, None) if recorded is None else tuple(recorded)
    if not own:
        name = "none" if recorded is None else f"'{recorded[0]}'"
        raise TaskError(f"the {kind} of {path} is {name} and is built from its name; leave {kind}= out")
    return module, None


def _read_tensors(file: Path, sha256: str) -> dict[str, Any]:
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} is missing; fetch or save the task again") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError(
            f"{file} is truncated or was changed: its sha256 is not the one in {CONFIG}; fetch it again"
        )
    try:
        return parse(data)
    except SafetensorError as error:
        raise ArtifactError(f"{file} is not a safetensors file ({error}); fetch or save the task again") from error


def _spec_text(config: dict[str, Any]) -> str:
    spec = config["base"].get("spec")
    if not spec:
        return "which has no recorded spec"
    return f"load_base({', '.join([repr(spec['name']), *(f'{k}={v!r}' for k, v in spec['options'].items())])})"
