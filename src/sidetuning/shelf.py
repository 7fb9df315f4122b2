"""Saved tasks of which a model keeps some in memory, the most used; the others wait in their folders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from sidetuning.artifacts import CONFIG, MEND
from sidetuning.branch import Branch
from sidetuning.content import weights_version
from sidetuning.errors import ArtifactError, TaskError
from sidetuning.files import read_json
from sidetuning.identity import Identity


class Shelf:
    """The saved tasks of a model, and which of them are in memory.

    Args:
        folders: the folder of each task.
        identity: that of the base.
        most: how many tasks are kept in memory.

    Raises:
        TaskError: fewer than one.
    """

    def __init__(self, folders: Mapping[str, Path], identity: Identity, most: int) -> None:
        if most < 1:
            raise TaskError(f"max_tasks_in_memory must be 1 or more, not {most}")
        self.folders, self.identity, self.most = dict(folders), identity, most
        # Tasks that are being read: one, and its laterals.
        self.reading: set[str] = set()
        # When each task in memory was used last, and its weights as they were read.
        self._used: dict[str, int] = {}
        self._read: dict[str, Any] = {}
        self._laterals: dict[str, list[str]] = {}
        self._clock = count()

    def laterals(self) -> dict[str, list[str]]:
        """The laterals of each task, as the texts in the folders told once; a damaged one tells of none."""
        for task in self.folders.keys() - self._laterals.keys():
            with contextlib.suppress(ArtifactError, OSError, KeyError, TypeError):
                self._laterals[task] = list(read_json(self.folders[task] / CONFIG, {}, MEND)["parts"]["laterals"])
        return {task: self._laterals[task] for task in self.folders if task in self._laterals}

    @contextlib.contextmanager
    def reads(self, task: str) -> Iterator[None]:
        """Note that a task is being read while the block runs."""
        self.reading.add(task)
        try:
            yield
        finally:
            self.reading.discard(task)

    def take(self, task: str, branches: Mapping[str, nn.Module | None]) -> list[str]:
        """Note that a task, which is in memory, is used.

        Returns:
            The tasks that leave memory: the least used. What was changed since it was read stays, as do laterals.
        """
        if task not in self._read:
            self._read[task] = _versions(branches[task])
        self._used[task] = next(self._clock)
        if len(self._used) <= self.most:
            return []
        left = []
        for name in sorted(self._used, key=self._used.__getitem__):
            if len(self._used) <= self.most:
                break
            branch = branches.get(name)
            if branch is None or (name != task and self._unchanged(name, branch)):
                del self._used[name], self._read[name]
                left += [] if branch is None else [name]
        return left

    def _unchanged(self, name: str, branch: nn.Module) -> bool:
        assert isinstance(branch, Branch)
        busy = branch.pinned or branch.training or branch.learning
        return not busy and self._read[name] == _versions(branch)


def _versions(branch: nn.Module | None) -> Any:
    """Equal as long as nobody wrote into a branch's tensors, or put others there, or changed its notes."""
    assert isinstance(branch, Branch)
    asked = weights_version(branch), [parameter.requires_grad for parameter in branch.parameters()]
    labels = None if branch.labels is None else list(branch.labels)
    return asked, dict(branch.beside), labels, branch.transform, branch.passes, branch.trained_as
