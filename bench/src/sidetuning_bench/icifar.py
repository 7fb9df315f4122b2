"""iCIFAR (paper, section 4.1): CIFAR-100 as ten tasks of ten classes, learned one after another from one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sidetuning.base import Base
from sidetuning.cache import CachedFeatures, cache_features, loader_over
from sidetuning.errors import DataError
from sidetuning.loading import load_base
from sidetuning.terminal import say
from sidetuning_bench import options
from sidetuning_bench.cifar import ImageSet, load_images, random_flip_crop
from sidetuning_bench.methods import Method, Task
from sidetuning_bench.options import Count, MethodOptions, Natural, Probability, RunOptions, Share, check
from sidetuning_bench.report_runs import FAMILIES, Family, report
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import Run
from sidetuning_bench.sequence import Course, Lesson, Score, learn_in_order, print_result, with_recipe

CLASSES_PER_TASK = 10


@dataclass(frozen=True)
class SolveOptions(MethodOptions):
    """Fixed features with a head in closed form: the best linear probe."""

    name = "solve"
    width: Natural = 0
    """Features of a random expansion of the base's taps that the head reads too; 0 reads the code alone."""
    taps: tuple[str, ...] = ()
    """Inner modules of the base that the expansion reads."""

    def arguments(self, base: Base, seed: int) -> dict[str, Any]:
        return {"width": self.width}

    @property
    def tapped(self) -> tuple[str, ...]:
        return self.taps


METHODS = {
    **options.image_methods(options.SideTuneOptions(), options.BoostingOptions(), options.EWCOptions()),
    # Its answers are classes.
    "solve": SolveOptions(),
}
# The most accurate recipe found within the paper's parameters per task and ten minutes on two cores; see benchmarks.md.
BEST_SIDE = {"side": "fusion", "side_shift": 2, "taps": ("layer2", "layer3"), "merge": "sum", "init": None}
BEST_TRAINING = {"lr": 6e-3, "optimizer": "adamw", "weight_decay": 0.05, "schedule": "one-cycle", "clip": None}
BEST: Mapping[str, Any] = {**BEST_SIDE, **BEST_TRAINING, "mirror": True, "samples": 28 * 5000, "smoothing": 0.1}


@dataclass(frozen=True)
class Settings:
    """Learn CIFAR-100 as ten tasks of ten classes, one after another; the defaults are the paper's protocol."""

    data: str = "uoft-cs/cifar100"
    """A folder with train*.parquet and test*.parquet in the Hub's layout, or a data set on the Hub."""
    recipe: Literal["paper", "best"] = "paper"
    """The paper's protocol, or the most accurate one for no more parameters per task: a side on inner maps of the base,
    mirrored and shifted, about 27 passes. It sets side, taps, merge, init, mirror, samples, optimiser and schedule."""
    base: str = "resnet44-cifar10"
    """Base network."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    samples: Count = 20_000
    """Training images per task, repetitions included (four passes over 5,000)."""
    share: Share = 1.0
    """Part of each task's training images that is used; the number of steps stays."""
    mirror: bool = False
    """Train on mirrored images too, and average the answer over an image and its mirror image. Methods that train a
    network of their own see randomly cropped images too."""
    smoothing: Probability = 0.0
    """Label smoothing of the training loss."""
    tasks: Count = 10
    """How many of the ten tasks to learn."""
    order: int | None = None
    """Learn the tasks in a random order drawn from this seed, instead of label order."""
    alone: bool = False
    """Learn every task as if it were the first, with a method of its own: what rigidity is measured against."""
    method: Annotated[MethodOptions, options.choice(METHODS)] = METHODS["sidetune"]
    training: options.ImageTraining = field(default=options.ImageTraining(lr=1e-3))
    run: RunOptions = field(default=RunOptions(out="runs/icifar"))


def run(settings: Settings) -> RunResult:
    """Learn the tasks in order, saving after each; evaluates every task after every task."""
    settings = with_recipe(settings, BEST)
    check(settings)
    seed, training = settings.run.seed, settings.training
    folder = Run(settings.run.out, "icifar", settings)
    base = load_base(settings.base, weights=settings.base_weights, taps=settings.method.tapped)
    build = partial(settings.method.build, base, seed)
    method = build()
    # An unknown part is found before the long work.
    method.add(Task("dry-run", CLASSES_PER_TASK))
    train_set, test_set = load_images(settings.data, "train"), load_images(settings.data, "test")
    folder.belongs(data=train_set.fingerprint())
    if not (folder.folder / "result.json").exists():
        # Finished runs of earlier versions stay what they are.
        folder.belongs(tests=test_set.fingerprint(), base=base.identity().sha256)
    check_classes(settings, train_set.names, test_set.names)

    train = prepare(method, base, train_set, settings)
    test = views_of(prepare(method, base, test_set, settings))
    base_seconds = sum(data.seconds for data in (train, test[0]) if isinstance(data, CachedFeatures))

    def lesson(k: int) -> Lesson:
        labels = train_set.names[CLASSES_PER_TASK * k : CLASSES_PER_TASK * (k + 1)]
        name = f"classes-{10 * k}-{10 * k + 9}"
        loss = partial(F.cross_entropy, label_smoothing=settings.smoothing)
        return Lesson(
            Task(name, CLASSES_PER_TASK, loss, labels, seed=seed * 1000 + k),
            partial(task_loader, train, k, training.batch, shuffle=True, share=settings.share),
            partial(test_accuracy, name=name, views=test, task=k),
        )

    lessons = [lesson(k) for k in task_order(settings)]
    recipe = training.recipe(-(-settings.samples // training.batch), seed, rise=0.25)
    return learn_in_order(folder, Course(settings, build, lessons, recipe, base_seconds, settings.alone))


def check_classes(settings: Settings, train: Sequence[str], test: Sequence[str]) -> None:
    """Check that both splits have the same classes, and enough of them.

    Raises:
        DataError: they have not.
    """
    if train != test:
        raise DataError(f"{settings.data} has other classes to test than to train on; give both splits the same")
    if len(train) < settings.tasks * CLASSES_PER_TASK:
        needed = f"{settings.tasks} tasks of ten need {settings.tasks * CLASSES_PER_TASK}"
        raise DataError(f"{settings.data} has {len(train)} classes; {needed}")


def fingerprint_of(settings: Settings) -> str:
    """Fingerprint of the training images."""
    return load_images(settings.data, "train").fingerprint()


def task_order(settings: Settings) -> list[int]:
    """Positions of the tasks in label order, or shuffled."""
    if settings.order is None:
        return list(range(settings.tasks))
    return torch.randperm(settings.tasks, generator=torch.Generator().manual_seed(settings.order)).tolist()


class Images(Dataset[Any]):
    """Batches of images without features, for methods that run a network of their own.

    Attributes:
        view: 0 gives images as they are, 1 mirrored, None at random and cropped after padding by 4.
    """

    def __init__(self, images: Tensor, labels: Tensor, view: int | None) -> None:
        self.images, self.labels, self.view = images, labels, view

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, None, Tensor]:
        x = self.images[list(rows)]
        if self.view is None:
            x = random_flip_crop(x, padding=4)
        return x.flip(-1) if self.view == 1 else x, None, self.labels[list(rows)]


def prepare(method: Method, base: Base, images: ImageSet, settings: Settings) -> CachedFeatures | Images:
    """Images, to be augmented where the settings say so, with cached base features where the method uses them."""
    if not method.uses_features:
        return Images(*images.tensors(), view=None if settings.mirror else 0)
    views, augment = (2, mirror) if settings.mirror else (1, None)
    dtype = "float16" if settings.method.tapped else "float32"
    path, progress = Path(settings.run.cache).expanduser(), settings.run.progress
    return cache_features(base, images, path, views=views, augment=augment, dtype=dtype, progress=progress)


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """The second view of every image."""
    return images.flip(-1)


# Caches of mirrored images are named by the function; this is its module in version 0.1.0.
mirror.__module__ = "sidetuning.scenarios.icifar"


def views_of(data: CachedFeatures | Images) -> list[CachedFeatures | Images]:
    """A data set per view, instead of one that gives a random view."""
    if isinstance(data, Images):
        return [data] if data.view == 0 else [Images(data.images, data.labels, view) for view in (0, 1)]
    views = [CachedFeatures(data.folder) for _ in range(data.views)]
    for i, view in enumerate(views):
        view.view = i
    return list(views)


@torch.no_grad()
def test_accuracy(method: Method, name: str, views: Sequence[CachedFeatures | Images], task: int) -> Score:
    """The share of a task's test images whose mean answer over the views is right."""
    from accelerate.utils import send_to_device

    right = total = 0
    device = method.base.device
    for batches in zip(*(task_loader(view, task, 500, shuffle=False) for view in views), strict=True):
        batches = send_to_device(batches, device)
        answers = [method(x, name, features=features).softmax(1) for x, features, _ in batches]
        y = batches[0][2]
        right += int((sum(answers[1:], answers[0]).argmax(1) == y).sum())
        total += len(y)
    return Score(right / total, right / total)


def task_loader(
    data: CachedFeatures | Images, task: int, batch: int, *, shuffle: bool, share: float = 1.0
) -> DataLoader[Any]:
    """The images of one task's ten classes, with labels 0 … 9; a `share` below 1 takes the first ones of each class."""
    first = CLASSES_PER_TASK * task
    labels = data.labels
    chosen = [(labels == first + c).nonzero().flatten() for c in range(CLASSES_PER_TASK)]
    indices = torch.cat([rows[: max(1, round(share * len(rows)))] for rows in chosen]).sort().values
    loader: Any = loader_over(data, batch_size=batch, shuffle=shuffle, indices=indices, relabel=lambda y: y - first)
    return loader  # type: ignore[no-any-return]


FAMILIES["icifar"] = Family("iCIFAR", RunResult.load)


def main(settings: Settings) -> None:
    """Run, print the table and write the report."""
    print_result(run(settings), "iCIFAR", settings.run.out)
    say(f"report: {report([settings.run.out])}")
