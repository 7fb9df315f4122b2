"""Which task is this, or none? In closed form over all that was learned, from what each task kept of its own data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetuning.base import Base, Features, Input
from sidetuning.beside import Beside, Kept, found_beside, is_of_base, read_beside, stamp
from sidetuning.branch import Branch
from sidetuning.errors import ArtifactError, ShapeError, TaskError
from sidetuning.expansion import Expansion, signs
from sidetuning.files import check_json
from sidetuning.heads import pooled
from sidetuning.shelf import Shelf

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
TEMPERATURES = tuple(0.02 * 1.5**i for i in range(16))
# Directions in which a task's own spread is known.
DIRECTIONS = 64
# How likely a sample is of no task before it is seen.
NONE = 0.1


class Routes(NamedTuple):
    """What a router says of a batch.

    Attributes:
        tasks: names of the tasks that it knows, sorted.
        probabilities: of each task (b, tasks).
        none: the probability that a sample is of none of them (b,); with `probabilities` they sum to 1.
    """

    tasks: list[str]
    probabilities: Tensor
    none: Tensor

    def best(self) -> list[str | None]:
        """The most probable task of each sample; None where that it is of none is more probable."""
        values, places = self.probabilities.max(1)
        known = (values >= self.none).tolist()
        return [self.tasks[i] if yes else None for i, yes in zip(places.tolist(), known, strict=True)]


class Space:
    """The features that routes are told by: a random expansion of the base's taps, and the code."""

    def __init__(self, base: Base, width: int, grid: int, seed: int) -> None:
        self.expansion = Expansion(base, width, grid, seed)
        self.kind, self.width = base.kind, width + base.width
        taps = {name: base.layouts.get(name) for name in self.expansion.taps}
        self.text: dict[str, Any] = {"width": width, "grid": grid, "seed": seed, "taps": taps}

    @classmethod
    def read(cls, base: Base, text: Mapping[str, Any]) -> Space:
        """The features that a task's text tells, on a base that returns their taps."""
        return cls(base.with_taps(text["taps"]), text["width"], text["grid"], text["seed"])

    def __call__(self, base: Base, x: Input, given: Features | Tensor | None) -> Tensor:
        """The features (b, width) of a batch."""
        missing = {name: layout for name, layout in self.text["taps"].items() if name not in base.tap_shapes}
        if missing and given is None:
            base = base.with_taps({**dict.fromkeys(base.tap_shapes), **base.layouts, **missing})
        inputs = base.prepare(x)
        features = base.features(inputs, given)
        if lacking := [name for name in self.expansion.taps if name not in features.taps]:
            raise ShapeError(f"routes read the tap '{lacking[0]}', which the features do not hold; leave features= out")
        code = pooled(features.out, self.kind, inputs)
        return torch.cat([self.expansion(inputs, features), F.layer_norm(code, code.shape[1:])], 1)


class Router:
    """Routes over what the tasks kept: linear discriminant analysis of all their classes, sharing one covariance.

    score(c) = φᵀ Σ⁻¹ μ_c - ½ μ_cᵀ Σ⁻¹ μ_c; a task has the sum of its classes' probabilities. A sample is of none where
    its Mahalanobis distance to the task's nearest class is larger than those of held-out rows are (Lee et al., NeurIPS
    2018), by the task's own covariance: its largest directions, and the mean variance of all tasks in the others.
    Tasks are taken in the order of their names: the order in which they were learned does not matter, bit for bit.

    Args:
        base: the base of the model.
        kept: what each task keeps.

    Raises:
        TaskError: no task keeps a route, or tasks keep routes of other features or of another base.
        ArtifactError: a file of a route that is gone or damaged.
    """

    def __init__(self, base: Base, kept: Mapping[str, Kept]) -> None:
        self.kept = stamps(kept)
        if not kept:
            raise TaskError("no task has a route; call st.learn_routes(model, task, loader) for each")
        self.tasks = sorted(kept)
        texts = {name: text_of(name, kept[name]) for name in self.tasks}
        first = texts[self.tasks[0]]
        self.space = Space.read(base, first["space"])
        d, identity = self.space.width, base.identity()
        half = torch.zeros(d * (d + 1) // 2, dtype=torch.float64)
        means, counts, held, owners, truth, scatters = [], [], [], [], [], []
        for i, name in enumerate(self.tasks):
            if texts[name]["space"] != first["space"] or not is_of_base(texts[name], identity):
                raise TaskError(
                    f"the route of task '{name}' is of other features or another base; learn_routes it again"
                )
            tensors = _checked(name, read_beside(kept[name]), d, len(half))
            scatters.append(tensors["scatter"])
            half += scatters[-1].double()
            means.append(tensors["means"].double())
            counts.append(tensors["counts"])
            held.append(tensors["held"].double())
            owners.append(torch.full((len(means[-1]),), i))
            truth.append(torch.full((len(held[-1]),), i))
        covariance = _whole(half)
        self.means, self.owners = torch.cat(means), torch.cat(owners)
        covariance /= max(1.0, float(torch.cat(counts).sum()) - len(self.means))
        unit = float(covariance.diagonal().mean()) or 1.0
        # Of each task's own covariance: directions (d, r), and how far a distance along them is not counted.
        self.directions = []
        for scatter, count in zip(scatters, counts, strict=True):
            values, vectors = _largest(_whole(scatter.double()) / max(1.0, float(count.sum()) - len(count)))
            self.directions.append(vectors * (values / (values + unit)).sqrt())
        self._calibrate(covariance, unit, torch.cat(held), torch.cat(truth))

    def _calibrate(self, covariance: Tensor, unit: float, held: Tensor, truth: Tensor) -> None:
        """Choose strength and temperature, and learn how sure to be, on rows that are in no sum."""
        best = math.inf
        for strength in STRENGTHS:
            ridged = covariance.clone()
            ridged.diagonal().add_(strength * unit)
            factor = torch.linalg.cholesky(ridged)
            weight = torch.cholesky_solve(self.means.T, factor)
            bias = -0.5 * (self.means * weight.T).sum(1)
            scores = held @ weight + bias
            for temperature in TEMPERATURES:
                loss = F.nll_loss(self._by_task((temperature * scores).log_softmax(1)), truth).item()
                if loss < best:
                    best, self.temperature = loss, temperature
                    self.weight, self.bias = weight, bias
        logs = self._by_task((self.temperature * (held @ self.weight + self.bias)).log_softmax(1))
        self.sure = _logistic(_odds(logs), (logs.argmax(1) == truth).double())
        distances = self._distances(held)[torch.arange(len(held)), truth].log()
        rows = [distances[truth == i] for i in range(len(self.tasks))]
        spread = torch.cat([row - row.mean() for row in rows]).std(correction=0).clamp(min=1e-3)
        self.usual = torch.stack([row.mean() for row in rows])
        # A task of few rows shares the spread of all.
        self.spread = torch.stack(
            [((row - row.mean()).square().sum() + 20 * spread**2) / (len(row) + 20) for row in rows]
        )
        self.spread = self.spread.sqrt()

    def _by_task(self, logs: Tensor) -> Tensor:
        """Log probabilities of classes (b, c) to those of tasks (b, t)."""
        return torch.stack([logs[:, self.owners == i].logsumexp(1) for i in range(len(self.tasks))], 1)

    def _distances(self, z: Tensor) -> Tensor:
        """Squared distances (b, t) of features to the nearest class of each task, in the task's own measure."""
        found = []
        for i, directions in enumerate(self.directions):
            means = self.means[self.owners == i]
            whole = torch.cdist(z, means, compute_mode="donot_use_mm_for_euclid_dist").square()
            along = torch.cdist(
                z @ directions, means @ directions, compute_mode="donot_use_mm_for_euclid_dist"
            ).square()
            found.append((whole - along).clamp(min=1e-12).amin(1))
        return torch.stack(found, 1)

    @torch.no_grad()
    def routes(self, base: Base, x: Input, features: Features | Tensor | None, views: int) -> Routes:
        """The routes of a batch; see `SideTuner.route`."""
        z = self.space(base, x, features)
        if views < 1 or len(z) % views:
            raise ShapeError(f"a batch of {len(z)} rows is not {views} views of each sample")
        device = z.device
        probabilities, none = self.judge(z.view(views, -1, z.shape[1]).mean(0).double().cpu())
        return Routes(list(self.tasks), probabilities.float().to(device), none.float().to(device))

    def judge(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of the tasks (b, t), and of none (b,), of features (b, d) of double precision."""
        logs = self._by_task((self.temperature * (z @ self.weight + self.bias)).log_softmax(1))
        probabilities = logs.exp()
        if len(self.tasks) > 1:
            probabilities = _sharpened(probabilities, (_odds(logs) @ self.sure).sigmoid())
        # Two normal distributions of log distances: that of the task, and a wider one of what is further off.
        deviation = ((self._distances(z).log() - self.usual) / self.spread)[torch.arange(len(z)), logs.argmax(1)]
        deviation = deviation.clamp(-4 / 3, 100)
        odds = 0.375 * deviation.square() + deviation - 2 - math.log(2) + math.log(NONE / (1 - NONE))
        none = odds.sigmoid()
        return probabilities * (1 - none).unsqueeze(1), none


def kept_routes(branches: Mapping[str, Branch], shelf: Shelf | None) -> dict[str, Kept]:
    """The routes of tasks in memory, and of those that wait in their folders, by the tasks' names."""
    folders = {} if shelf is None else shelf.folders
    found = {name: found_beside(folder) for name, folder in folders.items() if name not in branches}
    found |= {name: branch.beside for name, branch in branches.items()}
    return {name: beside["route"] for name, beside in sorted(found.items()) if "route" in beside}


def stamps(kept: Mapping[str, Kept]) -> dict[str, object]:
    """Equal as long as the tasks keep what they kept."""
    return {name: stamp(found) for name, found in kept.items()}


def text_of(name: str, kept: Kept) -> dict[str, Any]:
    """What a task's route tells of its features and its base; ArtifactError where it does not."""
    text, space = read_beside(kept).text, {"width": int, "grid": int, "seed": int, "taps": dict}
    schema = {"space": space, "base": str, "identity?": dict}
    check_json(text, f"the route of task '{name}'", schema, "learn_routes it again")
    return text


def _checked(name: str, beside: Beside, d: int, half: int) -> dict[str, Tensor]:
    """The tensors of a route; ArtifactError where they are not those of d features."""
    tensors = beside.tensors
    k = len(tensors.get("counts", ()))
    shapes = {"counts": (k,), "means": (k, d), "scatter": (half,), "held": (len(tensors.get("held", ())), d)}
    if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != shapes or not k or not shapes["held"][0]:
        raise ArtifactError(f"the route of task '{name}' is not one of {d} features; learn_routes it again")
    return tensors


def _whole(half: Tensor) -> Tensor:
    """A symmetric matrix of its lower half, row by row."""
    d = round((math.sqrt(8 * len(half) + 1) - 1) / 2)
    rows, columns = torch.tril_indices(d, d)
    whole = half.new_zeros(d, d)
    whole[rows, columns] = half
    whole[columns, rows] = half
    return whole


def _largest(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (r,) of a covariance and their vectors (d, r), by subspace iteration."""
    basis = signs(0, 0, len(covariance), min(DIRECTIONS, len(covariance))).to(covariance)
    for _ in range(5):
        basis = torch.linalg.qr(covariance @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ covariance @ basis)
    return values.clamp(min=0), basis @ vectors


def _odds(logs: Tensor) -> Tensor:
    """Powers 0 to 3 of the log odds of the most probable task (b, 4)."""
    top = logs.exp().amax(1).clamp(1e-4, 1 - 1e-4)
    odds = (top / (1 - top)).log() / 4
    return torch.stack([odds**power for power in range(4)], 1)


def _sharpened(probabilities: Tensor, top: Tensor) -> Tensor:
    """Probabilities (b, t) of which the highest is `top` (b,), as far as it stays the highest."""
    place = probabilities.argmax(1, keepdim=True)
    others = probabilities.clamp(min=1e-12).scatter(1, place, 0.0)
    others = others / others.sum(1, keepdim=True)
    second = others.amax(1)
    top = torch.maximum(top, second / (1 + second))
    return (others * (1 - top).unsqueeze(1)).scatter(1, place, top.unsqueeze(1))


def _logistic(x: Tensor, right: Tensor) -> Tensor:
    """Weights of a logistic regression, by Newton's method with halved steps; as few rows as ten are enough."""
    # Where rows are few, certainty stays what it is.
    prior = torch.tensor([0.0, 4.0, 0.0, 0.0], dtype=x.dtype)
    weight = prior.clone()

    def loss(w: Tensor) -> float:
        return float(
            F.binary_cross_entropy_with_logits(x @ w, right, reduction="sum") + 0.5 * (w - prior).square().sum()
        )

    for _ in range(30):
        mean = (x @ weight).sigmoid()
        slope = x.T @ (mean - right) + (weight - prior)
        curve = (x * (mean * (1 - mean)).unsqueeze(1)).T @ x + torch.eye(4, dtype=x.dtype)
        step, size = torch.linalg.solve(curve, slope), 1.0
        while loss(weight - size * step) > loss(weight) and size > 1e-6:
            size /= 2
        weight = weight - size * step
    return weight
