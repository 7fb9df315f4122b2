"""`st.auto`: a task from data, without options. The base runs once; then a few sides are tried on its features.

The first answer is a solution in closed form. Candidates share what is left of the time equally, and the best by the
validation rows is kept.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import OneCycleLR

from sidetuning.base import Base
from sidetuning.branch import Branch
from sidetuning.callbacks import Deadline
from sidetuning.closed_form import solve
from sidetuning.data import TaskData, complete, load
from sidetuning.encoding import Encoded, affordable, encode
from sidetuning.errors import DataError, SideTuningError, TaskError
from sidetuning.files import read_json, write_json
from sidetuning.tags import SCORE, are_tags
from sidetuning.tapping import with_chosen_taps
from sidetuning.training import evaluate, fit
from sidetuning.tuner import SideTuner

# Passes over the training rows at most, and validations without a better one after which a candidate ends.
PASSES, PATIENCE = 60, 12
# Steps whose time is measured first.
MEASURED = 6
# Rows that were left out are named up to so many; the report has all.
SAID = 10
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """A side to try: its name, merge, start and learning rate; `solved` starts from the head in closed form.

    Without a side the head is solved alone: a linear one, or one on a random expansion of the taps.
    """

    side: str | None
    merge: str = "alpha"
    init: str | None = None
    lr: float = 3e-3
    solved: bool = False
    head: str = "linear"

    def __str__(self) -> str:
        if self.side is None:
            return f"{self.head} head, closed form"
        start = ", from the closed form" if self.solved else ""
        return f"{self.side} + {self.merge}, lr {self.lr:g}{start}"


@dataclass
class Attempt:
    """What became of a recipe.

    Attributes:
        name: the recipe, in words.
        loss: mean loss of the validation rows, which decides: of few rows it tells more than a share that is right.
        score: its number on the validation rows, as `measure` names it.
        steps, seconds: steps of the optimiser, and time.
        parameters: numbers that the task stores.
        curve: `measure` after each pass.
    """

    name: str
    loss: float
    score: float
    steps: int
    seconds: float
    parameters: int
    curve: list[float] = field(default_factory=list)


@dataclass
class AutoResult:
    """What `auto` did.

    Attributes:
        task: name of the task.
        measure: the number that is shown of each attempt: "accuracy", "mae" or "entity f1".
        chosen: the candidate that was kept, in words.
        attempts: all candidates.
        scores: numbers of the splits, by their names.
        notes: what was guessed, made and left out.
        seconds: of all, and in `encoding` of the base pass.
        encoding: seconds of decoding and of the base pass.
        rows: rows of each split.
    """

    task: str
    measure: str
    chosen: str
    attempts: list[Attempt]
    scores: dict[str, dict[str, float]]
    notes: list[str]
    seconds: float
    encoding: float
    rows: dict[str, int]

    def record(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


def auto(
    model: SideTuner,
    task: str,
    data: TaskData | str | Path,
    *,
    cache: str | Path,
    side: str = "auto",
    budget: float = 120.0,
    balance: bool = False,
    mirror: bool = False,
    first: Callable[[SideTuner], None] | None = None,
    say: Say | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AutoResult:
    """Add a task to a model and learn it.

    Args:
        model: the model; its other tasks do not change.
        task: name of the new task.
        data: what `st.data.load` gave, or its source.
        cache: folder for features and unfinished candidates; the same call resumes from there.
        side: "auto" tries what fits the base; "none" solves a linear head alone; or a registered side.
        budget: seconds for all candidates together, after the base pass.
        balance: repeat the rows of rare classes, so that all classes have as many.
        mirror: learn from each image's mirror image too.
        first: called with the model when the task has its first answer, such as to save it.
        say: called with a sentence about each thing that was done.
        seed: seed of everything that is drawn.
        progress: show bars.

    Raises:
        TaskError: the task exists, or no side of that name fits the base.
        DataError: data that the base does not read.
    """
    started = time.monotonic()
    say = say or (lambda text: None)
    if not (math.isfinite(budget) and budget > 0):
        raise TaskError(f"budget must be a positive number of seconds, not {budget}")
    model._check_name(task)
    data = data if isinstance(data, TaskData) else load(data, seed=seed)
    check_kind(model.base, data)
    if balance and data.problem != "classes":
        raise TaskError(f"only classes are balanced, and these are {data.problem}; leave --balance out")
    data = complete(data, seed) if "validation" not in data.splits else data
    base = model.base
    if side != "none":
        base = affordable(with_chosen_taps(base), base, data.splits["train"])
    splits = {
        name: encode(base, rows, cache, mirror=mirror and name == "train", progress=progress)
        for name, rows in data.splits.items()
    }
    encoding = time.monotonic() - started
    left = [f"left out of {name}: {told}" for name, split in splits.items() for told in split.unreadable]
    notes = [*data.notes, *left]
    for told in left[:SAID]:
        say(told)
    if len(left) > SAID:
        say(f"and {len(left) - SAID} more; the report names them")
    say(f"{sum(len(s.kept) for s in splits.values())} rows went through the base in {encoding:.0f} s")
    what = [base.identity().digest(), *(rows.fingerprint() for rows in data.splits.values())]
    how = f"{what} {balance} {mirror} {budget} {seed}"
    folder = Path(cache) / f"{task}-{hashlib.sha256(how.encode()).hexdigest()[:8]}"
    search = _Search(base, data, splits, folder, balance, seed)
    attempts, best = _try(search, model, task, side, budget, first, say)
    scores = {name: search.scores(best[0], name) for name in splits if name != "train"}
    rows = {name: len(split.kept) for name, split in splits.items()}
    seconds = time.monotonic() - started
    return AutoResult(task, search.measure, best[1].name, attempts, scores, notes, seconds, encoding, rows)


def _try(
    search: _Search,
    model: SideTuner,
    task: str,
    side: str,
    budget: float,
    first: Callable[[SideTuner], None] | None,
    say: Say,
) -> tuple[list[Attempt], tuple[Branch, Attempt]]:
    """Learn all candidates, and leave the best one in the model; other arguments are those of `auto`."""
    # A side that does not fit is refused before anything takes a task's place.
    tried = search.candidates(side)
    branch, attempt = search.solved(Recipe(None))
    attempts, best = [attempt], (branch, attempt)
    model.add_branch(task, branch)
    say(f"{search.told(attempt)}, in {attempt.seconds:.1f} s")
    if first is not None:
        first(model)
    share = budget / max(1, sum(recipe.side is not None for recipe in tried))
    for recipe in tried:
        if recipe.side is None:
            branch, attempt = search.solved(recipe)
        else:
            say(f"{recipe}: learning for {share:.0f} s at most …")
            branch, attempt = search.learn(recipe, share)
        attempts.append(attempt)
        steps = f"{attempt.steps} step{'s' * (attempt.steps > 1)} " if attempt.steps else ""
        say(f"{search.told(attempt)}, {steps}in {attempt.seconds:.{0 if steps else 1}f} s")
        if attempt.loss < best[1].loss or math.isnan(best[1].loss):
            best = (branch, attempt)
            model.remove_task(task)
            model.add_branch(task, branch)
    return attempts, best


def check_kind(base: Base, data: TaskData) -> None:
    """Raise DataError where a base does not read images, or texts, as the data have them."""
    kind = None if base.transform is None else base.transform.to_json()["kind"]
    if kind != data.kind:
        reads = f"{kind}s" if kind else "neither images nor texts"
        raise DataError(f"the data are {data.kind}s and this base reads {reads}; choose another base, or the columns")


class _Search:
    """The candidates of one task, on features that are known."""

    def __init__(
        self, base: Base, data: TaskData, splits: dict[str, Encoded], folder: Path, balance: bool, seed: int
    ) -> None:
        self.base, self.data, self.splits, self.folder, self.seed = base, data, splits, folder, seed
        size = batch_of(len(splits["train"].kept))
        self.train = splits["train"].loader(shuffle=True, balance=balance, batch_size=size)
        self.measure = "mae" if data.problem == "numbers" else "accuracy"
        if data.problem == "tokens" and are_tags(data.names):
            self.measure = SCORE

    def model(self, recipe: Recipe) -> SideTuner:
        """A model with one task, "task", of these parts."""
        model = SideTuner(self.base)
        head = "tokens" if self.data.problem == "tokens" else recipe.head
        how: dict[str, Any] = {"head": head, "head_options": {"outputs": len(self.data.names)}}
        how |= {"problem": self.data.problem, "seed": self.seed}
        merge = "base-only" if recipe.side is None else recipe.merge
        model.add_task("task", side=recipe.side, merge=merge, init=recipe.init, labels=self.data.names, **how)
        model["task"].transform = self.data.splits["train"].transform(self.base)
        return model

    def scores(self, branch: Branch, split: str) -> dict[str, float]:
        """The numbers of a branch on a split."""
        model = SideTuner(self.base)
        model.add_branch("task", branch)
        return evaluate(model, "task", self.splits[split].loader(batch_size=256))

    def told(self, attempt: Attempt) -> str:
        """An attempt in words."""
        return f"{attempt.name}: {self.measure} {attempt.score:.4g}, loss {attempt.loss:.4g} on the validation rows"

    def solved(self, recipe: Recipe) -> tuple[Branch, Attempt]:
        """A head in closed form."""
        started = time.monotonic()
        model = self.model(recipe)
        solve(model, "task", self.train, progress=False)
        return self._done(model, recipe, started, 0, [])

    def candidates(self, side: str) -> list[Recipe]:
        """What is tried for a side, the most promising first; nothing for "none".

        Raises:
            TaskError: the side does not fit the base.
        """
        if side == "none":
            return []
        shapes = {len(shape) for shape in self.base.tap_shapes.values()}
        name = {3: "fusion", 2: "ladder"}.get(max(shapes, default=0)) if side == "auto" else side
        if name is None:
            return []
        tried = [Recipe(name), Recipe(name, merge="sum", init="zero", lr=1e-3, solved=True), Recipe(name, merge="sum")]
        if side != "auto":
            try:
                self.model(tried[0])
            except SideTuningError as error:
                raise TaskError(f"the side '{side}' cannot be tried: {error}") from error
        # The expansion is of maps.
        return [Recipe(None, head="random"), *tried] if side == "auto" and name == "fusion" else tried

    def learn(self, recipe: Recipe, seconds: float) -> tuple[Branch, Attempt]:
        """Train a candidate for some time, and keep its best weights."""
        started = time.monotonic()
        model = self.model(recipe)
        if recipe.solved:
            solve(model, "task", self.train, progress=False)
        steps = self._steps(recipe, started + seconds)
        result = fit(
            model,
            "task",
            self.train,
            steps=steps,
            lr=recipe.lr,
            weight_decay=0.01,
            scheduler=lambda optimizer: OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.15),
            validate=self.splits["validation"].loader(batch_size=256),
            keep_best=True,
            patience=PATIENCE,
            seed=self.seed,
            resume=self._file(recipe, "state"),
            callbacks=[Deadline(max(1.0, started + seconds - time.monotonic()))],
            progress=False,
        )
        curve = [row[self.measure] for row in result.validation]
        return self._done(model, recipe, started, result.steps, curve)

    def _file(self, recipe: Recipe, kind: str) -> Path:
        name = str(recipe).replace(" ", "").replace(",", "-").replace("+", "-")
        return self.folder / f"{name}.{kind}"

    def _steps(self, recipe: Recipe, ends: float) -> int:
        """Steps until a time, as measured on a model of its own; the same when the call is repeated."""
        file = self._file(recipe, "json")
        if file.exists():
            return int(read_json(file, {"steps": int}, "delete it to start over")["steps"])
        model = self.model(recipe)
        fit(model, "task", self.train, steps=MEASURED, progress=False)
        began = time.monotonic()
        fit(model, "task", self.train, steps=MEASURED, progress=False)
        each = (time.monotonic() - began) / MEASURED
        # Validations take a share of the time.
        steps = max(1, min(int(0.7 * (ends - time.monotonic()) / each), PASSES * len(self.train)))
        write_json(file, {"steps": steps})
        return steps

    def _done(
        self, model: SideTuner, recipe: Recipe, started: float, steps: int, curve: list[float]
    ) -> tuple[Branch, Attempt]:
        branch = model["task"]
        found = evaluate(model, "task", self.splits["validation"].loader(batch_size=256))
        parameters = sum(p.numel() for p in branch.parameters())
        seconds = time.monotonic() - started
        attempt = Attempt(str(recipe), found["loss"], found[self.measure], steps, seconds, parameters, curve)
        model.remove_task("task")
        return branch, attempt


def batch_of(rows: int) -> int:
    """Rows of a batch: 16 to 128, so that a pass has some steps."""
    return min(128, max(16, 2 ** int(math.log2(max(rows, 1) / 8))))
