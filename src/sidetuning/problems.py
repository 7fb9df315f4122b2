"""What a task's targets mean: their loss, what of them counts, how a prediction is scored and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sidetuning.errors import DataError
from sidetuning.inputs import Input, entry
from sidetuning.registry import Registry
from sidetuning.tags import are_tags, entity_metrics, with_score

# The target that cross-entropy ignores; numbers that are ignored are NaN.
IGNORED = -100
Metric = Callable[[Any, Tensor], Any]


class Problem:
    """One meaning of targets. Averages run over what counts: the targets that are not ignored.

    Attributes:
        units: centres and scales (2, channels) of the targets, where the task has them; the loss divides errors by the
            scale.
        labels: names of the classes, where the task has them.
    """

    units: Tensor | None = None
    labels: Sequence[str] | None = None

    def among(self, target: Tensor, inputs: Input) -> Tensor:
        """The target, with what the input's padding leaves out of it ignored; `prepare` comes next."""
        return target

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Output and target in the form that the loss takes.

        Raises:
            DataError: targets of another form, or out of range.
        """
        raise NotImplementedError

    def counts(self, target: Tensor) -> Tensor:
        """Which entries of a prepared target count, as booleans of its shape."""
        raise NotImplementedError

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss over the entries of a prepared target that count; 0 where none does."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Metric]:
        """The scores that are reported by default, functions of (output, target) that return one number per entry."""
        raise NotImplementedError

    def final(self, averages: dict[str, float]) -> dict[str, float]:
        """The scores, of the averages of what `metrics` gave."""
        return averages

    def codes(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What a regression takes for targets: the numbers (n, k) of those that count, and which do, as booleans.

        Raises:
            DataError: targets of another form, or a problem that a regression does not solve.
        """
        raise DataError(f"the problem '{type(self).__name__.lower()}' is not solved in closed form; use fit")

    def answers(self, output: Tensor, labels: Sequence[str] | None) -> list[tuple[str, float]]:
        """What is shown of one sample's output: names with probabilities, or values; the first first."""
        return [(_name(labels, i), value) for i, value in enumerate(output.float().flatten().tolist())]


PROBLEMS: Registry[Callable[[], Problem]] = Registry("problem")


@PROBLEMS.register("classes")
class Classes(Problem):
    """One class of several, for a sample (b,) or each place of a map (b, h, w); -100 is ignored.

    Targets are class numbers of any integer type, or probabilities of the output's shape.
    """

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        _check_batch(output, target, 2)
        if target.is_floating_point():
            ones = torch.ones(len(target), *target.shape[2:], dtype=target.dtype, device=target.device)
            sums_to_one = target.shape == output.shape and torch.allclose(target.sum(1), ones, atol=1e-3)
            if not sums_to_one or bool((target < 0).any()):
                raise DataError(
                    f"class numbers must be integers, not {target.dtype} {tuple(target.shape)}: targets.long(), or "
                    "problem='numbers' (of images, 'pixels') for quantities"
                )
            return output, target.to(output.dtype)
        if target.shape == output.shape and output.ndim == 2:
            raise DataError(
                f"targets {tuple(target.shape)} have a number for every class: give class numbers, targets.argmax(1), "
                "or problem='labels' where several may be right"
            )
        target = target.long()
        if target.shape == (len(output), 1) and output.ndim == 2:
            target = target.squeeze(1)
        wanted = (len(output), *output.shape[2:])
        if target.shape != wanted:
            raise DataError(f"an output {tuple(output.shape)} takes targets {wanted}, not {tuple(target.shape)}")
        check_range(target, output.shape[1], IGNORED)
        return output, target

    def counts(self, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return torch.ones(len(target), *target.shape[2:], dtype=torch.bool, device=target.device)
        return target != IGNORED

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point() or bool((target != IGNORED).any()):
            return F.cross_entropy(output, target)
        return 0.0 * output.sum()

    def codes(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output, target = self.prepare(output, target)
        counts = self.counts(target)
        if target.is_floating_point():
            return target.movedim(1, -1).flatten(0, -2), counts
        return F.one_hot(target[counts], output.shape[1]), counts

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": _right}

    def answers(self, output: Tensor, labels: Sequence[str] | None) -> list[tuple[str, float]]:
        probabilities = output.float().softmax(0)
        order = probabilities.argsort(descending=True).tolist()
        return [(_name(labels, i), float(probabilities[i])) for i in order]


@PROBLEMS.register("labels")
class Labels(Problem):
    """Any number of labels, each true or not: targets (b, labels) in 0 … 1; entries of -100 or NaN are ignored."""

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        _check_batch(output, target, 2)
        if output.shape[1] == 1 and target.shape == output.shape[:1]:
            target = target.unsqueeze(1)
        if target.shape != output.shape:
            raise DataError(
                f"an output {tuple(output.shape)} takes a target of 0 or 1 for each label, not {tuple(target.shape)}"
            )
        target = target.to(output.dtype)
        target = torch.where(target == IGNORED, torch.nan, target)
        if bool(((target < 0) | (target > 1)).any()):
            raise DataError(f"labels are between 0 and 1; these go from {_range(target)}")
        return output, target

    def counts(self, target: Tensor) -> Tensor:
        return ~target.isnan()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(output, target.nan_to_num(), reduction="none")
        return _mean(each, self.counts(target))

    def codes(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return whole_rows(*self.prepare(output, target))

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": lambda output, target: (output > 0) == (target > 0.5)}

    def answers(self, output: Tensor, labels: Sequence[str] | None) -> list[tuple[str, float]]:
        probabilities = output.float().sigmoid().tolist()
        named = [(_name(labels, i), p) for i, p in enumerate(probabilities)]
        return sorted(named, key=lambda answer: -answer[1])


@PROBLEMS.register("numbers")
class Numbers(Problem):
    """Quantities of the output's shape, whole numbers too; NaN is ignored. The loss is the mean square error.

    Outputs, targets and metrics are in the targets' own units; the loss is of errors in units of the task's scale.
    """

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        _check_batch(output, target, 1)
        if output.shape == (*target.shape, 1):
            target = target.unsqueeze(-1)
        if target.shape != output.shape:
            raise DataError(f"an output {tuple(output.shape)} takes as many numbers, not {tuple(target.shape)}")
        if target.is_complex():
            raise DataError(
                f"targets are real numbers, not {target.dtype}: give real and imaginary part as two channels"
            )
        return output, target.to(output.dtype)

    def counts(self, target: Tensor) -> Tensor:
        return ~target.isnan()

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """Differences, in units of the task's scale where it has one; 0 and its like where a target is ignored."""
        difference = output - target.nan_to_num()
        return difference if self.units is None else difference / along(self.units[1], difference)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return _mean(self.errors(output, target).square(), self.counts(target))

    def codes(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        rows, counts = whole_rows(*self.prepare(output, target))
        return rows if self.units is None else (rows - self.units[0]) / self.units[1], counts

    def metrics(self) -> dict[str, Metric]:
        return {"mae": lambda output, target: (output - target).abs()}


@PROBLEMS.register("pixels")
class Pixels(Numbers):
    """Images of numbers (b, c, h, w), or (b, h, w) of one channel; NaN is ignored. The loss is the mean error.

    Units are those of `Numbers`.
    """

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if output.ndim == 4 and target.ndim == 3 and output.shape[1] == 1:
            target = target.unsqueeze(1)
        return super().prepare(output, target)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return _mean(self.errors(output, target).abs(), self.counts(target))


@PROBLEMS.register("tokens")
class Tokens(Classes):
    """A class for each token: outputs (b, t, classes), targets (b, t); -100 is ignored. Of tags entities are scored."""

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # Classes before the tokens cannot be taken too: of as many tokens as classes nobody knows which is which.
        if output.ndim != 3 or output.shape[:2] != target.shape:
            raise DataError(
                f"tokens have outputs (b, t, classes) and targets (b, t), not {tuple(output.shape)} and "
                f"{tuple(target.shape)}; for outputs (b, classes, t) take problem='classes'"
            )
        return super().prepare(output.transpose(1, 2), target)

    def metrics(self) -> dict[str, Metric]:
        known = self.labels or ()
        return {**super().metrics(), **(entity_metrics(known) if are_tags(known) else {})}

    def final(self, averages: dict[str, float]) -> dict[str, float]:
        return with_score(averages)


@PROBLEMS.register("next")
class Next(Classes):
    """The next token of a text: outputs (b, t, vocabulary), and as targets the ids (b, t) of the text itself.

    They are shifted here, as transformers does it: the output of a token is held against the token after it. Padding,
    what only padding comes before, and -100 are ignored. The perplexity is e to the mean loss of a token.
    """

    def among(self, target: Tensor, inputs: Input) -> Tensor:
        mask = entry(inputs, "attention_mask")
        if mask is None or mask.shape != target.shape:
            return target
        return target.masked_fill((mask == 0) | (F.pad(mask, (1, 0))[:, :-1] == 0), IGNORED)

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if output.ndim != 3 or output.shape[:2] != target.shape or target.is_floating_point():
            raise DataError(
                f"next tokens have outputs (b, t, vocabulary) and ids (b, t) of the same text, not "
                f"{tuple(output.shape)} and {tuple(target.shape)} {target.dtype}; give the input_ids as targets"
            )
        return super().prepare(output[:, :-1].transpose(1, 2), target[:, 1:])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        counts = self.counts(target)
        # Rows of the vocabulary lie together in memory this way.
        return super().loss(output.transpose(1, 2)[counts], target[counts])

    def metrics(self) -> dict[str, Metric]:
        return {"perplexity": partial(F.cross_entropy, reduction="none"), **super().metrics()}

    def final(self, averages: dict[str, float]) -> dict[str, float]:
        mean = averages.get("perplexity")
        return averages if mean is None else {**averages, "perplexity": float(np.exp(np.clip(mean, None, 700)))}

    def codes(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return Problem.codes(self, output, target)


@PROBLEMS.register("span")
class Span(Problem):
    """First and last token of an answer: outputs (b, t, 2), targets (b, 2); a pair with -100 is ignored."""

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if output.ndim != 3 or output.shape[2] != 2 or target.shape != (len(output), 2) or target.is_floating_point():
            raise DataError(
                f"spans have outputs (b, t, 2) and whole numbers (b, 2) as targets, not {tuple(output.shape)} and "
                f"{tuple(target.shape)} {target.dtype}"
            )
        scores, target = Classes().prepare(output.transpose(1, 2).flatten(0, 1), target.long().flatten())
        return scores.unflatten(0, (-1, 2)).transpose(1, 2), target.unflatten(0, (-1, 2))

    def counts(self, target: Tensor) -> Tensor:
        return (target != IGNORED).all(1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        each = F.cross_entropy(output, target, reduction="none", ignore_index=IGNORED)
        return _mean(each.mean(1), self.counts(target))

    def metrics(self) -> dict[str, Metric]:
        return {"exact": lambda output, target: (output.argmax(1) == target).all(1)}

    def answers(self, output: Tensor, labels: Sequence[str] | None) -> list[tuple[str, float]]:
        starts, ends = output.float().softmax(0).max(0)
        return [(f"tokens {int(ends[0])} to {int(ends[1])}", float(starts.prod()))]


@PROBLEMS.register("own")
class Own(Problem):
    """What a loss of the user's own alone knows: nothing is checked or scored, and outputs are shown as they are.

    A task that was trained with such a loss has this problem, unless it was added with another.
    """

    def prepare(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        raise DataError(
            "only the loss that the task was trained with knows what its targets mean: give it again, loss=, or name "
            "the problem when you add the task"
        )

    def metrics(self) -> dict[str, Metric]:
        return {}


def along(row: Tensor, values: Tensor) -> Tensor:
    """Numbers (channels,) or (1,), shaped so that they go with the channels of `values` (b, channels, …)."""
    return row.view(1, -1, *[1] * (values.ndim - 2)) if len(row) > 1 else row


def whole_rows(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (n, k) of targets that count, and which do; raises DataError where a row counts in part."""
    target = target.flatten(0, -2) if target.ndim > 2 else target
    counts = ~target.isnan()
    if bool((counts.any(1) != counts.all(1)).any()):
        raise DataError("some rows have targets that are ignored in part, which only fit takes; leave those rows out")
    return target[counts.all(1)], counts.all(1)


def check_range(target: Tensor, classes: int, ignored: int) -> None:
    """Class numbers must have an output; on a GPU the loss itself would kill the process."""
    wrong = target[((target < 0) | (target >= classes)) & (target != ignored)]
    if len(wrong):
        label = int(wrong.max())
        raise DataError(f"the label {label} is out of range: the head has {classes} outputs, 0 … {classes - 1}")


def _right(output: Tensor, target: Tensor) -> Tensor:
    """Where the highest output is the target's; soft targets count by their highest."""
    right: Tensor = output.argmax(1) == (target.argmax(1) if target.shape == output.shape else target)
    return right


def _check_batch(output: Tensor, target: Tensor, dimensions: int) -> None:
    if output.ndim < dimensions or target.ndim == 0 or len(target) != len(output):
        raise DataError(
            f"an output {tuple(output.shape)} and targets {tuple(target.shape)} do not belong together; choose another "
            "head or problem"
        )


def _mean(each: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, each, 0.0).sum() / counts.sum().clamp(min=1)


def _name(labels: Sequence[str] | None, i: int) -> str:
    return labels[i] if labels else str(i)


def _range(values: Tensor) -> str:
    seen = values[~values.isnan()]
    return f"{float(seen.min()):g} to {float(seen.max()):g}"
