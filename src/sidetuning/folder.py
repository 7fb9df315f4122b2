"""A model folder on disk: which tasks it holds, and their removal and renaming, without building the base."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sidetuning.artifacts import CONFIG, TENSORS, SavedTask, read_task, write_files
from sidetuning.branch import BY_HEAD
from sidetuning.checks import check_name
from sidetuning.errors import ArtifactError, TaskError, UnknownNameError
from sidetuning.files import held_folder, read_json, write_json
from sidetuning.registry import unknown

# Where a task that comes or goes lies meanwhile; two levels deep, where nobody looks for tasks.
ASIDE = ".aside."
# What training leaves beside the tasks: a page about all of them, what it says of each, and work that was interrupted.
PAGE, NOTES, WORK = "report.html", "report.json", ".work"


@dataclass(frozen=True)
class TaskInfo:
    """What the files of a task tell.

    Attributes:
        task: its name.
        problem: what its targets mean.
        labels: names of its classes, where it has them.
        side, merge, head: names of its parts.
        laterals: earlier tasks whose sides it reads.
        parameters: numbers that are learned; of tasks of older versions all that are stored.
        bytes: size of its files.
        metrics: what was measured when it was saved.
        created: when it was saved, in ISO format.
        base: name of its base; None for a base of the user's own.
        base_sha256: hash of the weights of its base.
    """

    task: str
    problem: str
    labels: list[str] | None
    side: str | None
    merge: str
    head: str
    laterals: list[str]
    parameters: int
    bytes: int
    metrics: dict[str, float]
    created: str | None
    base: str | None
    base_sha256: str

    def record(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def task_root(path: str | Path) -> Path:
    """Where the folders of the tasks are: `path` itself, or `tasks` within it."""
    return Path(path) / "tasks" if (Path(path) / "tasks").is_dir() else Path(path)


def task_folders(path: str | Path) -> list[Path]:
    """The folders of the tasks of a model folder, and of those that lost one of their two files."""
    root = task_root(path)
    return sorted({file.parent for name in (CONFIG, TENSORS) for file in root.glob(f"*/{name}")})


def saved_tasks(path: str | Path) -> dict[str, tuple[Path, SavedTask]]:
    """The tasks of a model folder, or of one task's folder: their folders, and what they hold.

    Raises:
        ArtifactError: there is none, or one is damaged.
    """
    path = Path(path)
    folders = [path] if (path / CONFIG).exists() else task_folders(path)
    if not folders:
        what = f"holds no saved task ({CONFIG})" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {what}; give a model folder, or the folder of a task")
    found: dict[str, tuple[Path, SavedTask]] = {}
    for folder in folders:
        task = read_task(folder)
        if (name := task[0]["task"]) in found:
            raise ArtifactError(
                f"{found[name][0]} and {folder} both hold the task '{name}'; move one of them out of {path}"
            )
        found[name] = folder, task
    return found


def described(path: str | Path, name: str | None = None) -> list[TaskInfo]:
    """What the files of a model folder tell of each task, or of the one called `name`."""
    found = saved_tasks(path)
    return [_info(*found[task]) for task in ([_known(path, name, found)] if name is not None else found)]


def problem_of(config: Mapping[str, Any]) -> str:
    """What the targets of a task mean, of its text."""
    parts = config["parts"]
    return str(parts.get("problem") or config.get("trained_as") or BY_HEAD.get(parts["head"][0], "classes"))


def _info(folder: Path, task: SavedTask) -> TaskInfo:
    config, tensors = task
    parts, base = config["parts"], config["base"]
    head = parts["head"][0]
    return TaskInfo(
        task=config["task"],
        problem=problem_of(config),
        labels=config.get("labels"),
        side=parts["side"][0] if parts.get("side") else None,
        merge=parts["merge"][0],
        head=head,
        laterals=parts["laterals"],
        # Older versions did not count them apart from buffers.
        parameters=config.get("parameters") or sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum((folder / file).stat().st_size for file in (CONFIG, TENSORS)),
        metrics=config.get("metrics") or {},
        created=config.get("created"),
        base=base["spec"]["name"] if base.get("spec") else None,
        base_sha256=base["sha256"],
    )


def _known(path: str | Path, name: str, found: dict[str, Any]) -> str:
    """The name, if the folder has such a task."""
    if name not in found:
        raise UnknownNameError(unknown("task", name, found, verb=f"in {path}"))
    return name


def users_of(name: str, found: dict[str, tuple[Path, SavedTask]]) -> list[str]:
    """The saved tasks that read the side of this one."""
    return [task for task, (_, (config, _)) in found.items() if name in config["parts"]["laterals"]]


@contextlib.contextmanager
def changing(path: str | Path) -> Iterator[dict[str, tuple[Path, SavedTask]]]:
    """Hold a model folder and read its tasks; what an earlier change left is deleted.

    Raises:
        ArtifactError: the folder is that of one task, or another process holds it.
    """
    if not task_folders(path):
        raise ArtifactError(f"{path} is no model folder; give the folder that holds the folders of the tasks")
    with held_folder(path):
        for left in Path(path).glob(f"{ASIDE}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield saved_tasks(path)


def remove(path: str | Path, name: str) -> bool:
    """Delete a task's whole folder from a model folder, and the page that shows its mistakes.

    Returns:
        Whether there was such a page; the next report is about the other tasks.

    Raises:
        UnknownNameError: there is no such task.
        TaskError: other tasks read its side.
        ArtifactError: it is no model folder, or another process works in it.
    """
    with changing(path) as found:
        folder = found[_known(path, name, found)][0]
        if users := users_of(name, found):
            raise TaskError(f"task '{name}' is a lateral of {', '.join(users)}; remove those first")
        shown = _unpublish(Path(path))
        with _aside(Path(path)) as aside:
            # Gone in one step, then deleted.
            folder.replace(aside / name)
            if (work := Path(path) / WORK / name).exists():
                work.replace(aside / WORK)
    return shown


def rename(path: str | Path, name: str, new: str) -> bool:
    """Give a task of a model folder another name; tasks that read its side are told.

    Whenever it is interrupted, every task of the folder can still be loaded.

    Returns:
        Whether there was a page about the tasks, which had the old name and was deleted.

    Raises:
        UnknownNameError: there is no such task.
        TaskError: the new name is taken, or not allowed.
        ArtifactError: it is no model folder, or another process works in it.
    """
    check_name(new)
    with changing(path) as found:
        folder, (config, tensors) = found[_known(path, name, found)]
        target = folder.with_name(new)
        if new in found or target.exists():
            raise TaskError(f"task '{new}' exists already in {path}; choose another name")
        with _aside(Path(path)) as aside:
            # What else lies beside the task, such as a report, goes with it.
            shutil.copytree(folder, aside / new, ignore=shutil.ignore_patterns("*.tmp"))
            write_files(aside / new, {**config, "task": new}, tensors)
            if (notes := aside / new / NOTES).exists():
                write_json(notes, {**read_json(notes, {}, "score the task again"), "task": new})
            shown = _unpublish(Path(path))
            (aside / new).replace(target)
            for user in users_of(name, found):
                place, (text, own) = found[user]
                write_files(place, _renamed(text, name, new), own)
            folder.replace(aside / name)
    return shown


def _unpublish(path: Path) -> bool:
    """Delete the page about all tasks, which `sidetuning evaluate … --report` writes again."""
    shown = (path / PAGE).exists()
    (path / PAGE).unlink(missing_ok=True)
    return shown


def _renamed(config: dict[str, Any], name: str, new: str) -> dict[str, Any]:
    """A task's text with another name of one of its laterals."""
    laterals = [new if lateral == name else lateral for lateral in config["parts"]["laterals"]]
    hashes = {new if lateral == name else lateral: sha for lateral, sha in config.get("laterals_sha256", {}).items()}
    return {**config, "parts": {**config["parts"], "laterals": laterals}, "laterals_sha256": hashes}


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A place in the folder where no task is looked for; it is deleted with all that lies there."""
    aside = path / f"{ASIDE}{os.getpid()}"
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside)
