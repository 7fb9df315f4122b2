"""One run of imitation: clone a navigating expert from some of its trajectories, and test the clone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sidetuning.base import Features, Input
from sidetuning.cache import CachedFeatures, cache_features, loader_over
from sidetuning.files import held_folder
from sidetuning.sides.fusion import random_shift
from sidetuning.training import evaluate
from sidetuning_bench.agents.outcomes import Scores, scores
from sidetuning_bench.agents.trajectories import Steps, extra_of, read_steps
from sidetuning_bench.agents.worlds import AgentOptions, Player, Policy, map_base, side_options
from sidetuning_bench.methods import METHODS, Method, Recipe, Task
from sidetuning_bench.methods.recipe import one_cycle
from sidetuning_bench.options import FREE, Count, Natural, Rule, SideOptions, Training, flat
from sidetuning_bench.runs import Run, read_run, write_result

TASK = "navigate"
# Trajectories that are held out for the accuracy, at most a tenth of all.
HELD_OUT = 50
# Methods that read settings of sides.
WITH_SIDES = ("sidetune", "boosting")
Dropout = Annotated[float, Rule(lambda p: None if 0 <= p < 1 else f"must be at least 0 and below 1, not {p}")]


@dataclass(frozen=True)
class CloneOptions:
    """What clones learn from, and how."""

    data: str = "runs/trajectories/doom-pointnav-v0"
    """Trajectories, as collect-trajectories writes them."""
    steps: Count = 1500
    """Optimiser steps of every run; few trajectories are seen often."""
    dropout: Dropout = 0.7
    """Dropout of the code that the policy reads, which keeps it from memorising few trajectories."""
    shift: Natural = 8
    """Largest random shift, in pixels, of the pictures that a side or a whole network learns from."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""
    agent: AgentOptions = field(default=AgentOptions())
    sides: SideOptions = field(default=SideOptions(side="fcn5", side_width=0.25, merge="alpha"))
    training: Training = field(default=Training(batch=64, lr=1e-3, weight_decay=1e-4))


@dataclass(frozen=True)
class Settings:
    """One run: a method, a number of trajectories, a seed; width and height of the pictures."""

    method: str = "sidetune"
    trajectories: int = 100
    seed: int = 0
    size: int = 64
    out: str = "runs/clone"
    clone: CloneOptions = field(default=CloneOptions())


@dataclass(frozen=True, kw_only=True)
class Result(Scores):
    """Outcomes of a clone, or of a baseline that learns nothing, in the test episodes.

    Attributes:
        accuracy: share of held-out steps at which the clone does what the expert did; None where nothing is held out,
            and for baselines.
        frames: number of frames of the trajectories that it learned from.
        added: number of parameters that were trained.
        seconds: training time, without the base's features.
        settings: settings of the run.
        data: fingerprint, number of episodes and settings of the trajectories.
    """

    method: str
    trajectories: int
    seed: int
    accuracy: float | None = None
    frames: int = 0
    added: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


class Moves(Dataset[Any]):
    """Batches of `({"x": pictures, "extra": numbers}, features or None, actions)`.

    Pictures are shifted at random by up to `shift` pixels (Kostrikov et al., 2020), and zeros come in; the cached
    features stay those of the original pictures.
    """

    def __init__(self, steps: Steps, features: CachedFeatures | None, shift: int = 0) -> None:
        self.steps, self.features, self.shift = steps, features, shift

    def __len__(self) -> int:
        return len(self.steps)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Input, Features | None, Tensor]:
        rows = list(indices)
        features = None if self.features is None else self.features.__getitems__(rows)[1]
        rgb = self.steps.rgb[rows]
        shifted = random_shift([rgb], self.shift)[0] if self.shift else rgb
        return {"x": shifted, "extra": self.steps.extra[rows]}, features, self.steps.actions[rows]


def about(folder: str, steps: Steps) -> dict[str, Any]:
    """Fingerprint and number of trajectories, and the settings that they were collected with, where these are known."""
    # Whatever was collected by us was so in some environment, which is compared.
    settings = {"env": None, **read_run(folder)["settings"]} if (Path(folder) / "run.json").exists() else {}
    return {"fingerprint": steps.fingerprint(), "episodes": len(steps.starts) - 1, **settings}


def held_out(count: int) -> int:
    """How many of `count` trajectories are kept for the accuracy."""
    return min(HELD_OUT, count // 10)


def split(count: int, learned: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the trajectories to learn from, and of those held out: the first and last ones of a random order.

    So more trajectories contain the fewer, and the same ones are held out for every number.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:learned], order[count - held_out(count) :]


def build_method(settings: Settings) -> Method:
    """The method of a run, without its task."""
    options = settings.clone
    base = map_base(options.agent.base, options.agent.base_weights, settings.size)
    parts = {name: getattr(options.sides, name) for name in ("side", "merge", "init")}
    side = {**parts, "side_options": side_options(options.sides)} if settings.method in WITH_SIDES else {}
    method: Method = METHODS.build(settings.method, base, options=side)
    return method


def run(settings: Settings) -> Result:
    """Learn and test a clone; an interrupted run resumes. Raises ArtifactError where another process does so."""
    with held_folder(settings.out):
        return learn_and_test(settings)


def learn_and_test(settings: Settings) -> Result:
    """As `run`, in a folder that is held."""
    options = settings.clone
    folder = Run(settings.out, "imitation-run", settings)
    steps = read_steps(options.data)
    data = about(options.data, steps)
    method = build_method(settings)
    frames, cache = cast(Dataset[Any], steps), Path(options.cache).expanduser()
    features = cache_features(method.base, frames, cache, progress=False) if method.uses_features else None
    learned_from, kept = split(data["episodes"], settings.trajectories, settings.seed)
    rows = steps.of(learned_from)
    # A method that sees the code alone needs no other pictures.
    shift = options.shift if settings.method in WITH_SIDES or not method.uses_features else 0
    training, rate = options.training, options.training.lr or 1e-3
    loader = loader_over(Moves(steps, features, shift), batch_size=training.batch, indices=rows)
    head = {"actions": 4, "extra": steps.extra.shape[1], "dropout": options.dropout}
    optimizer, scheduler, decay = torch.optim.AdamW, one_cycle(rate, 0.1), training.weight_decay
    recipe = Recipe(options.steps, rate, decay, 1.0, optimizer, scheduler, settings.seed, training.precision)
    task = Task(TASK, "policy", seed=settings.seed, head_options=head)
    learned = method.learn(task, loader, recipe, resume=folder.resume(TASK), save_every=10.0, progress=False)
    method.save(folder.tasks())
    tested = (
        loader_over(Moves(steps, features), batch_size=256, shuffle=False, indices=steps.of(kept)) if kept else None
    )
    result = Result(
        method=settings.method,
        trajectories=settings.trajectories,
        seed=settings.seed,
        accuracy=None if tested is None else evaluate(method, TASK, tested)["accuracy"],
        frames=len(rows),
        added=sum(p.numel() for p in method.trained(TASK)),
        seconds=learned.seconds,
        settings={name: value for name, value in flat(settings).items() if name not in FREE},
        data=data,
        **scores(player(settings, method).outcomes(options.agent.test_episodes)),
    )
    write_result(folder.folder / "result.json", result)
    folder.done(TASK)
    return result


def policy_of(method: Method) -> Policy:
    """A clone's policy. The base is folded once, since it runs at every step."""
    base = method.base.folded()

    @torch.no_grad()
    def policy(observation: dict[str, Any]) -> Tensor:
        rgb = torch.from_numpy(observation["rgb"]).permute(2, 0, 1)[None].to(base.device)
        extra = extra_of({name: value[None] for name, value in observation.items()}, 1).to(base.device)
        features = base(rgb) if method.uses_features else None
        return method({"x": rgb, "extra": extra}, TASK, features=features)[0].float().softmax(0).cpu()

    return policy


def player(settings: Settings, method: Method) -> Player:
    """A clone in its test environment."""
    agent = settings.clone.agent
    return Player(settings.method, agent.env, agent.test_split, settings.size, policy_of(method), settings.seed)
