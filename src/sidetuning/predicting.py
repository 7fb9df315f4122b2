"""Answers to files, images and texts: each task is asked as it was trained, and each preprocessing costs one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidetuning.base import Base, Features, Input
from sidetuning.branch import Branch
from sidetuning.errors import DataError, ShapeError, TaskError
from sidetuning.inputs import entry, map_input, take_rows
from sidetuning.problems import Classes, Labels, Next, Tokens
from sidetuning.transforms import Aligned, Transform, WordTransform

# Sources that are decoded and run at a time.
BATCH = 32


class Answer(NamedTuple):
    """What a task says of one source.

    Attributes:
        label: name of the class, of the label or of the number; its place where it has no name.
        value: the probability, or the number itself.
    """

    label: str
    value: float


class Word(NamedTuple):
    """A word of a text with the answers for it, the most probable first; none where the base sees no token of it."""

    word: str
    answers: list[Answer]


# Of classes, labels, numbers and spans a list, of words one each; of maps and other tokens a tensor.
Answers = list[Answer] | list[Word] | Tensor


def run(
    tasks: list[str], branches: Mapping[str, Branch], inputs: Input, features: Features, *, decode: bool = True
) -> dict[str, Tensor]:
    """Outputs of tasks on the same samples, or what their heads would read (`decode=False`).

    A side that is also a lateral, or an expansion, runs once.
    """
    sides = {name: branches[name].side_output(inputs, features) for name in dict.fromkeys(tasks)}
    with torch.no_grad():
        for lateral in {lateral for task in tasks for lateral in branches[task].config.laterals} - sides.keys():
            sides[lateral] = branches[lateral].side_output(inputs, features)
    outputs: dict[str, Tensor] = {}
    shared: dict[Any, Tensor] = {}
    for task in tasks:
        branch = branches[task]
        laterals = [out.detach() for t in branch.config.laterals if (out := sides[t]) is not None]
        known = features, sides[task], laterals
        outputs[task] = branch.output(inputs, *known, shared) if decode else branch.code(*known)
    return outputs


def run_in_parts(
    moment: Callable[[Sequence[str]], tuple[Base, dict[str, Branch]]],
    tasks: Sequence[str],
    x: Input,
    given: Features | Tensor | None,
    most: int,
) -> dict[str, Tensor]:
    """Outputs of tasks of which `most` are in memory; another base pass is made only where some read other taps."""
    outputs: dict[str, Tensor] = {}
    last: Base | None = None
    for first in range(0, len(tasks), most):
        some = list(tasks[first : first + most])
        base, branches = moment(some)
        if base is not last:
            inputs = base.prepare(x)
            known, last = base.features(inputs, given), base
        outputs |= run(some, branches, inputs, known)
    return outputs


def run_mixed(tasks: list[str], branches: Mapping[str, Branch], inputs: Input, features: Features) -> list[Tensor]:
    """A task per sample."""
    if len(tasks) != len(features.out):
        raise ShapeError(f"{len(tasks)} tasks for a batch of {len(features.out)}; name one per sample")
    outputs: list[Tensor] = [features.out] * len(tasks)
    for name in dict.fromkeys(tasks):
        rows = torch.tensor([i for i, task in enumerate(tasks) if task == name], device=features.out.device)
        out = run([name], branches, take_rows(inputs, rows), features.rows(rows))[name]
        for i, row in zip(rows.tolist(), out, strict=True):
            outputs[i] = row
    return outputs


def groups(base: Base, branches: Mapping[str, Branch], tasks: Iterable[str]) -> dict[Transform, list[str]]:
    """The tasks by the transform that each was trained with.

    Raises:
        TaskError: a task of a base that reads neither images nor texts, or one that writes.
    """
    found: dict[Transform, list[str]] = {}
    for task in dict.fromkeys(tasks):
        if isinstance(branches[task].problem, Next):
            raise TaskError(f"task '{task}' goes on with texts, model.generate('…', task='{task}'); ask other tasks")
        transform = branches[task].transform or base.transform
        if transform is None:
            raise TaskError(
                f"task '{task}' is asked with tensors, model(x, '{task}'): its base reads neither images of three "
                "channels nor texts; give Base transform= to ask it with files"
            )
        found.setdefault(transform, []).append(task)
    return found


@torch.no_grad()
def predict(
    base: Base,
    branches: Mapping[str, Branch],
    sources: Any,
    tasks: Sequence[str],
    *,
    top: int | None = None,
    mirror: bool = False,
) -> dict[str, Any]:
    """As `SideTuner.predict`, of the base and the branches of one moment."""
    if top is not None and top < 1:
        raise TaskError(f"top must be 1 or more, not {top}")
    by_transform = groups(base, branches, tasks)
    one = all(transform.is_one(sources) for transform in by_transform)
    given = [sources] if one else list(sources)
    by_words = {isinstance(transform, WordTransform): names[0] for transform, names in by_transform.items()}
    if len(by_words) > 1 and (type(sources) is tuple or not all(isinstance(source, str) for source in given)):
        told = f"the task '{by_words[True]}' reads words and '{by_words[False]}' whole texts"
        raise DataError(f"{told}: ask them one by one, tasks=[…], or give plain texts")
    found: dict[str, Any] = {name: [] for names in by_transform.values() for name in names}
    for transform, names in by_transform.items():
        for start in range(0, len(given), BATCH):
            x, about = read(transform, given[start : start + BATCH])
            outputs = _outputs(base, branches, x, names, mirror)
            for name in names:
                for output, known in zip(outputs[name], about, strict=True):
                    found[name].append(answers(branches[name], output, top=top, about=known))
    return {task: found[task][0] if one else found[task] for task in tasks}


def read(transform: Transform, sources: Sequence[Any]) -> tuple[Input, Sequence[Aligned | int | None]]:
    """Sources as a batch, and of each its words, or how many tokens it has."""
    if isinstance(transform, WordTransform):
        return transform.aligned(sources)
    x = transform.batch(sources)
    mask = entry(x, "attention_mask")
    if mask is not None and not mask.any(1).all():
        # An answer would be made of padding alone.
        raise DataError("the tokenizer makes no token of a text; give texts with words that it knows")
    return x, [None] * len(sources) if mask is None else mask.sum(1).tolist()


def each_answered(
    ask: Callable[[list[Any]], dict[str, Any]], sources: Sequence[Any]
) -> list[dict[str, Any] | DataError]:
    """Each source's answers by task, or what is wrong with it: one that cannot be read does not stop the others.

    Args:
        ask: gives the answers to a list of sources, as `predict` does.
        sources: the sources.
    """
    try:
        found = ask(list(sources))
    except DataError as error:
        return [error] if len(sources) == 1 else [one for source in sources for one in each_answered(ask, [source])]
    return [{task: answered[i] for task, answered in found.items()} for i in range(len(sources))]


def _outputs(base: Base, branches: Mapping[str, Branch], x: Input, tasks: list[str], mirror: bool) -> dict[str, Tensor]:
    """Each task's outputs of a batch; with `mirror` those of images and their mirror images, averaged."""
    views = [x]
    if mirror:
        if not isinstance(x, Tensor):
            raise DataError("texts have no mirror images; leave mirror= out")
        views.append(x.flip(-1))
    each = []
    for view in views:
        inputs = base.prepare(map_input(view, lambda tensor: tensor.to(base.device)))
        each.append(run(tasks, branches, inputs, base.encode(inputs)))
    return {task: _mean(branches[task], [outputs[task] for outputs in each]) for task in tasks}


def _mean(branch: Branch, views: list[Tensor]) -> Tensor:
    """The mean over an image and its mirror image: of classes their probabilities, else the outputs as they are."""
    if len(views) == 1:
        return views[0]
    seen = torch.stack([views[0], views[1].flip(-1) if views[1].ndim == 4 else views[1]])
    return seen.softmax(2).mean(0).log() if type(branch.problem) is Classes else seen.mean(0)


def answers(branch: Branch, output: Tensor, *, top: int | None = None, about: Aligned | int | None = None) -> Answers:
    """What a task's output of one sample says.

    Args:
        branch: the task's.
        output: without the batch dimension.
        top: this many of the most probable classes or labels; by default all.
        about: what `read` tells of the source.

    Returns:
        Names with probabilities or numbers, of words for each; of a map of classes (h, w) class numbers, of tokens (t,)
        class numbers, of other maps the output itself.
    """
    problem = branch.problem
    if isinstance(problem, Tokens):
        if not isinstance(about, list):
            return output[:about].argmax(-1)
        known = [[] if place is None else problem.answers(output[place], branch.labels)[:top] for _, place in about]
        return [Word(word, [Answer(*answer) for answer in shown]) for (word, _), shown in zip(about, known)]
    if type(problem) is Classes and output.ndim > 1:
        return output.argmax(0)
    if output.ndim == 3:
        return output
    shown = [Answer(*answer) for answer in problem.answers(output, branch.labels)]
    # Numbers have no order.
    return shown[:top] if isinstance(problem, (Classes, Labels)) else shown
