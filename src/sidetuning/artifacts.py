"""A task on disk: `side.json` says what it is and which base it belongs to, `side.safetensors` holds its tensors.

Writes are atomic, reads are strict, and no pickle is ever read or written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import nn

from sidetuning.base import Base, load_base
from sidetuning.branch import CUSTOM, BranchConfig, build_branch
from sidetuning.errors import ArtifactError, SideTuningError, TaskError
from sidetuning.sides.initialise import mismatch
from sidetuning.tuner import SideTuner

FORMAT_VERSION = 1
CONFIG, TENSORS = "side.json", "side.safetensors"


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
    write_text(path, _json(content))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def save_task(model: SideTuner, task: str, path: str | Path, *, metrics: Mapping[str, float] | None = None) -> None:
    """Write a task to the folder `path`, with the fingerprint of the base it belongs to.

    The tensors go first, `side.json`, which names their sha256, last: a folder is a task only when whole.

    Raises:
        TaskError: an option of a part, or another value, that JSON does not have.
    """
    branch, base, path = model[task], model.base, Path(path)
    data = _tensor_bytes(branch)
    spec = None if base.spec is None else asdict(base.spec)
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": version("sidetuning"),
        "task": task,
        "parts": asdict(branch.config),
        "labels": branch.labels,
        "alpha": branch.alpha,
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        "laterals_sha256": {name: _lateral_sha256(model, name) for name in branch.config.laterals},
        "base": {
            "spec": spec,
            "sha256": base.fingerprint(),
            "output_shape": list(base.output_shape),
            "preparation": base.preparation(),
            "taps": list(base.tap_shapes),
        },
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        text = _json(config)
    except TypeError as error:
        raise TaskError(
            f"task '{task}' cannot be saved: {error}; give its options as plain numbers and texts"
        ) from error
    with atomic_write(path / CONFIG) as config_file, atomic_write(path / TENSORS) as tensors_file:
        config_file.write_text(text, encoding="utf-8")
        tensors_file.write_bytes(data)  # both are whole before either takes its place, this one first


def is_saved(model: SideTuner, task: str, path: str | Path) -> bool:
    """Whether the folder `path` holds this task with the weights that it has now."""
    try:
        config = read_config(path)
        content = (Path(path) / TENSORS).read_bytes()
    except (ArtifactError, OSError):
        return False
    sha256 = hashlib.sha256(_tensor_bytes(model[task])).hexdigest()
    return config["task"] == task and config["tensors_sha256"] == sha256 == hashlib.sha256(content).hexdigest()


def _lateral_sha256(model: SideTuner, task: str) -> str:
    """Of the side of a task, all that another sees of it."""
    side = model[task].side
    assert side is not None
    return hashlib.sha256(_tensor_bytes(side)).hexdigest()


def _tensor_bytes(branch: nn.Module) -> bytes:
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in branch.state_dict().items()}  # tied ones apart
    return save(tensors, metadata={"format": "pt"})


def read_config(path: str | Path) -> dict[str, Any]:
    """`side.json` of the task at `path`, checked for its format.

    Raises:
        ArtifactError: no task there, not JSON, an unknown format version, or a field missing.
    """
    file = Path(path) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} holds no task: {CONFIG} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} is not JSON ({error}); fetch or save the task again") from error
    found = config.get("format_version") if isinstance(config, dict) else None
    if found != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format_version {found!r} and this library reads {FORMAT_VERSION}; "
            "install the version of sidetuning that wrote it, or a newer one"
        )
    for name, kind in (("task", str), ("parts", dict), ("base", dict), ("tensors_sha256", str)):
        if not isinstance(config.get(name), kind):
            raise ArtifactError(f"{file} has no valid field '{name}'; fetch or save the task again")
    wrong = _wrong_field(config)
    if wrong:
        raise ArtifactError(f"{file} has no valid field '{wrong}'; fetch or save the task again")
    return config


def check_preparation(path: Path, recorded: Any, base: Base) -> None:
    """Equal weights are not enough: a base must prepare inputs and pick its output as it did; older files do not say how.

    Raises:
        ArtifactError: it does not.
    """
    if recorded is not None and recorded != base.preparation():
        raise ArtifactError(
            f"{path} was trained on a base that prepares its inputs or picks its output otherwise: {recorded}, this one "
            f"{base.preparation()}; build the base as it was (or, for a single task, pass any_base=True)"
        )


def load_task(
    model: SideTuner,
    path: str | Path,
    *,
    name: str | None = None,
    any_base: bool = False,
    side: nn.Module | None = None,
    merge: nn.Module | None = None,
    head: nn.Module | None = None,
) -> str:
    """Add the task saved at `path` to `model`; nothing is added unless all of it is right.

    Args:
        model: a model on the base that the task was trained on.
        path: the folder.
        name: another name for the task.
        any_base: load it even where the base's weights, its taps or a lateral differ; its outputs are not what they were then.
        side, merge, head: instances of the parts that were the user's own modules.

    Returns:
        The name of the task.

    Raises:
        ArtifactError: missing, truncated, tampered with, of another base or an unknown format.
        TaskError: the task exists already, or a part of your own must be passed.
    """
    path = Path(path)
    config = read_config(path)
    name = name or config["task"]
    if name in model:
        raise TaskError(f"task '{name}' exists already; remove it first, or load with name='another'")
    own = model.base.fingerprint()
    if config["base"].get("sha256") != own and not any_base:
        raise ArtifactError(
            f"{path} was trained on another base: sha256 {str(config['base'].get('sha256'))[:12]}…, this one has "
            f"{own[:12]}…; load its own base, {_spec_text(config)}, or pass any_base=True"
        )
    if not any_base:
        check_preparation(path, config["base"].get("preparation"), model.base)
    given = {"side": side, "merge": merge, "head": head}
    try:
        parts = BranchConfig(**config["parts"])
    except TypeError as error:
        raise ArtifactError(
            f"{path / CONFIG} has a field in 'parts' that this library does not know ({error})"
        ) from error
    chosen = {kind: _part(path, kind, getattr(parts, kind), given[kind]) for kind in given}
    missing = [lateral for lateral in parts.laterals if lateral not in model]
    if missing:
        raise TaskError(f"task '{name}' uses the sides of {', '.join(missing)}; load those tasks first")
    for lateral, sha256 in config.get("laterals_sha256", {}).items():
        if lateral in model and sha256 != _lateral_sha256(model, lateral) and not any_base:
            raise ArtifactError(
                f"{path} was trained beside another task '{lateral}' than the one of this model; load that one, or pass any_base=True"
            )
    options: dict[str, Any] = {
        f"{kind}_options": None if given[kind] or not getattr(parts, kind) else getattr(parts, kind)[1]
        for kind in given
    }
    try:
        branch = build_branch(
            model.base, **chosen, **options, laterals=parts.laterals, prenorm=parts.prenorm, init=parts.init
        )  # fmt: skip
    except SideTuningError:
        raise
    except Exception as error:  # options of the wrong type or value, which each part meets in its own way
        raise ArtifactError(f"{path / CONFIG} describes parts that cannot be built ({error})") from error
    taps = config["base"].get("taps")
    if getattr(branch.side, "uses_taps", False) and taps not in (None, list(model.base.tap_shapes)) and not any_base:
        raise ArtifactError(
            f"{path} was trained on the taps {', '.join(taps)}, this base has {', '.join(model.base.tap_shapes)}; use base.with_taps(…)"
        )
    branch.labels = config.get("labels")
    tensors = _read_tensors(path / TENSORS, config["tensors_sha256"])
    problem = mismatch(branch.state_dict(), tensors)
    if problem:
        raise ArtifactError(f"{path / TENSORS} does not fit {path / CONFIG}: {problem}")
    branch.load_state_dict(tensors)
    model.add_branch(name, branch)
    return name


def load(path: str | Path, *, base: Base | None = None) -> SideTuner:
    """Rebuild a model from a saved task, or from a folder of tasks such as a run's.

    Args:
        path: a task's folder, a folder of such folders, or a run's folder.
        base: the base, where it cannot be built from its recorded spec.

    Raises:
        ArtifactError: no task there, a damaged one, or a base that has no recorded spec.
    """
    path = Path(path)
    folders = [path] if (path / CONFIG).exists() else _task_folders(path)
    if not folders:
        other = next((f for f in (path, path / "tasks") if (f / "method.json").exists()), None)
        if other is not None:
            raise ArtifactError(
                f"{other} holds tasks of another method than side-tuning; load them with methods.load_method"
            )
        raise ArtifactError(f"{path} holds no saved task ({CONFIG}); give the folder of a task or of a run")
    configs = {folder: read_config(folder) for folder in folders}
    if base is None:
        first = next(iter(configs.values()))
        spec = first["base"].get("spec")
        if spec is None:
            raise ArtifactError(
                f"{path} was trained on a base without a recorded spec; build it and pass load(…, base=base)"
            )
        try:
            base = load_base(spec["name"], revision=spec.get("revision"), **spec["options"])
        except TypeError as error:
            raise ArtifactError(
                f"{path} names a base that cannot be built ({error}); build it and pass load(…, base=base)"
            ) from error
    model = SideTuner(base)
    waiting = dict(configs)
    while waiting:  # tasks come after their laterals
        ready = [f for f, c in waiting.items() if all(t in model for t in c["parts"].get("laterals", []))]
        if not ready:
            raise ArtifactError(
                f"{path}: the laterals of {', '.join(c['task'] for c in waiting.values())} are not there"
            )
        for folder in ready:
            load_task(model, folder)
            del waiting[folder]
    return model


def _task_folders(path: Path) -> list[Path]:
    root = path / "tasks" if (path / "tasks").is_dir() else path
    return sorted(p.parent for p in root.glob(f"*/{CONFIG}"))


def _wrong_field(config: dict[str, Any]) -> str | None:
    """The first field that is not what `save_task` writes: a downloaded file may hold anything."""
    parts, spec, labels = config["parts"], config["base"].get("spec"), config.get("labels")

    def part(value: Any) -> bool:
        return isinstance(value, list) and [type(v) for v in value] == [str, dict]

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    checks = {
        "parts.side": parts.get("side") is None or part(parts.get("side")),
        "parts.merge": part(parts.get("merge")),
        "parts.head": part(parts.get("head")),
        "parts.laterals": texts(parts.get("laterals")),
        "parts.prenorm": isinstance(parts.get("prenorm"), bool),
        "parts.init": parts.get("init") in (None, "zero", "low-energy"),
        "labels": labels is None or texts(labels),
        "laterals_sha256": isinstance(config.get("laterals_sha256", {}), dict),
        "base.taps": config["base"].get("taps") is None or texts(config["base"]["taps"]),
        "base.sha256": isinstance(config["base"].get("sha256"), str),
        "base.spec": spec is None
        or (isinstance(spec, dict) and isinstance(spec.get("name"), str) and isinstance(spec.get("options"), dict)),
    }
    return next((name for name, right in checks.items() if not right), None)


def _part(path: Path, kind: str, recorded: Any, given: nn.Module | None) -> Any:
    """The registered name of a part, or the instance that must stand for a part of the user's own."""
    if recorded is None:
        return None
    name, _options = recorded
    if name != CUSTOM:
        return given or name
    if given is None:
        raise TaskError(f"the {kind} of {path} is a module of your own: pass an instance, load_task(…, {kind}=module)")
    return given


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
