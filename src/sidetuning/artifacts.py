"""A task on disk: `side.safetensors` holds its tensors and, in its header, what it is and which base it belongs to.

`side.json` says the same for people and for other programs. One file that is replaced whole cannot disagree with
itself, wherever a save is cut short; the text's own checksum tells that nobody changed it. No pickle is ever read or
written.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import Tensor, nn

from sidetuning.base import Base
from sidetuning.beside import found_beside, hash_of, hash_of_file, is_beside, write_beside
from sidetuning.branch import CUSTOM, Branch, BranchConfig, build_branch
from sidetuning.checks import Sized
from sidetuning.errors import ArtifactError, SideTuningError, TaskError
from sidetuning.files import (
    atomic_write,
    check_json,
    check_signed,
    json_text,
    parse_json,
    read_json,
    read_safetensors,
    safetensors_header,
    signed,
)
from sidetuning.heads import IN_UNITS, InUnits, LanguageHead
from sidetuning.identity import Identity
from sidetuning.outputs import Layout
from sidetuning.sides.copy import Dead
from sidetuning.sides.initialise import layout, mismatch, plain
from sidetuning.transforms import transform_from

# Version 1 had the text in `side.json` alone, without a checksum.
FORMAT_VERSION = 2
MEND = "fetch or save the task again"
# What a task is, as its text has it, and its tensors.
SavedTask = tuple[dict[str, Any], dict[str, Tensor]]
# What `side.json` alone tells.
NOTES = ("metrics", "created")
CONFIG, TENSORS = "side.json", "side.safetensors"
# A downloaded file may hold anything. A part is its name and its options.
PART = (str, dict)
SCHEMA = {
    "task": str,
    "tensors_sha256": str,
    "sha256?": str,
    "labels?": [str],
    "laterals_sha256?": dict,
    "passes?": int,
    "parameters?": int,
    "trained_as?": {"labels", "numbers", "own"},
    "frozen?": bool,
    "fresh?": bool,
    "transform?": {"kind": str},
    "metrics?": dict,
    "parts": {
        "side?": PART,
        "merge": PART,
        "head": PART,
        "laterals": [str],
        "prenorm": bool,
        "init?": {"zero", "low-energy"},
        "problem?": str,
        "layouts?": dict,
    },
    "base": {
        "sha256": str,
        "taps?": [str],
        "output_shape?": [int],
        "preparation?": dict,
        "probe?": [float],
        "spec?": {"name": str, "options": dict, "revision?": str},
    },
}


def write_task(
    path: str | Path,
    name: str,
    branch: Branch,
    base: Base,
    identity: Identity,
    laterals: Mapping[str, str],
    metrics: Mapping[str, float],
) -> None:
    """Write a task to the folder `path`, with the identity of the base it belongs to.

    Args:
        path: the folder.
        name: name of the task.
        branch: side, merge and head of the task.
        base: the base that it was trained on.
        identity: that of the base.
        laterals: the sha256 of the sides of earlier tasks that it reads, by task.
        metrics: numbers to record with the task.

    Raises:
        TaskError: an option of a part, or another value, that JSON does not have.
    """
    _check_built(name, branch)
    tensors = _tensors(branch)
    layouts = {tap: layout for tap, layout in branch.config.layouts.items() if tap in branch.taps}
    spec = None if base.spec is None else asdict(base.spec)
    transform = branch.transform or base.transform
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": _version(),
        "task": name,
        "parts": {**asdict(branch.config), "layouts": layouts, "head": recorded_head(branch)},
        "alpha": branch.alpha,
        "parameters": sum(parameter.numel() for parameter in branch.parameters()),
        **_notes(branch),
        "transform": None if transform is None else transform.to_json(),
        "metrics": {key: float(value) for key, value in metrics.items()},
        "laterals_sha256": dict(laterals),
        "base": {"spec": spec, **identity.record(), "taps": list(branch.taps)},
    }
    try:
        # Before the task's own files: a save that is cut short leaves what is not believed, see `changing.kept_sums`.
        write_beside(Path(path), branch.beside)
        branch.written.add(write_files(path, config, tensors))
    except TypeError as error:
        raise TaskError(
            f"task '{name}' cannot be saved: {error}; give its options as plain numbers and texts"
        ) from error


def _notes(branch: Branch) -> dict[str, Any]:
    """What is saved of a branch beside its parts and weights."""
    notes = {name: getattr(branch, name) for name in ("labels", "passes", "trained_as", "frozen")}
    return {**notes, "fresh": isinstance(branch.head, InUnits) and branch.head.fresh}


@functools.cache
def _version() -> str:
    return version("sidetuning")


def _check_built(name: str, branch: Branch) -> None:
    """Raise TaskError where a registered part was changed after it was built, so that a rebuild would not fit."""
    own = tuple(kind for kind in ("side", "merge", "head") if (getattr(branch.config, kind) or (CUSTOM,))[0] == CUSTOM)
    found = layout(branch)
    for key in sorted(found.keys() | branch.built.keys()):
        was, now = branch.built.get(key, "not there"), found.get(key, "gone")
        # Units are measured later.
        if was != now and key.partition(".")[0] not in own and key != "head.units":
            raise TaskError(
                f"task '{name}' was changed after it was built: '{key}' was {was} and is {now}, so it could not be "
                "loaded; change a module of your own, and give that to add_task"
            )


def recorded_head(branch: Branch) -> tuple[str, dict[str, Any]]:
    """Name and options of a head, with the units that were measured since it was built, or its weights' hash."""
    name, options = branch.config.head
    if isinstance(branch.head, LanguageHead):
        return name, {**options, "sha256": branch.head.model.sha256()}
    if branch.units is None or name not in IN_UNITS:
        return name, options
    centre, scale = branch.units.tolist()
    return name, {**options, "centre": centre, "scale": scale}


def write_files(path: str | Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> str:
    """Write a task's two files, the tensors' with the text in it first.

    Returns:
        The hash of the tensors.

    Raises:
        TypeError: a value that JSON does not have.
    """
    path, sha256 = Path(path), hash_of(tensors)
    config = {**config, "format_version": FORMAT_VERSION, "tensors_sha256": sha256}
    # Equal tasks have equal tensor files, whenever they are saved and whatever was measured. One entry: safetensors
    # writes several in any order.
    inner = {key: value for key, value in config.items() if key not in NOTES}
    data = save(tensors, metadata={"sidetuning": json_text(signed(inner))})
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json_text(signed({**config, "created": created}))
    with atomic_write(path / CONFIG) as config_file, atomic_write(path / TENSORS) as tensors_file:
        config_file.write_text(text, encoding="utf-8")
        tensors_file.write_bytes(data)
    return sha256


def is_saved(path: str | Path, name: str, branch: Branch, identity: Identity, laterals: Mapping[str, str]) -> bool:
    """Whether the folder `path` holds this task with all that `write_task` would write now, but for its metrics."""
    try:
        config, _ = read_task(path)
    except (ArtifactError, OSError):
        return False
    notes = {"task": name, **_notes(branch)}
    if branch.transform is not None:
        notes["transform"] = branch.transform.to_json()
    same = all((config.get(key) or None) == (value or None) for key, value in notes.items())
    parts = json.loads(json.dumps({**asdict(branch.config), "layouts": None, "head": recorded_head(branch)}))
    same = same and all(config["parts"].get(key, part) == part for key, part in parts.items() if key != "layouts")
    same = same and config.get("laterals_sha256", laterals) == laterals and not identity.difference(config["base"])
    return same and config["tensors_sha256"] == tensors_sha256(branch) and is_beside(Path(path), branch.beside)


def has_tensors(path: Path, hashes: Collection[str]) -> bool:
    """Whether the folder `path` holds a task whose weights have one of these hashes."""
    try:
        return read_task(path)[0]["tensors_sha256"] in hashes
    except (ArtifactError, OSError):
        return False


def tensors_sha256(module: nn.Module | None) -> str:
    """sha256 over a module's tensors, as they are saved."""
    return hashlib.sha256(b"").hexdigest() if module is None else hash_of(_tensors(module))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    # A clone each: safetensors refuses tensors that share memory.
    return {plain(key): value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}


def read_task(path: str | Path) -> SavedTask:
    """What the task at `path` is, and its tensors, of one version even while another process saves it anew.

    Raises:
        ArtifactError: no task there, an unknown format version, or a file that is damaged or was changed.
    """
    file, tensor_file = Path(path) / CONFIG, Path(path) / TENSORS
    try:
        content = read_json(file, {}, MEND)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} holds no task: {CONFIG} is missing") from error
    # The version first: of another one the fields may be others.
    found = content.get("format_version")
    if type(found) is not int or not 1 <= found <= FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format_version {found!r} and this library reads 1 to {FORMAT_VERSION}; "
            "install the version of sidetuning that wrote it, or a newer one"
        )
    config: dict[str, Any] = check_json(content, str(file), SCHEMA, MEND)
    try:
        data = read_safetensors(tensor_file)
        values = parse(data)
    except FileNotFoundError as error:
        raise ArtifactError(f"{tensor_file} is missing; {MEND}") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{tensor_file} is truncated or not a safetensors file ({error}); {MEND}") from error
    if found == 1:
        sha256 = hashlib.sha256(data).hexdigest()
    else:
        text = safetensors_header(data).get("sidetuning", "")
        inner: dict[str, Any] = parse_json(text, str(tensor_file), dict, MEND)
        notes, inner = check_signed(config, str(file), MEND), check_signed(inner, str(tensor_file), MEND)
        # Texts that say the same need not be looked through twice.
        if inner != {key: value for key, value in notes.items() if key not in NOTES}:
            check_json(inner, str(tensor_file), SCHEMA, MEND)
        config = {key: notes[key] for key in NOTES if key in notes} | inner
        sha256 = hash_of_file(data)
        # Another version of safetensors may have written the same tensors in another order.
        sha256 = sha256 if sha256 == config["tensors_sha256"] else hash_of(values)
    if sha256 != config["tensors_sha256"]:
        raise ArtifactError(f"{tensor_file} is truncated or was changed: its sha256 is not the one recorded; {MEND}")
    return config, values


def read_branch(
    path: str | Path,
    task: SavedTask,
    base: Base,
    identity: Identity,
    own: Mapping[str, nn.Module | None],
    *,
    any_base: bool = False,
) -> Branch:
    """Build the branch of the task saved at `path`, with its weights.

    Args:
        path: the folder.
        task: what `read_task` gave of it.
        base: what it is built on.
        identity: that of the base.
        own: instances of the parts "side", "merge" and "head" that were the user's own modules.
        any_base: take another base than the one that it was trained on.

    Raises:
        ArtifactError: another base, parts that cannot be built, or tensors that are damaged or do not fit.
        TaskError: a part of the user's own is not given, or is given where a registered one was used.
    """
    path, (config, tensors) = Path(path), task
    recorded = config["base"]
    difference = identity.difference(recorded)
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
    for kind in ("side", "merge", "head"):
        chosen[kind], options = _part(path, kind, getattr(parts, kind), own.get(kind))
        chosen[f"{kind}_options"] = options
    taps, layouts = recorded.get("taps") or [], config["parts"].get("layouts")
    if layouts is None and base.causal and chosen["side"] in ("transformer", "ladder"):
        # Sides of older files saw later tokens, whatever the base did.
        chosen["side_options"] = {"causal": False, **(chosen["side_options"] or {})}
    if any_base and chosen["head"] == "lm":
        chosen["head_options"] = {}
    shared = {key: getattr(parts, key) for key in ("laterals", "prenorm", "init", "problem")}
    try:
        # Older files know one layout for all maps of a network, right or not; their tasks were trained on that.
        last = (recorded.get("preparation") or {}).get("channels_last")
        every: Layout | None = None if layouts is not None else "nhwc" if last else "nchw"
        tapped = base.with_taps({tap: (layouts or {}).get(tap) for tap in taps}, every) if taps else base
        with Sized(tensors):
            branch = build_branch(tapped, **chosen, **shared)
    except ArtifactError as error:
        raise ArtifactError(f"{path / CONFIG} describes parts that do not fit {TENSORS}: {error}; {MEND}") from error
    except SideTuningError:
        raise
    except Exception as error:
        # Options of the wrong type or value, which each part meets in its own way.
        raise ArtifactError(f"{path / CONFIG} describes parts that cannot be built ({error})") from error
    branch.labels, branch.passes = config.get("labels"), config.get("passes") or 0
    branch.trained_as = config.get("trained_as")
    if config.get("transform") is not None and base.transform is not None:
        branch.transform = transform_from(config["transform"], base)
    branch.beside, branch.written = found_beside(path), {config["tensors_sha256"]}
    _fill(path, branch, tensors, base.like.dtype, any_base)
    if config.get("fresh") and isinstance(branch.head, InUnits):
        branch.head.built = branch.head.weights_sha256()
    return branch.requires_grad_(False) if config.get("frozen") else branch


def _fill(path: Path, branch: Branch, tensors: dict[str, Tensor], dtype: torch.dtype, any_base: bool) -> None:
    """Give a branch its weights; ArtifactError where they are not those of such a branch, or of another type."""
    state = {plain(name): (name, tensor) for name, tensor in branch.state_dict().items()}
    tensors = {plain(name): tensor for name, tensor in tensors.items()}
    if tensors.keys() - state.keys():
        # Earlier versions kept parts that the code does not depend on.
        dead = tuple(f"{plain(name)}." for name, part in branch.named_modules() if isinstance(part, Dead))
        tensors = {name: tensor for name, tensor in tensors.items() if not dead or not name.startswith(dead)}
    problem = mismatch({name: tensor for name, (_, tensor) in state.items()}, tensors)
    if problem:
        raise ArtifactError(f"{path / TENSORS} does not fit {path / CONFIG}: {problem}")
    # Units stay in single precision.
    weights = [tensor for name, tensor in tensors.items() if tensor.is_floating_point() and name != "head.units"]
    others = [weight.dtype for weight in weights if weight.dtype != dtype]
    if others and not any_base:
        raise ArtifactError(
            f"{path} holds weights in {others[0]} and this model computes in {dtype}; pass any_base=True to round them"
        )
    # In its type before the weights are there: none is rounded on the way.
    branch.to(dtype)
    branch.load_state_dict({state[name][0]: tensor for name, tensor in tensors.items()})


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


def _spec_text(config: dict[str, Any]) -> str:
    spec = config["base"].get("spec")
    if not spec:
        return "which has no recorded spec"
    shown = [f"{k}={v!r}" for k, v in spec["options"].items() if k != "calibration"]
    return f"load_base({', '.join([repr(spec['name']), *shown])})"
