"""What forgetting would have been: a model's other tasks, on a copy of the base that is fine-tuned on a new one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidetuning.base import Base
from sidetuning.callbacks import Deadline
from sidetuning.data import Rows, TaskData, load
from sidetuning.errors import DataError, SideTuningError, TaskError
from sidetuning.files import read_json
from sidetuning.scoring import score
from sidetuning.sides.copy import CopySide
from sidetuning.training import fit
from sidetuning.tuner import SideTuner

# Rows of a step, and passes over the training rows at most.
BATCH, PASSES = 32, 20
# The name of the fine-tuned network among the tasks.
TUNED = "fine-tuned"
# Rows of each other task that are asked at most.
ASKED = 300
# What is read of the file that `sidetuning train` writes beside a task.
COLUMNS = {"image?": str, "text?": [str], "label?": [str], "problem?": str}
TRAINING = {"data": str, "seed": int, "columns?": COLUMNS}
MEND = "learn the task again with sidetuning train --replace"


class Batches:
    """Rows as the base takes them, in another order at each pass."""

    def __init__(self, base: Base, rows: Rows, seed: int) -> None:
        self.base, self.rows = base, rows
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.rows) // BATCH)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for some in torch.randperm(len(self.rows), generator=self.generator).split(BATCH):
            rows = some.tolist()
            try:
                yield self.rows.batch(self.base, rows)
            except DataError:
                # A row that cannot be read was told when the task was learned.
                if rows := [row for row in rows if self._reads(row)]:
                    yield self.rows.batch(self.base, rows)

    def _reads(self, row: int) -> bool:
        with contextlib.suppress(DataError):
            self.rows.batch(self.base, [row])
            return True
        return False


def rows_again(folder: Path, labels: Sequence[str] | None) -> Rows:
    """Some of the rows that `sidetuning train` scored a task on, read from the task's data again.

    Raises:
        DataError: the task was not learned so, or its data are no longer there.
    """
    about = read_json(folder / "training.json", TRAINING, MEND) if (folder / "training.json").exists() else {}
    if "seed" not in about:
        raise DataError("it was not learned by sidetuning train")
    data = load(about["data"], **(about.get("columns") or {}), names=labels, seed=about["seed"])
    rows = data.splits["test" if "test" in data.splits else "validation"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(about["seed"]))
    return rows.take(order[:ASKED].tolist())


def would_forget(
    model: SideTuner,
    data: TaskData,
    others: Mapping[str, Rows],
    *,
    seconds: float,
    lr: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune a copy of the base on new data, and ask the model's other tasks on that copy.

    The model does not change. The copy is trained as any network is, its batch norms in training mode.

    Args:
        model: with the other tasks.
        data: the new task's.
        others: rows of other tasks whose answers are known.
        seconds: for fine-tuning.
        lr: learning rate of AdamW.
        seed: seed of the order, and of the new head.
        progress: show bars.

    Returns:
        "steps" that were taken, and "tasks": of each other task its name as "task", its "rows", the "measure"
        ("accuracy", or "mae" where it answers with numbers), and its value "before" and "after".

    Raises:
        TaskError: the base cannot be copied and trained.
    """
    base = model.base
    tuning = SideTuner(base)
    how: dict[str, Any] = {"head_options": {"outputs": len(data.names)}, "problem": data.problem, "seed": seed}
    try:
        head = "tokens" if data.problem == "tokens" else "linear"
        tuning.add_task(TUNED, side="copy", merge="side-only", head=head, **how)
    except SideTuningError as error:
        raise TaskError(f"what forgetting would have been is not known: {error}") from error
    side = tuning[TUNED].side
    assert isinstance(side, CopySide)
    loader, ends = Batches(base, data.splits["train"], seed), [Deadline(seconds)]
    done = fit(tuning, TUNED, loader, epochs=PASSES, lr=lr, callbacks=ends, seed=seed, progress=progress)
    tuned = SideTuner(base.with_net(side.net))
    for name in model.tasks:
        tuned.add_branch(name, copy.deepcopy(model[name]))
    found = []
    for name, rows in others.items():
        before, after = (score(each, name, rows, progress=False).scores() for each in (model, tuned))
        measure = "mae" if "mae" in before else "accuracy"
        values = {"measure": measure, "before": before[measure], "after": after[measure]}
        found.append({"task": name, "rows": len(rows), **values})
    return {"steps": done.steps, "tasks": found}
