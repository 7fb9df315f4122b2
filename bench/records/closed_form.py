"""Tasks in closed form on iCIFAR: accuracy, time and stored numbers; and which task an image is of, when nobody says.

Ten tasks of ten classes of CIFAR-100 on the packaged ResNet-44, each learned from its own images and their mirror
images by `st.solve`; each answer is of an image and its mirror image. All images go through the base once; times are
those of one busy core from then on, reading the cache included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sidetuning as st
from kinds import DRAWN, digits, drawn, frames, photographs
from record import Record, public, read, recorded, write
from sidetuning_bench import icifar
from sidetuning_bench.cifar import load_images
from sidetuning_bench.language.metric import area

TAPS = ("layer1", "layer2.3", "layer2", "layer3.3", "layer3.5", "layer3")
SEEDS = (0, 1, 2)
# Features of the random head; with the code and a bias, 10 classes store 38,650 and 19,650 numbers.
WIDTHS = (3800, 1900)
BATCH = 500


@dataclass(frozen=True)
class Settings:
    """Tasks of iCIFAR in closed form."""

    data: str = icifar.Settings.data
    """A folder with CIFAR-100, or a data set on the Hub."""
    cache: Path = Path("closed-form-cache")
    """Folder for the features of all images."""


class Pooled(nn.Module):
    """A network whose taps are averaged to 4x4 places: its cache is ten times smaller, and a random head reads it."""

    def __init__(self, base: st.Base) -> None:
        super().__init__()
        self.net = base.net
        # A tuple: a base is no part of a network.
        self.base = (base,)
        self.taps = nn.ModuleDict({name.replace(".", "-"): nn.AdaptiveAvgPool2d(4) for name in base.tap_shapes})

    def forward(self, x: Tensor) -> Tensor:
        features = self.base[0].encode(x)
        for name, tap in features.taps.items():
            self.taps[name.replace(".", "-")](tap)
        return features.out


def pooled_base() -> st.Base:
    """The packaged ResNet-44 with pooled taps."""
    base = st.load_base("resnet44-cifar10", taps=TAPS).folded()
    assert base.mean is not None and base.std is not None
    taps = [f"taps.{name.replace('.', '-')}" for name in TAPS]
    mean, std = base.mean.flatten().tolist(), base.std.flatten().tolist()
    return st.Base(Pooled(base), example=base.example, taps=taps, mean=mean, std=std)


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """The mirror images of a batch."""
    return images.flip(-1)


class Pairs:
    """Batches of images, followed by their mirror images.

    Args:
        cached: a cache with both views.
        rows: the images.
        first: the number of the task's first class, which becomes 0.
    """

    def __init__(self, cached: st.CachedFeatures, rows: Sequence[int], first: int = 0) -> None:
        self.cached, self.rows, self.first = cached, rows, first

    def __iter__(self) -> Iterator[tuple[Tensor, st.Features, Tensor]]:
        for i in range(0, len(self.rows), BATCH):
            views = []
            for self.cached.view in (0, 1):
                views.append(self.cached.__getitems__(self.rows[i : i + BATCH]))
            (x, a, y), (other, b, _) = views
            taps = {name: torch.cat([a.taps[name], b.taps[name]]) for name in a.taps}
            features = st.Features(torch.cat([a.out, b.out]), taps)
            yield torch.cat([x, other]), features, torch.cat([y, y]) - self.first


def caches(base: st.Base, given: Settings) -> tuple[st.CachedFeatures, st.CachedFeatures]:
    """Features of all training and test images and their mirror images."""
    found = []
    for split in ("train", "test"):
        images = load_images(given.data, split)
        found.append(st.cache_features(base, images, given.cache, views=2, augment=mirror, dtype="float16"))
    return found[0], found[1]


def model_of(base: st.Base, width: int, seed: int) -> st.SideTuner:
    """Ten tasks of ten classes with random heads."""
    model = st.SideTuner(base)
    options = {"outputs": 10, "width": width, "grid": 4, "seed": seed}
    for task in range(10):
        model.add_task(f"t{task}", side=None, merge="base-only", head="random", head_options=options, problem="classes")
    return model


def rows_of(cached: st.CachedFeatures, task: int) -> Tensor:
    """The images of one task."""
    return (cached.labels // 10 == task).nonzero().flatten()


@torch.no_grad()
def answers(model: st.SideTuner, task: str, test: Pairs) -> tuple[Tensor, Tensor]:
    """Log probabilities (n, 10) of images, averaged over an image and its mirror image, and their classes."""
    found, truth = [], []
    for x, features, y in test:
        logs = model(x, task, features=features)
        found.append(logs.softmax(1).view(2, -1, logs.shape[1]).mean(0).log())
        truth.append(y[: len(y) // 2])
    return torch.cat(found), torch.cat(truth)


def learned(base: st.Base, train: st.CachedFeatures, test: st.CachedFeatures, width: int, seed: int) -> dict[str, Any]:
    """Accuracies and times of ten tasks of one width, from all images and from 1 % of them."""
    model = model_of(base, width, seed)
    found: dict[str, Any] = {"accuracy": [], "few": [], "seconds": [], "strengths": []}
    for task in range(10):
        rows, asked = rows_of(train, task), Pairs(test, rows_of(test, task).tolist(), 10 * task)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        for key, some in (("few", rows[order[: len(rows) // 100]]), ("accuracy", rows)):
            started = time.process_time()
            result = st.solve(model, f"t{task}", Pairs(train, some.tolist(), 10 * task), views=2, progress=False)
            seconds = time.process_time() - started
            logs, truth = answers(model, f"t{task}", asked)
            found[key].append((logs.argmax(1) == truth).double().mean().item())
        found["seconds"].append(seconds)
        found["strengths"].append(result.strength)
    found["numbers"] = sum(p.numel() for p in model["t0"].parameters())
    return found


def error_of(sure: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error, with bins of equal width (Guo et al., ICML 2017)."""
    places = (sure * bins).long().clamp(max=bins - 1)
    total = 0.0
    for i in places.unique():
        some = places == i
        total += abs(float(sure[some].mean() - right[some].mean())) * float(some.double().mean())
    return total


def routed(
    base: st.Base, train: st.CachedFeatures, test: st.CachedFeatures, others: Tensor, seed: int
) -> dict[str, Any]:
    """Ten slices of CIFAR-100, the task not told, and `others`: images of other kinds."""
    model = model_of(base, WIDTHS[1], seed)
    seconds, moved = [], 0
    x, features, _ = next(iter(Pairs(test, range(50))))
    for task in range(10):
        name, pairs = f"t{task}", Pairs(train, rows_of(train, task).tolist(), 10 * task)
        st.solve(model, name, pairs, views=2, progress=False)
        before = model.forward_all(x, features=features)
        started = time.process_time()
        st.learn_routes(model, name, pairs, width=WIDTHS[1], seed=seed, views=2, progress=False)
        seconds.append(time.process_time() - started)
        after = model.forward_all(x, features=features)
        moved += sum(not torch.equal(before[key], after[key]) for key in before)
    task_right, class_right, sure, none = [], [], [], []
    for x, features, y in Pairs(test, range(len(test))):
        truth = y[: len(y) // 2]
        routes = model.route(x, features=features, views=2)
        heads = model.forward_all(x, features=features)
        inner = torch.stack([heads[name].softmax(1).view(2, len(truth), -1).mean(0) for name in routes.tasks], 1)
        joint = (routes.probabilities.unsqueeze(2) * inner).flatten(1)
        both = routes.probabilities
        class_right.append(joint.argmax(1) == truth)
        task_right.append(both.argmax(1) == truth // 10)
        sure.append(both.amax(1))
        none.append(routes.none)
    right = torch.cat(task_right).double()
    foreign = torch.cat([model.route(torch.cat([x, x.flip(-1)]), views=2).none for x in others.split(BATCH)])
    return {
        "class": float(torch.cat(class_right).double().mean()),
        "task": float(right.mean()),
        "calibration_error": error_of(torch.cat(sure).double(), right),
        "area": area(torch.cat(none).tolist(), foreign.tolist()),
        "none": float(torch.cat(none).mean()),
        "seconds": seconds,
        "moved": moved,
    }


def run(given: Settings) -> None:
    """Measure each seed that has no result."""
    torch.set_num_threads(1)
    base = pooled_base()
    train, test = caches(base, given)
    others = torch.cat([drawn(draw, 100, 99)[0] for draw in DRAWN.values()] + [digits(200)[0]])
    for seed in SEEDS:
        if not recorded(f"closed-form-{seed}", public(given)):
            found: dict[str, Any] = {f"width_{width}": learned(base, train, test, width, seed) for width in WIDTHS}
            found["routes"] = routed(base, train, test, others, seed)
            write(f"closed-form-{seed}", {"seed": seed, **found}, given)


def table(given: Settings) -> str:
    """What is learned in closed form, and what is routed: means over the seeds, and their range."""
    found = [read(f"closed-form-{seed}") for seed in SEEDS]

    def cell(values: list[float], scale: float = 100, digits: int = 1) -> str:
        mean, half = scale * sum(values) / len(values), scale * (max(values) - min(values)) / 2
        return f"{mean:.{digits}f} ± {half:.{digits}f}"

    lines = [
        "| numbers a task | all images, % | 1 % of them, % | seconds of one core |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for width in WIDTHS:
        some = [one[f"width_{width}"] for one in found]
        means = [[sum(one[key]) / 10 for one in some] for key in ("accuracy", "few", "seconds")]
        cells = [cell(means[0]), cell(means[1]), cell(means[2], 1)]
        lines.append(f"| {some[0]['numbers']:,} | {' | '.join(cells)} |")
    routes = [one["routes"] for one in found]
    lines += [
        "",
        "| class of 100, % | task of 10, % | calibration error, % | area of none, % | outputs that moved |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| "
        + " | ".join(cell([one[key] for one in routes]) for key in ("class", "task", "calibration_error", "area"))
        + f" | {sum(one['moved'] for one in routes)} |",
    ]
    return "\n".join(lines)


CLOSED_FORM = Record(Settings(), run, table)


@dataclass(frozen=True)
class Kinds:
    """Ten data sets of different kinds, and the task not told."""

    data: str = icifar.Settings.data
    """A folder with CIFAR-100, or a data set on the Hub."""
    frames: Path = Path("doom")
    """A folder of frames of Doom, as `sidetuning bench render-doom` makes it."""


def ten_kinds(given: Kinds, part: int, count: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images of ten kinds, of training (part 0) or of the test (part 1)."""
    found = {name: drawn(draw, count, 2 * seed + part) for name, draw in DRAWN.items()}
    x, y = digits(1797)
    found["digits"] = (x[:1000], y[:1000]) if part == 0 else (x[1000 : 1000 + count], y[1000 : 1000 + count])
    found["photographs"] = photographs(load_images(given.data, ("train", "test")[part]), count)
    found["frames"] = frames(given.frames, count, part)
    return found


def run_kinds(given: Kinds) -> None:
    """Learn the routes of ten data sets, one after another, and ask for tests of all, and for each that is left out."""
    torch.set_num_threads(1)
    base = st.load_base("resnet44-cifar10", taps=TAPS).folded()
    for seed in SEEDS:
        if recorded(f"route-kinds-{seed}", public(given)):
            continue
        train, test = ten_kinds(given, 0, 600, seed), ten_kinds(given, 1, 200, seed)
        model, right, sure, none = st.SideTuner(base), [], [], {}
        for name, (x, y) in train.items():
            outputs = int(y.max()) + 1
            model.add_task(name, side=None, merge="base-only", head=outputs, problem="classes", seed=seed)
            st.learn_routes(model, name, [(x, y)], width=1000, seed=seed, progress=False)
        for name, (x, _) in test.items():
            routes = model.route(x)
            right.append(routes.probabilities.argmax(1) == routes.tasks.index(name))
            sure.append(routes.probabilities.amax(1))
            none[name] = routes.none
        # Each kind in turn is of none.
        areas, errors = {}, torch.cat(right).double()
        for name, (x, _) in test.items():
            kept = model[name].beside
            model[name].beside = {}
            known = torch.cat([model.route(test[other][0]).none for other in test if other != name])
            areas[name] = area(known.tolist(), model.route(x).none.tolist())
            model[name].beside = kept
        found = {
            "seed": seed,
            "routed": float(errors.mean()),
            "by_kind": {name: float(some.double().mean()) for name, some in zip(test, right, strict=True)},
            "calibration_error": error_of(torch.cat(sure).double(), errors),
            "none": {name: float(some.mean()) for name, some in none.items()},
            "areas": areas,
        }
        write(f"route-kinds-{seed}", found, given)


def table_kinds(given: Kinds) -> str:
    """Routed images and the area of each kind, means over the seeds."""
    found = [read(f"route-kinds-{seed}") for seed in SEEDS]

    def mean(values: list[float]) -> str:
        return f"{100 * sum(values) / len(values):.1f}"

    lines = ["| kind | routed to its task, % | area of none where it is left out, % |", "| --- | ---: | ---: |"]
    for name in found[0]["by_kind"]:
        columns = (mean([one[key][name] for one in found]) for key in ("by_kind", "areas"))
        lines.append(f"| {name} | {' | '.join(columns)} |")
    areas = [sum(one["areas"].values()) / len(one["areas"]) for one in found]
    lines.append(f"| all | {mean([one['routed'] for one in found])} | {mean(areas)} |")
    return "\n".join([*lines, "", f"Calibration error: {mean([one['calibration_error'] for one in found])} %."])


ROUTE_KINDS = Record(Kinds(), run_kinds, table_kinds)
