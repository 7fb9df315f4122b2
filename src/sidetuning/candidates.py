"""Many candidates, learned side by side on one read of cached features, each exactly as it would be alone.

Candidates take turns, a batch each. Each has generators of its own, and a batch that two of them would draw alike is
read once. Nothing else is shared, so a candidate ends with the weights that `solve` and `fit` alone give it.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidetuning.artifacts import tensors_sha256
from sidetuning.base import Base
from sidetuning.cache import data_identity, loader_over
from sidetuning.closed_form import settle, solve, sums_of
from sidetuning.content import content_sha256
from sidetuning.errors import SideTuningError, TaskError
from sidetuning.files import atomic_write, check_signed, json_text, read_json, signed
from sidetuning.problems import Classes, Labels
from sidetuning.seeding import Generators, seeded
from sidetuning.sums import Sums, last_linear
from sidetuning.training import evaluate, fit
from sidetuning.tuner import SideTuner

NOTE = "candidate.json"
NOT_ENDED = "not ended within the budget"
SCHEMA = {
    "candidate": str,
    "trial": {"name": str, "seconds": float, "parameters": int, "scores": dict, "error?": str},
}


@dataclass(frozen=True)
class Candidate:
    """One way to learn a task.

    Attributes:
        name: its name, and that of its task.
        task: arguments of `SideTuner.add_task`: side, merge, head, taps and so on.
        fit: arguments of `fit`, such as lr and epochs; None trains nothing.
        solve: set the head in closed form first.
        strength: ridge strength of `solve`; by default chosen from the data.
        indices: rows of the cache that it learns from; all of them by default. Customers have rows of their own.
        relabel: applied to the labels of a batch.
        seed: seed for its initial weights and data order.
    """

    name: str
    task: Mapping[str, Any]
    fit: Mapping[str, Any] | None = None
    solve: bool = False
    strength: float | None = None
    indices: Sequence[int] | None = None
    relabel: Callable[[Tensor], Tensor] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """Outcome of one candidate.

    Attributes:
        name: the candidate's.
        scores: loss and metrics on the validation data; empty where it did not end.
        seconds: time spent on this candidate alone.
        parameters: numbers that were trained or solved.
        error: why it did not end; None where it did.
    """

    name: str
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    parameters: int = 0
    error: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """All candidates, the best first.

    Attributes:
        trials: outcome of each candidate.
        model: a model with the task of each candidate that ended.
    """

    trials: list[Trial]
    model: SideTuner

    @property
    def best(self) -> Trial:
        """The first; TaskError where no candidate ended."""
        if not self.trials or not self.trials[0].scores:
            raise TaskError("no candidate ended; give more budget=, or look at the errors in `trials`")
        return self.trials[0]

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.scores if name != "samples"))
        rows = [["candidate", *names, "parameters", "seconds"]]
        for trial in self.trials:
            scores = [f"{trial.scores[name]:.4g}" if name in trial.scores else "" for name in names]
            rows.append([trial.name, *scores, f"{trial.parameters:,}", f"{trial.seconds:.1f}", trial.error or ""])
        widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 3)]
        lines = [[cell.ljust(width) for cell, width in zip(row, widths)] + row[len(widths) :] for row in rows]
        return "\n".join("  ".join(line).rstrip() for line in lines)


def learn(
    base: Base, data: Any, wanted: Sequence[Candidate], batch: int, out: Path | None, budget: float | None, bar: bool
) -> tuple[SideTuner, list[Trial]]:
    """Let candidates take turns, in this process; `data` is what they learn from, and what they are scored on."""
    shared = [_Shared(cached) for cached in data]
    model, about = SideTuner(base), [*map(_about, data), batch]
    turns = [_Turn(candidate, model, shared, batch, out, about) for candidate in wanted]
    _take_turns(turns, shared, budget, bar)
    return model, [turn.trial for turn in turns]


def kin(candidate: Candidate) -> Any:
    """Equal for candidates of the same objects that differ in name, strength and fit alone: they have equal sums."""
    given = replace(candidate, name="", strength=None, fit=None)
    return _alike({f.name: getattr(given, f.name) for f in fields(given)})


def _alike(value: Any) -> Any:
    """Equal for equal plain values and for one object: no hash sees all that two objects may differ in."""
    if type(value) in (list, tuple):
        return type(value), *map(_alike, value)
    if type(value) is dict:
        return dict, *((key, _alike(inner)) for key, inner in value.items())
    return (type(value), value) if type(value) in (int, float, str, bool, range) else id(value)


def _hashed(candidate: Candidate, *about: Any) -> str:
    given = {f.name: getattr(candidate, f.name) for f in fields(candidate)}
    parts = [*candidate.task.values(), *(candidate.fit or {}).values()]
    return content_sha256([given, [tensors_sha256(p) for p in parts if isinstance(p, nn.Module)], *about])


def _about(cached: Any) -> str:
    folder = getattr(cached, "folder", None)
    if folder is None:
        return data_identity(cached)
    # A folder's name tells no labels that are not in it, as those of texts are not, and no view that was chosen.
    told = [getattr(cached, "__dict__", {}).get("labels"), cached.view if getattr(cached, "views", 1) > 1 else None]
    return Path(folder).name + (f" {content_sha256(told)}" if any(part is not None for part in told) else "")


def _take_turns(turns: list[_Turn], data: list[_Shared], budget: float | None, progress: bool) -> None:
    """Let each candidate do a batch, again and again, until all have ended or the time is over."""
    from tqdm import tqdm

    # Those of an earlier call have ended.
    started, waiting = time.monotonic(), [turn for turn in turns if not turn.ended]
    with tqdm(total=len(waiting), desc="candidates", disable=not progress, leave=False) as bar:
        try:
            while waiting and (budget is None or time.monotonic() - started < budget):
                for turn in waiting:
                    if turn.waits:
                        continue
                    turn.take()
                    if turn.failure is not None:
                        raise turn.failure
                for shared in data:
                    # All had their turn.
                    shared.read.clear()
                bar.update(sum(turn.ended for turn in waiting))
                waiting = [turn for turn in waiting if not turn.ended]
        finally:
            # Their threads must not wait for ever.
            for turn in waiting:
                turn.leave()


class _Left(BaseException):
    """The sweep goes on without this candidate; no handler of errors takes it."""


class _Shared:
    """Cached features that several candidates read, each in its turn.

    Args:
        cached: gives whole batches of (x, features, y).
    """

    def __init__(self, cached: Any) -> None:
        self.cached = cached
        # Those of solutions; None while they are collected.
        self.sums: dict[Any, Sums | None] = {}
        # The transform of a task that was solved, which tells the size of the images.
        self.transforms: dict[Any, Any] = {}
        self.read: dict[Any, tuple[Any, Generators, list[tuple[Tensor, int]]]] = {}

    def __len__(self) -> int:
        return len(self.cached)

    def __getitems__(self, rows: list[int]) -> Any:
        """A batch: that of the candidate before where it would be the same."""
        turn: _Turn | None = getattr(threading.current_thread(), "turn", None)
        if turn is not None:
            turn.give_up()
        key = (tuple(rows), Generators().key())
        found = self.read.get(key)
        if found is None or any(tensor._version != version for tensor, version in found[2]):
            batch = self.cached.__getitems__(rows)
            x, features, y = batch
            # A part that writes into its input writes into that of the others: they read again then.
            given = [x] if isinstance(x, Tensor) else [part for part in x.values() if isinstance(part, Tensor)]
            versions = [(tensor, tensor._version) for tensor in (*given, y, *features.tensors())]
            found = self.read[key] = batch, Generators(), versions
        else:
            found[1].set()
        return found[0]


class _Turn:
    """One candidate in a thread of its own, which runs only while it is its turn."""

    def __init__(
        self, candidate: Candidate, model: SideTuner, data: list[_Shared], batch: int, out: Path | None, about: Any
    ) -> None:
        self.candidate, self.model, (self.shared, self.held), self.batch = candidate, model, data, batch
        self.folder = None if out is None else out / candidate.name
        self.trial, self.seconds = Trial(candidate.name, error=NOT_ENDED), 0.0
        self.failure: BaseException | None = None
        self.ended = self._left = self._asked = False
        # What it draws before `fit` seeds anew depends on its seed alone.
        with seeded(candidate.seed):
            self._generators = Generators()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self.identity, self.kin = _hashed(candidate, about), kin(candidate)
        if self.folder is not None and (self.folder / NOTE).exists():
            self._read(self.folder)
        # In the order of the candidates, whatever the turns are.
        if not self.ended:
            model.add_task(candidate.name, **{"seed": candidate.seed, **candidate.task})

    @property
    def waits(self) -> bool:
        """Whether it waits for sums that another candidate collects."""
        known = self.shared.sums
        return self._asked and self.kin in known and known[self.kin] is None

    def take(self) -> None:
        """Go on until the candidate's next batch, or its end."""
        started, before = time.perf_counter(), Generators()
        self._generators.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.turn = self  # type: ignore[attr-defined]
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()
        self._generators = Generators()
        before.set()
        self.seconds += time.perf_counter() - started

    def give_up(self) -> None:
        """Wait for the next turn."""
        self._done.release()
        self._go.acquire()
        if self._left:
            raise _Left

    def leave(self) -> None:
        """End the thread where it waits."""
        if self._thread is not None and not self.ended:
            self._left = True
            self.take()
        if self.candidate.name in self.model:
            self.model.remove_task(self.candidate.name)

    def _run(self) -> None:
        try:
            self._learn()
        except _Left:
            pass
        except SideTuningError as error:
            # Too high a learning rate, say: the others go on.
            self.trial = Trial(self.candidate.name, error=str(error), seconds=self.seconds)
            self.model.remove_task(self.candidate.name)
            self._write()
        except BaseException as error:
            self.failure = error
        finally:
            self.ended = True
            self._done.release()

    def _learn(self) -> None:
        candidate, model, name = self.candidate, self.model, self.candidate.name
        loader = loader_over(self.shared, batch_size=self.batch, indices=candidate.indices, relabel=candidate.relabel)
        scored = loader_over(self.held, batch_size=self.batch, shuffle=False, relabel=candidate.relabel)
        if candidate.solve:
            self._solve(loader)
        if candidate.fit is not None:
            # That of another candidate of this name is not gone on with.
            resume = None if self.folder is None else self.folder / f"resume-{self.identity[:12]}"
            given = {"seed": candidate.seed, "save_every": 10.0, **candidate.fit}
            fit(model, name, loader, resume=resume, progress=False, **given)
        scores = evaluate(model, name, scored)
        parameters = sum(parameter.numel() for parameter in model[name].parameters())
        self.trial = Trial(name, scores, self.seconds, parameters)
        self._write()

    def _solve(self, loader: Any) -> None:
        """As `solve`, from the sums of another candidate where they would be equal."""
        model, name, strength, known = self.model, self.candidate.name, self.candidate.strength, self.shared.sums
        branch = model[name]
        if not isinstance(branch.problem, (Classes, Labels)):
            # Numbers are measured first, and each task keeps its own units.
            solve(model, name, loader, strength=strength, progress=False)
            return
        while self.kin in known and known[self.kin] is None:
            # Another candidate is at it.
            self._asked = True
            self.give_up()
        self._asked = False
        if self.kin not in known:
            known[self.kin] = None
            try:
                known[self.kin] = sums_of(model, name, loader, strength)
                self.shared.transforms[self.kin] = branch.transform
            finally:
                if known[self.kin] is None:
                    del known[self.kin]
        sums = known[self.kin]
        assert sums is not None
        branch.transform = self.shared.transforms[self.kin]
        with torch.no_grad():
            settle(branch, last_linear(branch, name), sums, strength)

    def _write(self) -> None:
        """Save the task, and what became of it last."""
        if self.folder is None:
            return
        if self.trial.scores:
            self.model.save_task(self.candidate.name, self.folder, metrics=self.trial.scores)
        with atomic_write(self.folder / NOTE) as file:
            note = {"candidate": self.identity, "trial": asdict(self.trial)}
            file.write_text(json_text(signed(note)), encoding="utf-8")

    def _read(self, folder: Path) -> None:
        """What became of the candidate in an earlier call."""
        mend = f"delete {folder} to try it again"
        note = check_signed(read_json(folder / NOTE, SCHEMA, mend), str(folder / NOTE), mend)
        if note["candidate"] != self.identity:
            raise TaskError(
                f"{folder} holds another candidate called '{self.candidate.name}', or one on other data; {mend}, or "
                "give another out="
            )
        self.trial, self.ended = Trial(**note["trial"]), True
        if self.trial.scores:
            # Copies: what the candidate holds says which one it is.
            own: Any = {
                kind: copy.deepcopy(part) for kind, part in self.candidate.task.items() if isinstance(part, nn.Module)
            }
            self.model.load_task(folder, **own)
