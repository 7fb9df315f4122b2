"""What a model is made of, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sidetuning.branch import Branch


@dataclass(frozen=True)
class TaskSummary:
    """Parameters of a task's parts, the bytes of its tensors, and the weight of the base where the merge is alpha."""

    task: str
    side: int
    merge: int
    head: int
    bytes: int
    frozen: bool
    alpha: float | None

    @property
    def total(self) -> int:
        """All parameters of the task."""
        return self.side + self.merge + self.head


@dataclass(frozen=True)
class Summary:
    """Parameters of the base, and what each task adds; `print` it."""

    base: int
    tasks: list[TaskSummary]

    def __str__(self) -> str:
        lines = [f"base: {self.base:,} parameters, frozen"]
        width = max([len(task.task) for task in self.tasks], default=4)
        for task in self.tasks:
            share = f" ({task.total / self.base:.1%} of the base)" if self.base else ""
            alpha = "" if task.alpha is None else f", alpha {task.alpha:.2f}"
            parts = f"side {task.side:,} + merge {task.merge:,} + head {task.head:,}"
            more = f"{task.bytes / 1e6:.2f} MB{alpha}{', frozen' if task.frozen else ''}"
            lines.append(f"{task.task:{width}}: {task.total:,} parameters{share} = {parts}, {more}")
        return "\n".join(lines)


def summarise(name: str, branch: Branch) -> TaskSummary:
    """The numbers of one task."""
    side, merge, head = (_count(module) for module in (branch.side, branch.merge, branch.head))
    size = sum(t.numel() * t.element_size() for t in branch.state_dict().values() if isinstance(t, Tensor))
    return TaskSummary(name, side, merge, head, size, branch.frozen, branch.alpha)


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())
