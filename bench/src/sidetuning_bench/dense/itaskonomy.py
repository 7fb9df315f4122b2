"""iTaskonomy (paper, section 4.1): twelve dense tasks, learned one after another from one base that sees curvature."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sidetuning.base import Base, Features
from sidetuning.cache import CachedFeatures, cache_features, loader_over
from sidetuning.errors import DataError, UnknownNameError
from sidetuning.loading import load_base
from sidetuning.registry import unknown
from sidetuning.terminal import plain, say
from sidetuning_bench import options
from sidetuning_bench.dense.gallery import Gallery
from sidetuning_bench.dense.taskonomy import Taskonomy
from sidetuning_bench.dense.tasks import ORDER, DenseTask, Regression, dense_task, spread
from sidetuning_bench.domains import domain_of, names
from sidetuning_bench.methods import Method, Task
from sidetuning_bench.options import Count, MethodOptions, Names, Natural, Positive, RunOptions, check, with_values
from sidetuning_bench.report_runs import FAMILIES, Family, report
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import BEFORE, Run, dated
from sidetuning_bench.sequence import Course, Lesson, Score, learn_in_order, print_result, with_recipe

# The paper's merge, alpha, learns worse than fixed features do on rooms that are not Doom's.
SIDE = ("fcn5", 0.25, "mlp2")
METHODS = options.image_methods(
    options.SideTuneOptions(*SIDE), options.BoostingOptions(*SIDE), options.EWCOptions(coefficient=1e5)
)
RATE = 1e-3
# The base's own weights want smaller steps.
RATES = dict.fromkeys(("finetune", "independent", "ewc", "psp"), 3e-4)
# The side that came out best on the validation levels of Doom (docs/benchmarks.md).
BEST: Mapping[str, Any] = {"side": "fusion", "taps": ("layer2", "layer3"), "merge": "mlp2", "init": None}
# Bytes of one domain that are kept in memory: some 100,000 labels of 128 pixels.
IN_MEMORY = 2 * 1024**3


@dataclass(frozen=True)
class FrameOptions:
    """Frames in Taskonomy's layout."""

    data: str = "runs/doom"
    """A folder in Taskonomy's layout."""
    subset: str | None = None
    """Which buildings train and test: a split file, or the name of an official one (tiny, fullplus, …); by default
    splits.csv."""
    test_frames: Count | None = 300
    """Largest number of test frames, drawn evenly over the test buildings; None for all."""
    size: options.Pixels | None = None
    """Resize frames to this width and height; None keeps them."""
    units: Literal["labels", "range"] | None = None
    """labels: numbers are learned in units of the training labels, centred at their median. range: in units of half the
    range that files can hold, as the original code does. By default labels, but range in the folder of a run that
    began before there was a choice."""


@dataclass(frozen=True)
class Settings:
    """Learn the dense tasks of Taskonomy one after another, on Doom (see render-doom) or on Taskonomy itself."""

    recipe: Literal["paper", "best"] = "paper"
    """paper: a side that sees the picture. best: a side on inner maps of the packaged base; it sets side, taps, merge
    and init."""
    tasks: Names = ORDER
    """The tasks, in the order of learning; the paper's by default."""
    order: int | None = None
    """Learn the tasks in a random order drawn from this seed."""
    base: str = "resnet-doom-curvature"
    """Base network; its code must be a map."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    frames: Count | None = None
    """Number of training frames, drawn evenly over the training buildings; None for all."""
    draw: int = 0
    """Seed for the choice of training frames."""
    test_split: Literal["test", "val"] = "test"
    """Split to test on: test, or val to choose settings."""
    epochs: Positive = 3.0
    """Passes over the training frames, per task."""
    pictures: Natural = 4
    """Number of test frames whose predictions are kept for the report."""
    source: FrameOptions = FrameOptions()
    method: Annotated[MethodOptions, options.choice(METHODS)] = METHODS["sidetune"]
    training: options.ImageTraining = field(default=options.ImageTraining(batch=32, weight_decay=2e-6))
    """The learning rate is 1e-3 by default, and 3e-4 where the base's own weights are tuned. (The paper has 1e-4, for
    some hundred times as many steps.)"""
    run: RunOptions = field(default=RunOptions(out="runs/itaskonomy"))


class Inputs(Dataset[Any]):
    """Frames without labels, as a cache of base features takes them."""

    def __init__(self, frames: Taskonomy) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.frames.read(index, "rgb"), index

    def fingerprint(self) -> str:
        """Fingerprint of the frames' pictures alone."""
        return self.frames.fingerprint()


class Stack:
    """One domain of frames: in memory where that is at most `IN_MEMORY`, else read from the files batch by batch."""

    def __init__(self, frames: Taskonomy, domain: str, progress: bool = False) -> None:
        self.frames, self.domain = frames, domain
        fits = len(frames) * frames.read(0, domain).nbytes <= IN_MEMORY
        self.held = frames.tensors(domain, progress) if fits else None

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        return self.frames.tensors(self.domain, rows=rows) if self.held is None else self.held[list(rows)]


class Labelled(Dataset[Any]):
    """Batches of `(x, features or None, y)` for one task."""

    def __init__(self, inputs: CachedFeatures | Stack, raw: Stack, mask: Stack, task: DenseTask) -> None:
        self.inputs, self.raw, self.mask, self.task = inputs, raw, mask, task

    def __len__(self) -> int:
        return len(self.raw)

    def labels(self, rows: Sequence[int]) -> Tensor:
        """What the task makes of them."""
        return self.task.labels(self.raw[rows], self.mask[rows])

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Features | None, Tensor]:
        if isinstance(self.inputs, Stack):
            return self.inputs[rows], None, self.labels(rows)
        x, features, _ = self.inputs.__getitems__(rows)
        return x, features, self.labels(rows)


class Material:
    """Training and test frames of every task, with cached base features where the method uses them."""

    def __init__(self, method: Method, base: Base, settings: Settings, train: Taskonomy, test: Taskonomy) -> None:
        self.train, self.test = train, test
        self.inputs = {frames: prepare(method, base, frames, settings) for frames in (train, test)}
        self.masks = {frames: Stack(frames, "mask") for frames in (train, test)}
        self.base_seconds = sum(data.seconds for data in self.inputs.values() if isinstance(data, CachedFeatures))
        self._tested: dict[DenseTask, tuple[Labelled, float]] = {}

    def labelled(self, frames: Taskonomy, task: DenseTask) -> Labelled:
        """Frames with the labels of a task."""
        return Labelled(self.inputs[frames], Stack(frames, task.domain), self.masks[frames], task)

    def tested(self, task: DenseTask) -> tuple[Labelled, float]:
        """Test frames of a task, and the value of the best constant guess, which scores of errors read."""
        if task not in self._tested:
            data = self.labelled(self.test, task)
            self._tested[task] = data, constant(task, self.train, data) if isinstance(task, Regression) else 0.0
        return self._tested[task]


def run(settings: Settings) -> RunResult:
    """Learn the tasks in order, saving after each; evaluates every task after every task."""
    settings = dated(with_recipe(settings, BEST), settings.run.out)
    check(settings)
    settings = with_values(settings, {"lr": rate_of(settings)})
    seed, training = settings.run.seed, settings.training
    folder = Run(settings.run.out, "itaskonomy", settings)
    train, test = frames_of(settings)
    # Who started it without a bar has said so.
    if settings.run.progress:
        tell_absent(train, test)
    classes = names(settings.source.data, "segment_semantic")
    tasks = {name: dense_task(name, train, classes) for name in ordered(settings)}
    if settings.source.units == "labels":
        tasks = {name: task.measured(train) for name, task in tasks.items()}
    base = map_base(settings, train)
    fingerprints = {"data": fingerprint(train, test), "base": base.identity().sha256}
    folder.belongs(**fingerprints)
    build = partial(settings.method.build, base, seed)
    method = build()
    # An unknown part is found before the long work.
    method.add(Task("dry-run", "identity"))
    material = Material(method, base, settings, train, test)
    gallery = Gallery(folder.folder / "gallery", test, settings.pictures)

    def lesson(name: str) -> Lesson:
        task = tasks[name]
        head, head_options = task.head
        return Lesson(
            Task(name, head, task.loss, seed=seed * 1000 + ORDER.index(name), head_options=head_options),
            # Batch norms want whole batches.
            lambda: loader_over(material.labelled(train, task), batch_size=training.batch, drop_last=True),
            lambda method: evaluate(method, name, *material.tested(task)),
        )

    steps = max(1, round(settings.epochs * len(train) / training.batch))
    recipe = training.recipe(steps, seed, rise=0.1)
    course = Course(
        settings,
        build,
        [lesson(name) for name in tasks],
        recipe,
        material.base_seconds,
        learned=lambda method, name: gallery.add(method, name, tasks),
        measures={name: task.measure for name, task in tasks.items()},
        fingerprints=fingerprints,
    )
    return learn_in_order(folder, course)


def map_base(settings: Settings, frames: Taskonomy) -> Base:
    """The base, for pictures of the frames' size.

    Raises:
        DataError: it returns no map.
    """
    example = torch.zeros(1, *frames.shapes["rgb"], dtype=torch.uint8)
    base = load_base(settings.base, weights=settings.base_weights, taps=settings.method.tapped).with_example(example)
    if base.kind != "map":
        needed = "dense tasks need a map, such as resnet-doom-curvature's"
        raise DataError(f"the base {settings.base} returns a {base.kind}; {needed}")
    return base


def rate_of(settings: Settings) -> float:
    """The learning rate, which is the method's where none is given."""
    return settings.training.lr or RATES.get(settings.method.name, RATE)


def fingerprint_of(settings: Settings) -> str:
    """Fingerprint of what is learned and tested; says which buildings are not here."""
    train, test = frames_of(settings)
    tell_absent(train, test)
    return fingerprint(train, test)


def fingerprint(train: Taskonomy, test: Taskonomy) -> str:
    """Fingerprint of frames with the names of their classes."""
    parts = (train.fingerprint(), test.fingerprint(), *names(train.root, "segment_semantic"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def frames_of(settings: Settings) -> tuple[Taskonomy, Taskonomy]:
    """Those for training and those for testing, with all domains that the tasks need.

    Raises:
        UnknownNameError: a task that is none of the twelve.
        DataError: too few frames, missing files.
    """
    for name in settings.tasks:
        if name not in ORDER:
            raise UnknownNameError(unknown("task", name, ORDER, verb="one of the twelve"))
    source = settings.source
    domains = ("rgb", *(domain_of(task).name for task in settings.tasks if task != "rgb"))

    def frames(split: str, limit: int | None, seed: int = 0) -> Taskonomy:
        return Taskonomy(source.data, domains, split, source.subset, limit=limit, size=source.size, seed=seed)

    train, test = frames("train", settings.frames, settings.draw), frames(settings.test_split, None)
    if source.test_frames is not None and len(test) > source.test_frames:
        test = frames(settings.test_split, source.test_frames)
    if both := {frame[0] for frame in train.frames} & {frame[0] for frame in test.frames}:
        named = ", ".join(sorted(both))
        raise DataError(f"the split has {named} for training and for testing; give another with --subset")
    return train, test


def tell_absent(train: Taskonomy, test: Taskonomy) -> None:
    """Say which buildings of the split have no folder."""
    if absent := train.absent + test.absent:
        some = ", ".join(absent[:5]) + " …" * (len(absent) > 5)
        tqdm.write(plain(f"{len(absent)} buildings of the split have no folder here ({some})"))


def ordered(settings: Settings) -> list[str]:
    """The tasks as given, or shuffled."""
    if settings.order is None:
        return list(settings.tasks)
    generator = torch.Generator().manual_seed(settings.order)
    return [settings.tasks[i] for i in torch.randperm(len(settings.tasks), generator=generator).tolist()]


def prepare(method: Method, base: Base, frames: Taskonomy, settings: Settings) -> CachedFeatures | Stack:
    """Images with cached base features where the method uses them, else the images."""
    if not method.uses_features:
        return Stack(frames, "rgb", settings.run.progress)
    dtype = "float16" if settings.method.tapped else "float32"
    path, progress = Path(settings.run.cache).expanduser(), settings.run.progress
    return cache_features(base, Inputs(frames.only("rgb")), path, dtype=dtype, progress=progress)


def constant(task: DenseTask, train: Taskonomy, test: Labelled, count: int = 500) -> float:
    """The value of the best constant guess from `count` training labels, drawn evenly, on as many test labels."""
    rows = spread(len(train), count)
    guess = task.constant(task.labels(train.tensors(task.domain, rows=rows), train.tensors("mask", rows=rows)))
    labels = test.labels(spread(len(test), count))
    size = labels.shape[-2:] if guess.ndim == 4 else ()
    return task.value(task.tally(guess.expand(len(labels), -1, *size), labels))


@torch.no_grad()
def evaluate(method: Method, name: str, data: Labelled, constant: float) -> Score:
    """How well a method does a task on test frames."""
    loader: DataLoader[Any] = loader_over(data, batch_size=50, shuffle=False)
    tallies = []
    for x, features, y in loader:
        x, features = send_to_device((x, features), method.base.device)
        output = method(x, name, features=features).float().cpu()  # sums are in double precision, which MPS has not
        tallies.append(data.task.tally(output, y))
    return data.task.score(torch.stack(tallies).sum(0), constant)


def read(file: Path) -> RunResult:
    """A result, with the units of those that are older than the choice."""
    result = RunResult.load(file)
    return replace(result, settings={**BEFORE, **result.settings})


FAMILIES["itaskonomy"] = Family("iTaskonomy", read)


def main(settings: Settings) -> None:
    """Run, print the table and write the report."""
    show(run(settings), settings)
    say(f"report: {report([settings.run.out])}")


def show(result: RunResult, settings: Settings) -> None:
    """Print the table of a run."""
    print_result(result, "iTaskonomy", settings.run.out)
    say("score: 100 is perfect; for errors, 50 is the best constant guess")
